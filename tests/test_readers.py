"Every layout as a small tree of real files of its format; splits over many random cohorts; a hospital's mess"
import json, os, re, sys, warnings
from pathlib import Path

import nibabel, numpy as np, pandas as pd, pydicom, pytest
from hypothesis import given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from test_volume import odd_sform, write_series

from fastmiseg.preparing import Reading
from fastmiseg.scans.cohort import CohortError, check_cohort, find_duplicates, load_cohort, save_cohort
from fastmiseg.scans.layout import check_each_once
from fastmiseg.scans.split import split_cohort
from fastmiseg.scans.masks import read_mask, read_scan
from fastmiseg.scans.volume import Volume, VolumeError, read_volume, write_volume

def image(seed=0, shape=(4,10,12)):
    return Volume(np.random.default_rng(seed).integers(1, 900, shape).astype(np.int16), (5.,1.5,1.25))
def mask_of(vol, values=(0,1)):
    return vol.like(np.choose((vol.array[-1] if vol.array.ndim==4 else vol.array)%len(values), values)
                      .astype(np.uint16 if max(values)>255 else np.uint8))
def put(folder, name, mask_name=None, seed=0, values=(0,1), shape=(4,10,12)):
    vol = image(seed, shape)
    write_volume(vol, folder/name)
    if mask_name: write_volume(mask_of(vol, values), folder/mask_name)

def all_read(df):
    for o in df.itertuples():
        x,y = read_scan(o.image, o.mask, channels=df.attrs['channels']>1,
                        classes=df.attrs['classes'], labels=df.attrs['labels'])
        assert (y is None)==(o.mask is None)
    return True

# ---- layouts

def acdc(root, flat=False):
    for n,part,group in [(1,'training','DCM'),(2,'training','NOR'),(101,'testing',None)]:
        p = f'patient{n:03d}'
        d = root/p if flat else root/part/p
        put(d, f'{p}_4d.nii.gz', shape=(3,4,10,12))
        for f in (1,12):
            put(d, f'{p}_frame{f:02d}.nii.gz', f'{p}_frame{f:02d}_gt.nii.gz', seed=n*100+f, values=(0,1,2,3))
        if group: (d/'Info.cfg').write_text(f'ED: 1\nES: 12\nGroup: {group}\nHeight: 184.0\nNbFrame: 30\n')
    return root

@pytest.mark.parametrize('flat', [False,True])
def test_acdc(flat, tmp_path, capsys):
    df = load_cohort(acdc(tmp_path, flat))
    assert capsys.readouterr().out==('acdc: 6 scans of 3 subjects, 6 with masks (3 subjects); '
                                     'classes background, RV, Myo, LV\n')
    assert df.scan.tolist()==[f'patient{n}_frame{f}' for n in ('001','002','101') for f in ('01','12')]
    assert df.group.tolist()==['DCM']*2+['NOR']*2+[None]*2 and df.phase.tolist()==['ED','ES']*2+[None]*2
    assert not df.image.str.contains('4d').any() and all_read(df)

def test_acdc_without_folders(tmp_path):
    acdc(tmp_path/'a')
    (tmp_path/'flat').mkdir()
    for f in (tmp_path/'a').rglob('*.nii.gz'): f.rename(tmp_path/'flat'/f.name)
    df = load_cohort(tmp_path/'flat')
    assert df.attrs['layout']=='acdc' and df.subject.nunique()==3 and all_read(df)

def test_acdc_with_masks_too_many(tmp_path):
    for n in (1,2): put(tmp_path, f'patient{n:03d}_frame01.nii.gz', f'patient{n:03d}_frame1_gt.nii.gz', seed=n)
    put(tmp_path, 'patient003_frame01_gt.nii.gz')
    with pytest.warns(UserWarning, match='1 masks without an image are left out: patient003_frame01'):
        df = load_cohort(tmp_path)
    assert df.scan.tolist()==['patient001_frame01','patient002_frame01'] and df['mask'].notna().all()
    put(tmp_path/'old', 'patient002_frame01_gt.nii.gz')
    with pytest.raises(CohortError, match="the scan 'patient002_frame01' has 2 masks: .*frame1_gt.nii.gz and .*old/"
                                          'patient002_frame01_gt.nii.gz; keep one'):
        load_cohort(tmp_path)

def test_promise12(tmp_path, capsys):
    for n in range(3):
        put(tmp_path/f'TrainingData_Part{n%2+1}', f'Case{n:02d}.mhd', f'Case{n:02d}_segmentation.mhd',
            seed=n, shape=(3,8+n,8))
    put(tmp_path/'TestData', 'Case00.mhd', seed=9)
    assert len(list(tmp_path.rglob('*.zraw')))==7                 # compressed MetaImage in two files
    df = load_cohort(tmp_path)
    assert 'promise12: 4 scans of 4 subjects, 3 with masks' in capsys.readouterr().out
    assert df.scan.tolist()==['Case00','Case01','Case02','test_Case00'] and df.subject.tolist()==df.scan.tolist()
    assert df['mask'].isna().tolist()==[False,False,False,True] and all_read(df)

def msd(root, name, ids, test=(), shape=(4,10,12), modality=None, labels=None, stem=None):
    stem = stem or name.lower()
    modality = {'0':'MRI'} if modality is None else modality
    labels = labels or {'0':'background','1':'A','2':'B'}
    for i in ids:
        put(root, f'imagesTr/{stem}_{i:03d}.nii.gz', f'labelsTr/{stem}_{i:03d}.nii.gz',
            seed=i, values=tuple(range(len(labels))), shape=shape)
    for i in test: put(root, f'imagesTs/{stem}_{i:03d}.nii.gz', seed=i, shape=shape)
    for d in ('imagesTr','labelsTr'): (root/d/f'._{stem}_{ids[0]:03d}.nii.gz').write_bytes(b'Mac OS X        ')
    (root/'dataset.json').write_text(json.dumps(dict(name=name, modality=modality, labels=labels, numTraining=len(ids),
        training=[dict(image=f'./imagesTr/{stem}_{i:03d}.nii.gz', label=f'./labelsTr/{stem}_{i:03d}.nii.gz')
                  for i in ids],
        test=['./imagesTs/gone_999.nii.gz'])))
    return root

def test_msd_hippocampus(tmp_path):
    df = load_cohort(msd(tmp_path, 'Hippocampus', [1,3,4,6], test=[2,8]))
    assert dict(zip(df.scan, df.subject))=={
        'hippocampus_001':'subject_001', 'hippocampus_002':'subject_001', 'hippocampus_003':'subject_002',
        'hippocampus_004':'subject_002', 'hippocampus_006':'subject_003', 'hippocampus_008':'subject_004'}
    assert df['mask'].isna().sum()==2 and df.attrs['classes']==('background','A','B') and all_read(df)

def test_msd_spleen_is_not_paired(tmp_path):
    df = load_cohort(msd(tmp_path, 'Spleen', [2,3,10], test=[1], labels={'0':'background','1':'spleen'}))
    assert df.subject.nunique()==4 and all_read(df)

def test_msd_channels(tmp_path):
    df = load_cohort(msd(tmp_path, 'Prostate', [0,1], shape=(2,4,10,12), modality={'0':'T2','1':'ADC'}))
    assert df.attrs['channels']==2 and read_volume(df.image[0], channels=True).array.shape==(2,4,10,12) and all_read(df)

def test_msd_with_gaps_in_its_labels(tmp_path):
    df = load_cohort(msd(tmp_path, 'Liver', [1,2], labels={'0':'background','2':'tumour'}))
    assert df.attrs['classes']==('background','tumour') and df.attrs['labels']=={0:0,2:1}

def test_msd_damaged_list(tmp_path):
    msd(tmp_path, 'Spleen', [1,2])
    (tmp_path/'dataset.json').write_text('{"labels": ["background"]')
    with pytest.raises(CohortError, match='dataset.json: cannot be used .*expected `labels` like'):
        load_cohort(tmp_path)
    (tmp_path/'dataset.json').write_text('[]')
    with pytest.raises(CohortError, match='dataset.json: cannot be used'): load_cohort(tmp_path)

def test_mmwhs(tmp_path, capsys):
    values = (0,205,420,500,550,600,820,850)
    for n in (1001,1002):
        put(tmp_path/'ct_train', f'ct_train_{n}_image.nii.gz', f'ct_train_{n}_label.nii.gz', seed=n, values=values)
    put(tmp_path/'ct_test', 'ct_test_2001_image.nii.gz', seed=5)
    put(tmp_path/'mr_train', 'mr_train_1001_image.nii.gz', 'mr_train_1001_label.nii.gz', seed=6, values=values)
    df = load_cohort(tmp_path)
    assert 'mmwhs: 3 scans of 3 subjects, 2 with masks' in capsys.readouterr().out
    assert all_read(df) and len(df.attrs['classes'])==8
    m = read_mask(df['mask'].dropna().iloc[0], labels=df.attrs['labels'])
    assert np.unique(m.array).tolist()==list(range(8))
    assert load_cohort(tmp_path, 'mmwhs', modality='mr').scan.tolist()==['mr_train_1001']

def test_mmwhs_of_the_other_modality(tmp_path):
    put(tmp_path, 'mr_train_1001_image.nii.gz')
    with pytest.raises(CohortError, match="no scans of the modality 'ct' among its 1 files of MM-WHS: choose"):
        load_cohort(tmp_path)
    with pytest.raises(CohortError, match="modality='MR': expected 'ct' or 'mr'"): load_cohort(tmp_path, modality='MR')

def left_out(folder, **options):
    "What a prediction says of scans that the layout of a folder leaves out, and the names of those that it takes"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        df = Reading(**options).load_any(folder)
    return [str(o.message) for o in said if 'leaves out' in str(o.message)], df.scan.tolist()

@pytest.mark.parametrize('layout, names, lost', [
    ('promise12', ('Case00.mhd','Case00_segmentation.mhd','anna.nii.gz','ben.nii.gz'), 'anna.nii.gz'),
    ('folder', ('images/a.nii.gz','b.nii.gz','sub/c.nii.gz'), 'b.nii.gz'),
    ('mmwhs', ('ct_train_1_image.nii.gz','mr_train_2_image.nii.gz','mr_train_3_image.nii.gz'),
     'mr_train_2_image.nii.gz')])
def test_a_prediction_says_which_scans_a_layout_leaves_out(layout, names, lost, tmp_path, capsys):
    for o in names: put(tmp_path, o)
    said,taken = left_out(tmp_path)
    assert len(said)==len(taken)==1
    assert said[0].startswith(f"{tmp_path}: was read as the layout '{layout}', which leaves out 2 of the scans in it, "
                              f'for example {lost}.')
    assert ('layout=folder' in said[0])==(layout!='folder')
    if layout!='folder':
        said,taken = left_out(tmp_path, layout='folder')
        assert not said and len(taken)==3

def test_a_prediction_does_not_miss_masks_and_what_is_no_scan(tmp_path, capsys):
    heart,lung,both = tmp_path/'heart',tmp_path/'lung',tmp_path/'both'
    put(heart/'patient001', 'patient001_frame01.nii.gz', 'patient001_frame01_gt.nii.gz')
    put(heart/'patient001', 'patient001_4d.nii.gz')
    put(lung, 'images/a.nii.gz', 'masks/a.nii.gz')
    for o in ('segmentations/a.nii.gz','masks_of_ben/a.nii.gz','a_seg.nii.gz'): put(lung, o)
    put(both, 'ct_train_1_image.nii.gz')
    put(both, 'mr_train_2_image.nii.gz', 'mr_train_2_label.nii.gz')
    assert left_out(heart)==([], ['patient001_frame01']) and left_out(lung)==([], ['a'])
    assert left_out(both, modality='ct')==([], ['ct_train_1']) and len(left_out(both)[0])==1

def test_folder(tmp_path, capsys):
    for i,s in enumerate(['P1_a','P1_b','P2_a']):
        put(tmp_path, f'images/{s}.nrrd', f'masks/{s}.nii.gz' if i else None, seed=i)
    df = load_cohort(tmp_path, subject=r'^(P\d)', classes=('background','organ'))
    assert ('folder: 3 scans of 2 subjects, 2 with masks (2 subjects); classes background, organ'
            in capsys.readouterr().out)
    assert df['mask'].isna().tolist()==[True,False,False] and all_read(df)
    assert load_cohort(tmp_path, 'folder', subject=lambda s: s[-1]).subject.tolist()==['a','b','a']
    with pytest.raises(CohortError, match=r"subject='\(X\)': does not match the scan 'P1_a'"):
        load_cohort(tmp_path, 'folder', subject='(X)')
    with pytest.raises(CohortError, match="the reader for 'folder' does not take this"):
        load_cohort(tmp_path, 'folder', colour=1)

def test_folder_with_suffixes_and_subfolders(tmp_path, capsys):
    for p in ('anna','bert'): put(tmp_path/p, 'scan_image.nii.gz', 'scan_label.nii.gz', seed=len(p))
    put(tmp_path/'carl', 'scan_image.nii.gz')
    df = load_cohort(tmp_path, subject=r'^[a-z]+')
    assert (df.attrs['layout']=='folder' and df.scan.tolist()==['anna_scan','bert_scan','carl_scan']
            and df.subject.tolist()==['anna','bert','carl'] and all_read(df))

def test_masks_beside_the_images_in_their_folder(tmp_path, capsys):
    for p in ('p1','q/p2'): put(tmp_path/'images', f'{p}.nii.gz', f'{p}_seg.nii.gz', seed=len(p))
    put(tmp_path/'images', 'p3.nii.gz', seed=3)
    df = load_cohort(tmp_path)
    assert df.scan.tolist()==['p1','p3','q_p2'] and df['mask'].notna().tolist()==[True,False,True] and all_read(df)
    assert 'folder: 3 scans of 3 subjects, 2 with masks (2 subjects)' in capsys.readouterr().out
    put(tmp_path/'images', 'p3_roi.nii.gz')
    assert 'p3_roi' in load_cohort(tmp_path).scan.tolist()
    one = load_cohort(tmp_path, 'folder', images='images', masks='images', mask_suffix='_roi')
    assert one.scan[one['mask'].notna()].tolist()==['p3'] and 'p1_seg' in one.scan.tolist()

def test_a_folder_for_masks_that_holds_none(tmp_path, capsys):
    "Is no reason to take the masks beside the images for images, unless it is named"
    for i in range(2): put(tmp_path/'images', f'p{i}.nii.gz', f'p{i}_seg.nii.gz', seed=i)
    (tmp_path/'masks').mkdir()
    (tmp_path/'masks'/'outcome.csv').write_text('x')
    df = load_cohort(tmp_path)
    assert df.scan.tolist()==['p0','p1'] and df['mask'].notna().all() and all_read(df)
    assert load_cohort(tmp_path, 'folder', masks='masks')['mask'].isna().tolist()==[True]*4
    for i in range(2): (tmp_path/'images'/f'p{i}_seg.nii.gz').rename(tmp_path/'images'/f'p{i}_b.nii.gz')
    put(tmp_path/'labels', 'p0.nii.gz')
    df = load_cohort(tmp_path)
    assert df['mask'].dropna().tolist()==[str(tmp_path/'labels'/'p0.nii.gz')] and len(df)==4

@pytest.mark.parametrize('named', [{}, dict(masks='labels'), dict(images='.', masks='labels')], ids=str)
def test_masks_in_a_folder_beside_images_that_have_none(named, tmp_path):
    for i in range(2): put(tmp_path, f'p{i}.nii.gz', f'labels/p{i}.nii.gz', seed=i)
    df = load_cohort(tmp_path, 'folder', **named)
    assert df.scan.tolist()==['p0','p1'] and all_read(df)
    assert df['mask'].tolist()==[str(tmp_path/f'labels/p{i}.nii.gz') for i in range(2)]

def test_several_folders_that_may_hold_the_masks(tmp_path):
    for o in ('segmentations','labels'): put(tmp_path, 'images/p0.nii.gz', f'{o}/p0.nii.gz')
    said = 'several folders may hold the masks: labels, segmentations; those in labels were taken. Name the right one'
    with pytest.warns(UserWarning, match=said): df = load_cohort(tmp_path)
    assert df['mask'].tolist()==[str(tmp_path/'labels/p0.nii.gz')]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        df = load_cohort(tmp_path, 'folder', masks='segmentations')
    assert df['mask'].tolist()==[str(tmp_path/'segmentations/p0.nii.gz')]

def test_several_folders_that_may_hold_the_images(tmp_path):
    (tmp_path/'images').mkdir() # holds none
    for o in ('scans','imagesTr'): put(tmp_path, f'{o}/p0.nii.gz', 'masks/p0.nii.gz')
    said = 'several folders may hold the images: scans, imagesTr; those in scans were taken. Name the right one with im'
    with pytest.warns(UserWarning, match=said): df = load_cohort(tmp_path)
    assert df.image.tolist()==[str(tmp_path/'scans/p0.nii.gz')] and df['mask'].notna().all()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        df = load_cohort(tmp_path, 'folder', images='imagesTr')
    assert df.image.tolist()==[str(tmp_path/'imagesTr/p0.nii.gz')]

def test_a_folder_of_images_inside_that_of_masks(tmp_path):
    for i in range(2): put(tmp_path, f'images/p{i}.nii.gz', f'p{i}_seg.nii.gz', seed=i)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        df = load_cohort(tmp_path, 'folder', masks='.')
    assert df.scan.tolist()==['p0','p1'] and df['mask'].notna().all() and all_read(df)

def test_names_that_several_scans_have():
    df = pd.DataFrame(dict(scan=['a','b','a','a','c']))
    with pytest.raises(ValueError, match=r'^scan: the cohort gives 1 name to several scans \(a\); expected unique'):
        check_each_once(df)
    with pytest.raises(ValueError, match=r'gives 2 names to several scans each \(a, b\)'):
        check_each_once(pd.concat([df, df[1:2]]))
    check_each_once(df[1:3])

def test_folder_names(tmp_path):
    put(tmp_path, 'mr/a_t1.mha', 'truth/a_roi.mha')
    put(tmp_path, 'mr/a_t2.mha', seed=1)
    put(tmp_path, 'mr/b_t1.mha', seed=2)
    df = load_cohort(tmp_path, 'folder', images='mr', masks='truth', image_suffix='_t1', mask_suffix='_roi')
    assert df.scan.tolist()==['a','b'] and df['mask'].notna().tolist()==[True,False]
    with pytest.raises(CohortError, match='wahrheit: is not a folder; expected the one with the masks'):
        load_cohort(tmp_path, 'folder', images='mr', masks='wahrheit')

@pytest.mark.parametrize('images, masks', [('Images','Masks'), ('IMAGES','Labels'), ('ImagesTr','LabelsTr')])
def test_folders_in_capitals(tmp_path, images, masks):
    put(tmp_path, f'{images}/a.nii.gz', f'{masks}/a.nii.gz')
    df = load_cohort(tmp_path)
    assert (df.attrs['layout'], df.scan.tolist(), df['mask'].notna().tolist())==('folder', ['a'], [True])

def test_dicom(tmp_path, capsys):
    vols = {p:image(i) for i,p in enumerate(['anna','bert','carl'])}
    write_series(tmp_path/'anna/study/T2', vols['anna'], '1.2.1')
    write_volume(mask_of(vols['anna']), tmp_path/'anna/study/seg.nii.gz')
    write_series(tmp_path/'bert/study/T2', vols['bert'], '1.2.2')
    write_volume(mask_of(vols['bert']), tmp_path/'masks/bert_study_T2.nii.gz')
    write_series(tmp_path/'carl/study/T2', vols['carl'], '1.2.3')
    df = load_cohort(tmp_path)
    assert 'dicom: 3 scans of 3 subjects, 2 with masks' in capsys.readouterr().out
    assert (df.subject.tolist()==['anna','bert','carl']
            and df.scan.tolist()==['anna_study_T2','bert_study_T2','carl_study_T2'])
    assert df['mask'].notna().tolist()==[True,True,False] and all_read(df)

def test_dicom_in_images_and_masks(tmp_path):
    for i,p in enumerate(['anna','bert']):
        write_series(tmp_path/'images'/p, image(i), f'1.2.{i}')
        write_volume(mask_of(image(i)), tmp_path/'masks'/f'{p}_seg.nii.gz')
    df = load_cohort(tmp_path)
    assert (df.attrs['layout']=='dicom' and df.subject.tolist()==['anna','bert']
            and df['mask'].notna().all() and all_read(df))

def test_dicom_behind_other_files_and_without_preamble(tmp_path):
    for i,p in enumerate(['anna','bert','carl']): write_series(tmp_path/p, image(i), f'1.2.{i}')
    for f in list((tmp_path/'bert').iterdir()): f.rename(f.parent/f'IM{f.stem}')
    for o in ('AUTORUN.INF','CHANGES','HELP'): (tmp_path/'bert'/o).write_text('x')
    for f in sorted((tmp_path/'carl').iterdir()):
        ds = pydicom.dcmread(f)
        del ds.file_meta
        ds.preamble = None
        with open(f.with_suffix(''), 'wb') as o:
            pydicom.filewriter.dcmwrite(o, ds, implicit_vr=ds.original_encoding[0], little_endian=True)
        f.unlink()
    df = load_cohort(tmp_path)
    assert df.attrs['layout']=='dicom' and df.scan.tolist()==['anna','bert','carl'] and all_read(df)

def test_a_mask_that_no_series_is_called_after_is_not_left_out_in_silence(tmp_path):
    for i,p in enumerate(['anna','bert']):
        write_series(tmp_path/'images'/p, image(i), f'1.2.{i}')
        write_volume(mask_of(image(i)), tmp_path/'masks'/f"{p.replace('bert', 'berta')}_seg.nii.gz")
    said = r'1 file belongs to no series and is left out: berta_seg.nii.gz. A mask is .* for example anna.nii.gz'
    with pytest.warns(UserWarning, match=said): df = load_cohort(tmp_path)
    assert df['mask'].notna().tolist()==[True,False]

def test_files_of_other_kinds_are_not_left_out_in_silence(tmp_path):
    put(tmp_path/'images', 'a.nii.gz'); put(tmp_path/'images', 'b.nii.gz', seed=1)
    nibabel.Nifti1Pair(np.zeros((4,4,4), np.int16), np.eye(4)).to_filename(tmp_path/'images'/'c.img')
    with pytest.warns(UserWarning, match=r'holds 2 files of a kind that cannot be read, for example .*c.hdr: convert '
                                         'them to .nii.gz, if they are scans or masks'): df = load_cohort(tmp_path)
    assert df.scan.tolist()==['a','b']
    for o in 'ab': (tmp_path/'images'/f'{o}.nii.gz').unlink()
    with pytest.raises(CohortError, match=r'(?s)no known layout.*Found images/ \(2 files of a kind .*c.hdr.*\). Name'):
        load_cohort(tmp_path)

def test_pictures_are_no_scans(tmp_path):
    (tmp_path/'images').mkdir()
    for o in 'ab': (tmp_path/'images'/f'{o}.PNG').write_bytes(b'picture')
    with pytest.raises(CohortError, match=r'(?s)no known layout.*Found images/ \(2 pictures, for example .*a.PNG, '
                                          r'without a size in mm: .*unlabeled=files\)'): load_cohort(tmp_path)

def test_deep_folders(tmp_path):
    deep = tmp_path/'images'/'archive/arc001/anna/session/SCANS/1/NIFTI'
    put(deep, 'a.nii.gz')
    assert all_read(load_cohort(tmp_path)) and len(load_cohort(tmp_path))==1
    put(deep/'b/c/d/e', 'e.nii.gz')
    put(tmp_path/'other/b/c/d/e/f/g/h/i/j/k', 'e.nii.gz')
    with pytest.warns(UserWarning, match='lies 10 folders below .*not looked into; start from one that is') as said:
        assert len(load_cohort(tmp_path))==1
    assert not [o for o in said if 'other' in str(o.message)] # one is enough

def test_csv_and_frame(tmp_path, monkeypatch):
    put(tmp_path/'sub', 'a.nii.gz', 'a_m.nii.gz'); put(tmp_path/'sub', 'b.nii.gz', seed=1)
    (tmp_path/'list.csv').write_text('image,mask,subject,age\n'
        f'sub/a.nii.gz,sub/a_m.nii.gz,007,61\n{tmp_path}/sub/b.nii.gz,,NA,\n')
    df = load_cohort(tmp_path/'list.csv', classes=['background','x'])
    assert (df.subject.tolist()==['007','NA'] and df.scan.tolist()==['a','b']
            and df['mask'][1] is None and df.age.tolist()==['61',None] and all_read(df))
    (tmp_path/'semi.csv').write_text('﻿image;mask\nsub/a.nii.gz;sub/a_m.nii.gz\n', encoding='utf-8')
    assert load_cohort(tmp_path/'semi.csv', 'csv')['mask'].notna().all()
    monkeypatch.chdir(tmp_path)
    assert all_read(load_cohort(pd.DataFrame(dict(image=['sub/a.nii.gz'], mask=[np.nan]))))
    (tmp_path/'bad.csv').write_text('picture,mask\na,b\n')
    with pytest.raises(CohortError, match='has no column `image`, only mask, picture'): load_cohort(tmp_path/'bad.csv')
    (tmp_path/'bad.csv').write_text('')
    with pytest.raises(CohortError, match='bad.csv: '): load_cohort(tmp_path/'bad.csv')
    (tmp_path/'twice.csv').write_text('image,scan\nsub/a.nii.gz,x\nsub/b.nii.gz,x\n')
    with pytest.raises(CohortError, match="1 scan name is given to several scans, "
                                          "for example 'x': .*a.nii.gz and .*b.nii.gz; give each"):
        load_cohort(tmp_path/'twice.csv')

def test_nothing_recognised(tmp_path):
    with pytest.raises(CohortError, match=r'root=None: expected a folder with scans, a \.csv file or a DataFrame; '
                                          'name where the scans are'):
        load_cohort(None)
    (tmp_path/'notes.txt').write_text('x')
    with pytest.raises(CohortError) as e: load_cohort(tmp_path)
    for o in ('msd','acdc','promise12','mmwhs','folder','dicom','csv'): assert f'\n- {o}: ' in str(e.value)
    assert 'Found notes.txt.' in str(e.value)

def test_symlink_loop_and_dead_links(tmp_path):
    put(tmp_path, 'images/a.nii.gz', 'masks/a.nii.gz')
    (tmp_path/'images/again').symlink_to(tmp_path)
    (tmp_path/'images/self.nii.gz').symlink_to(tmp_path/'images/self.nii.gz')
    (tmp_path/'images/dead.nii.gz').symlink_to('nowhere')
    df = load_cohort(tmp_path, 'folder')
    assert {'a','dead','self'}<={*df.scan} and len(df)<=4
    (tmp_path/'real').mkdir(); put(tmp_path/'real', 'images/b.nii.gz', 'masks/b.nii.gz'); (tmp_path/'linked').mkdir()
    (tmp_path/'linked/images').symlink_to(tmp_path/'real/images')
    (tmp_path/'linked/masks').symlink_to(tmp_path/'real/masks')
    assert load_cohort(tmp_path/'linked').scan.tolist()==['b']

def test_a_link_that_leads_nowhere_is_listed_and_refused_when_it_is_read(tmp_path):
    "As git-annex leaves them: an annotated scan must not become an unlabelled one, nor a scan vanish"
    put(tmp_path, 'images/a.nii.gz', 'masks/a.nii.gz'); put(tmp_path, 'images/b.nii.gz')
    (tmp_path/'masks/b.nii.gz').symlink_to('../.git/annex/b.nii.gz')
    (tmp_path/'images/c.nii.gz').symlink_to('../.git/annex/c.nii.gz')
    (tmp_path/'images/d.nii.gz').symlink_to('d.nii.gz')
    df = load_cohort(tmp_path, 'folder').set_index('scan')
    assert df.index.tolist()==list('abcd') and df['mask'].notna().tolist()==[True,True,False,False]
    for o in (df['mask']['b'], df.image['c']):
        with pytest.raises(VolumeError, match=f'{o}: does not exist; .* where a link leads'): read_volume(o)
    with pytest.raises(VolumeError, match='d.nii.gz: cannot be opened'): read_volume(df.image['d'])

def test_a_folder_that_cannot_be_opened_is_said(tmp_path, monkeypatch):
    for o in ('a','b'): put(tmp_path, f'images/{o}/x.nii.gz')
    scandir = os.scandir
    def refuse(d):
        if Path(d).name=='b': raise PermissionError(13, 'Permission denied')
        return scandir(d)
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.warns(UserWarning, match='images/b: cannot be opened .Permission denied., so that what is in it is'):
        assert load_cohort(tmp_path, 'folder').scan.tolist()==['a_x']

def test_lost_masks(tmp_path):
    put(tmp_path, 'images/a.nii.gz', 'masks/a.nii.gz'); put(tmp_path, 'masks/z.nii.gz')
    with pytest.warns(UserWarning, match='1 masks without an image are left out: z'): load_cohort(tmp_path, 'folder')

# ---- splits

def test_too_few_masks_to_split(tmp_path):
    for i in range(3): put(tmp_path/'images', f'{i}.nii.gz')
    asked = 'labeled=1, valid=2, test=10: '
    none = asked+r'none of the 3 scans of this cohort has a mask\. Expected '
    with pytest.raises(CohortError, match=none+r"a folder `images` \(and `masks`\).*"
                                               r"\(layout 'folder'\); put the masks there, or"):
        split_cohort(load_cohort(tmp_path), 1, 2, 10)
    with pytest.raises(CohortError, match=none+'names of files in the column `mask`;'):
        split_cohort(load_cohort(pd.DataFrame(dict(load_cohort(tmp_path)))), 1, 2, 10)
    masks = [str(tmp_path/'m'/f'{i}.nii.gz') for i in range(2)]
    with pytest.raises(CohortError, match=asked+'these are 13 subjects with masks, '
                                                'and there are 2 in this cohort; ask for fewer'):
        split_cohort(load_cohort(tmp_path).assign(mask=[*masks, None]), 1, 2, 10)
    with pytest.raises(CohortError, match='there is 1 subject with a mask in this cohort, and a split needs two'):
        split_cohort(load_cohort(tmp_path).assign(mask=[masks[0], None, None]), duplicates=False)

def ten(annotated, n=10):
    return pd.DataFrame([dict(subject=f's{i}', scan=f's{i}', image=f's{i}.nii',
                              mask=f'm{i}.nii' if i<annotated else None) for i in range(n)], dtype=object)

def test_labels_as_numpy_counts_them_can_be_saved(tmp_path):
    for o in ten(10).dropna()[['image','mask']].to_numpy().ravel(): (tmp_path/o).touch()
    for kind in (np.uint8, np.float32):
        labels = {v:i for i,v in enumerate(np.array([0,7,9], kind))}
        df = load_cohort(ten(10), labels=labels)
        assert df.attrs['labels']=={0:0, 7:1, 9:2}
        assert load_cohort(save_cohort(df, tmp_path/'a.csv')).attrs['labels']==df.attrs['labels']

def test_scans_that_are_the_same_may_be_in_another_table():
    s = split_cohort(ten(10), 1, 1, 1, duplicates=[('s0','x'),('x','y'),('s1','x','s2')], show=False)
    assert s.split[1]==s.split[2] and s.equals(split_cohort(ten(10), 1, 1, 1, duplicates=[('s1','s2')], show=False))

def test_a_table_with_tabs_and_the_numbers_of_its_rows(tmp_path):
    "Its header begins with a tab"
    df = ten(2)
    for o in [*df.image, *df['mask'].dropna()]: (tmp_path/o).touch()
    df.to_csv(tmp_path/'a.csv', sep='\t')
    found = load_cohort(tmp_path/'a.csv', 'csv')
    assert list(found)==['subject','scan','image','mask'] and found.scan.tolist()==df.scan.tolist()

@pytest.mark.parametrize('annotated,parts', [
    (2,(1,1,0)), (3,(2,1,0)), (4,(3,1,0)), (5,(4,1,0)), (8,(6,2,0)), (10,(6,2,2))])
def test_ten_scans_are_enough(annotated, parts, capsys):
    s = split_cohort(ten(annotated), duplicates=False)
    assert tuple((s.split==o).sum() for o in ('labeled','valid','test'))==parts
    assert set(s.scan[s.split=='unlabeled'])==set(s.scan[s['mask'].isna()])       # nothing annotated is left unused
    labeled,valid,test = parts
    assert capsys.readouterr().out==(f'split of {annotated} annotated subjects: '
                                     f'{labeled} labelled, {valid} for validation, {test} for test\n')
    assert split_cohort(ten(annotated), duplicates=False, show=False).equals(s) and not capsys.readouterr().out

def test_any_column_can_divide():
    df = ten(10).assign(unit=list('ab')*5, has=1)
    s = split_cohort(df, valid=2, test=2, stratify='unit', duplicates=False)
    assert s.groupby('split').unit.nunique().min()==2 and list(s.columns)==[*df.columns,'split']

def test_masks_that_are_not_used_are_said(capsys):
    split_cohort(ten(4), 1, 1, duplicates=False)
    assert '2 of 4 annotated subjects are used as unlabelled' in capsys.readouterr().out
    split_cohort(ten(4), 3, 1, 0, duplicates=False)
    assert not capsys.readouterr().out                                            # just what was asked for
    split_cohort(ten(4), scans=True, labeled=2, duplicates=False)
    assert '1 of 4 annotated scans is used as unlabelled' in capsys.readouterr().out

def test_some_parts_asked_for():
    def n(annotated, **kw):
        return split_cohort(ten(annotated, 30), duplicates=False, **kw).split.value_counts().to_dict()
    assert n(20, test=5)==dict(labeled=11, valid=4, test=5, unlabeled=10)
    assert n(20, valid=0)==dict(labeled=16, test=4, unlabeled=10)
    assert n(10, labeled=8)==dict(labeled=8, valid=2, unlabeled=20)
    assert n(10, labeled=9)==dict(labeled=9, valid=1, unlabeled=20)
    assert n(3, test=1)==dict(labeled=1, valid=1, test=1, unlabeled=27)
    with pytest.raises(CohortError, match='labeled=10, valid=1, test=0: '
                                          'these are 11 subjects with masks, and there are 10'):
        n(10, labeled=10)
    with pytest.raises(CohortError, match='labeled=all others, valid=1, test=2: '
                                          'these are 4 subjects with masks, and there are 3'):
        n(3, test=2)

@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0,2**31), n=st.integers(6,30), folds=st.integers(2,5), test=st.integers(0,2),
       scans=st.booleans(), stratify=st.sampled_from([None,'group']))
def test_laws_of_folds(seed, n, folds, test, scans, stratify):
    rng = np.random.default_rng(seed)
    df = table(n, rng)
    annotated = set(df.subject[df['mask'].notna()])
    ties = [tuple(rng.choice(df.scan, 2, replace=False))] if rng.random()<.5 else ()
    def split(fold, df=df, **kw):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return split_cohort(df, test=test, seed=seed, scans=scans, stratify=stratify, duplicates=ties,
                                folds=folds, fold=fold, show=False, **kw)
    if len(annotated)<folds+test+4: return
    parts = [split(k) for k in range(folds)]
    tests = [set(o.subject[o.split=='test']) for o in parts]
    assert all(o==tests[0] for o in tests) and len(tests[0])>=min(test, 1)
    valid = [s for o in parts for s in set(o.subject[o.split=='valid'])]
    assert len(valid)==len(set(valid)) and set(valid)==annotated-tests[0]         # everybody once
    for o in parts:
        part = o.drop_duplicates('subject').set_index('subject').split.replace('labeled','unlabeled')
        assert o.assign(split=o.split.replace('labeled','unlabeled')).groupby('subject').split.nunique().max()==1
        for x,y in ties:
            x,y = x.split('_')[0],y.split('_')[0]
            assert x not in part or y not in part or part[x]==part[y]
        assert set(o.subject[o.split=='labeled'])==annotated-set(o.subject[o.split.isin(['valid','test'])])
    if not scans and not ties:
        sizes = [o.subject[o.split=='valid'].nunique() for o in parts]
        assert max(sizes)-min(sizes)<=1
    other = split(1, df.sample(frac=1, random_state=seed%1000)).set_index('scan').split
    assert other.sort_index().equals(parts[1].set_index('scan').split.sort_index())
    assert split(0, labeled=1).query('split=="labeled"').subject.nunique()==1 or scans or ties

@pytest.mark.parametrize('kw,said', [
    (dict(folds=5), 'folds=5: expected a whole number from 2 to 4, as many as there are annotated subjects'),
    (dict(folds=1), 'folds=1: expected a whole'),
    (dict(folds=2.), r'folds=2\.0: expected a whole'),
    (dict(folds=True), 'folds=True: expected a whole'),
    (dict(folds=4, fold=4), 'fold=4: expected a whole number from 0 to 3'),
    (dict(fold=1), 'fold=1: which of how many'),
    (dict(folds=2, valid=1), 'with folds, one of them validates'),
    (dict(folds=2, test=4), 'needs at least 2 .* and there are 0'),
    (dict(folds=2, test=3), 'needs at least 2 annotated subjects to validate in turn, and there is 1'),
    (dict(folds=2, labeled=3), r'labeled=3, valid=2, test=0 \(folds=2\): these are 5')])
def test_folds_that_cannot_be(kw, said):
    with pytest.raises(CohortError, match=said): split_cohort(ten(4), duplicates=False, **kw)

def table(n, rng, labelled=.8):
    rows = []
    for i in range(n):
        for j in range(int(rng.integers(1,4))):
            rows.append(dict(subject=f's{i}', scan=f's{i}_{j}', image=f'/nowhere/s{i}_{j}.nii.gz',
                             mask=f'm{i}{j}' if rng.random()<labelled else None, group='AB'[i%2]))
    return pd.DataFrame(rows, dtype=object)

@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0,2**31), n=st.integers(3,30), scans=st.booleans(), stratify=st.sampled_from([None,'group']))
def test_split_laws(seed, n, scans, stratify):
    rng = np.random.default_rng(seed)
    df = table(n, rng)
    has = df[df['mask'].notna()]
    total = len(has) if scans else has.subject.nunique()
    if total<4: return
    test,valid = (int(rng.integers(0,(total-2)//2+1)) for _ in range(2))
    ties = [tuple(rng.choice(df.scan, 2, replace=False))] if rng.random()<.5 else ()
    def split(labeled, df=df):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return split_cohort(df, labeled, valid, test, seed=seed, scans=scans, stratify=stratify, duplicates=ties)
    try: a,b = split(1),split(2)
    except CohortError as e:
        assert 'are left for it' in str(e) and (scans or ties)          # whole people or ties had used them up
        return
    train = a.split.isin(['labeled','unlabeled'])
    assert not set(a.subject[train])&set(a.subject[~train])             # nobody straddles
    assert not set(a.subject[a.split=='valid'])&set(a.subject[a.split=='test'])
    assert a['mask'][a.split!='unlabeled'].notna().all()
    assert set(a.scan[a.split=='labeled'])<=set(b.scan[b.split=='labeled'])
    for o in ('valid','test'): assert a.scan[a.split==o].tolist()==b.scan[b.split==o].tolist()
    other = split(1, df.sample(frac=1, random_state=seed%1000)).set_index('scan').split
    assert other.sort_index().equals(a.set_index('scan').split.sort_index())
    part = a.drop_duplicates('subject').set_index('subject').split.replace('labeled','unlabeled')
    for x,y in ties: assert part[x.split('_')[0]]==part[y.split('_')[0]]
    if not scans and not ties:
        assert (a[a.split=='valid'].subject.nunique()==valid and a[a.split=='test'].subject.nunique()==test
                and a[a.split=='labeled'].subject.nunique()==1)

def test_growing_cohort_keeps_its_order():
    df = table(40, np.random.default_rng(0), 1)
    parts = lambda df: split_cohort(df, 5, 5, 5, duplicates=False).drop_duplicates('subject').set_index('subject').split
    a,b = parts(df[df.subject!='s7']),parts(df)
    assert (a!=b[a.index]).sum()<=3

def test_as_in_the_paper():
    "100 patients with two scans each: 8 labelled, 25 validation scans"
    df = pd.DataFrame([dict(subject=f'p{i}', scan=f'p{i}_{j}', image='x', mask='y')
                       for i in range(100) for j in (1,12)])
    n = split_cohort(df, labeled=8, valid=25, scans=True, duplicates=False).split.value_counts()
    assert n['labeled']==8 and n['valid'] in (24,26) and n.sum()==200

def test_seeds_differ():
    df = table(60, np.random.default_rng(0), 1)
    assert len({tuple(split_cohort(df, 8, 8, seed=s, duplicates=False).split) for s in range(20)})==20

def test_duplicates_like_acdc(tmp_path):
    acdc(tmp_path)
    for f in (1,12): # patient050 is patient001 with other masks and in another type
        v = read_volume(tmp_path/f'training/patient001/patient001_frame{f:02d}.nii.gz')
        write_volume(v.like(v.array.astype(np.float32)), tmp_path/f'training/patient050/patient050_frame{f:02d}.nii.gz')
        write_volume(v.like((v.array>400).astype(np.uint8)),
                     tmp_path/f'training/patient050/patient050_frame{f:02d}_gt.nii.gz')
    df = load_cohort(tmp_path)
    assert find_duplicates(df)==[('patient001_frame01','patient050_frame01'),
                                 ('patient001_frame12','patient050_frame12')]
    for seed in range(8):
        with pytest.warns(UserWarning, match='patient001_frame01 = patient050_frame01'):
            s = split_cohort(df, labeled=1, valid=1, seed=seed)
        assert s[s.subject.isin(['patient001','patient050'])].split.nunique()==1

@pytest.mark.parametrize('shape', [(4,10,12),(1,10,12)])
def test_duplicates_in_files_with_axes_of_length_1(shape, tmp_path):
    a = image(1, shape).array.T
    for name,o in dict(a=a, b=a[...,None], c=np.squeeze(a), d=a+1).items():
        nibabel.save(nibabel.Nifti1Image(o, np.eye(4)), tmp_path/f'{name}.nii.gz')
    df = pd.DataFrame([dict(subject=o, scan=o, image=str(tmp_path/f'{o}.nii.gz')) for o in 'abcd'])
    assert find_duplicates(df)==[('a','b','c')]

def test_duplicates_survive_bad_files(tmp_path):
    for i in range(3): put(tmp_path, f'images/{i}.nii.gz', f'masks/{i}.nii.gz', seed=5)
    f = tmp_path/'images/1.nii.gz'; f.write_bytes(f.read_bytes()[:200])
    assert find_duplicates(load_cohort(tmp_path, 'folder'))==[('0','2')]

def test_saved_split(tmp_path):
    root = acdc(tmp_path/'Daten Ä')
    s = split_cohort(load_cohort(root), labeled=1, valid=1)
    s.attrs['labels'] = {7:1}
    save_cohort(s, root/'split.csv')
    moved = root.rename(tmp_path/'moved')
    back = load_cohort(moved/'split.csv', 'csv')
    assert (back.drop(columns=['image','mask']).equals(s.drop(columns=['image','mask']).astype(object))
            and all(Path(o).exists() for o in [*back.image,*back['mask']]))
    assert back.attrs['classes']==s.attrs['classes'] and back.attrs['labels']=={7:1}

# ---- one bad scan among many

@pytest.mark.parametrize('workers', [0,2])
def test_check_cohort(workers, tmp_path, capfd):
    for i in range(8): put(tmp_path, f'images/s{i}.nii.gz', f'masks/s{i}.nii.gz', seed=i)
    (tmp_path/'images/s1.nii.gz').write_bytes(b'')
    write_volume(Volume(np.zeros((4,10,13),np.uint8)), tmp_path/'masks/s2.nii.gz')
    write_volume(image(3).like(np.full((4,10,12),9,np.uint8)), tmp_path/'masks/s3.nii.gz')
    for i in (4,5,6): odd_sform(tmp_path/f'images/s{i}.nii.gz', i); (tmp_path/f'masks/s{i}.nii.gz').unlink()
    df = load_cohort(tmp_path, 'folder', classes=('background','x'))
    bad = check_cohort(df, workers=workers)
    err = bad[bad.level=='error'].set_index('scan').problem
    assert (set(err.index)=={'s1','s2','s3'} and 's1.nii.gz: is empty' in err['s1']
            and 'has (4, 10, 13) voxels' in err['s2'] and 'holds the value 9' in err['s3'])
    out,stderr = capfd.readouterr()
    assert ('8 scans, 3 of them cannot be used' in out
            and re.search('3 files, for example [^:]+: has a qform and an sform that differ', out)
            and 'WARNING' not in stderr+out)

# ---- real scans

def test_real_hippocampus():
    root = os.environ.get('FASTMISEG_DATA')
    if not root or not Path(root).is_dir():
        pytest.skip('set FASTMISEG_DATA to the folder of MSD Task04_Hippocampus to run this')
    df = load_cohort(root)
    if df.attrs['classes']!=('background','Anterior','Posterior'): pytest.skip(f'{root} is not MSD Task04_Hippocampus')
    assert (len(df), df.subject.nunique(), df['mask'].notna().sum())==(260, 170, 260)
    assert len(check_cohort(df, show=False).query('level=="error"'))==0
    s = split_cohort(df, labeled=8, valid=25, test=25)
    assert s.groupby('subject').split.nunique().max()==1

# -- many scans --------------------------------------------------------------------------------------------------------

def _empty(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()

def _many(root, layout, i):
    "Files of the scan number `i`, with its mask"
    if layout=='dicom':
        write_series(root/f'p{i}/study/T2', image(0, (2,4,4)), f'1.2.{i}')
        _empty(root/f'masks/p{i}_study_T2.nii.gz')
    names = dict(folder=('images/p{}.nii', 'masks/p{}.nii'), nnunet=('imagesTr/p{}_0000.nii.gz', 'labelsTr/p{}.nii.gz'),
                 acdc=('p/patient{}_frame01.nii', 'p/patient{}_frame01_gt.nii'),
                 bids=('sub-{0}/anat/sub-{0}_T1w.nii', 'derivatives/m/sub-{0}/anat/sub-{0}_dseg.nii'))
    for o in names.get(layout, ()): _empty(root/o.format(i))

def _calls(f):
    "How many functions are called"
    n = 0
    def count(frame, event, arg):
        nonlocal n
        n += event in ('call','c_call')
    sys.setprofile(count)
    try: f()
    finally: sys.setprofile(None)
    return n

@pytest.mark.parametrize('layout', ['folder','dicom','bids','nnunet','acdc'])
def test_the_work_for_a_scan_does_not_grow_with_their_number(tmp_path, layout):
    (tmp_path/'dataset.json').write_text(json.dumps(dict(labels=dict(background=0, a=1), file_ending='.nii.gz')))
    counts = []
    for k in range(4):
        for i in range(30*k, 30*(k+1)): _many(tmp_path, layout, 1000+i)
        if k: counts.append(_calls(lambda: load_cohort(tmp_path, layout)))
        else: assert len(load_cohort(tmp_path, layout))==30
    a,b,c = counts
    assert c-b<1.1*(b-a)

def test_of_a_series_one_header_is_read_to_find_it(tmp_path, monkeypatch):
    for i in range(3): write_series(tmp_path/f'p{i}', image(i), f'1.2.{i}')
    read,own = [],pydicom.dcmread
    monkeypatch.setattr(pydicom, 'dcmread', lambda path, **kw: (read.append(path), own(path, **kw))[1])
    load_cohort(tmp_path)
    assert len(read)==3

def test_that_many_scans_are_read_before_they_are_split_is_said(tmp_path, capsys):
    for i in range(100): put(tmp_path/'images', f'{i}.nii', seed=i, shape=(2,3,4))
    for i in range(4): write_volume(mask_of(image(i, (2,3,4))), tmp_path/f'masks/{i}.nii')
    df = load_cohort(tmp_path)
    for n,said in ((99,False), (100,True)):
        split_cohort(df[:n])
        out = capsys.readouterr().out
        assert ('reading 100 scans that are as large as others' in out and '100/100' in out)==said
    split_cohort(df, show=False)
    assert not capsys.readouterr().out

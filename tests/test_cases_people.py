"""People, what comes back, other systems, and files of ours that get damaged: every kind of fault, with inputs that the
test writes itself"""
import errno, json, os, pickle, subprocess, sys, unicodedata, warnings
from dataclasses import replace
from pathlib import Path

import nibabel as nib, numpy as np, pandas as pd, pytest, torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastmiseg.scan_by_scan as E, fastmiseg.inference as I, fastmiseg.segmenter as S, fastmiseg.scans.prepared as P
from fastmiseg.data import MISegDataLoaders
from fastmiseg.files import WriteError, read_json, whole_file, write_text
from fastmiseg.evaluation import evaluate_cohort, predict_cohort
from fastmiseg.inference import predict_volume
from fastmiseg.models import create_unet
from fastmiseg.segmenter import Segmenter, SegmenterError, export_segmenter, load_segmenter
from fastmiseg.scans.cohort import (CohortError, CohortWarning, load_cohort, related, save_cohort, short_digest,
                                    voxel_digest)
from fastmiseg.scans.profile import scan_profile, summarise_profiles
from fastmiseg.scans.split import advice
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.store import SliceStore
from fastmiseg.scans.messages import VolumeError, VolumeWarning
from fastmiseg.scans.volume import Volume, read_volume, write_volume

def put(path, a, spacing=(5.,2.,2.)):
    "An array (z,y,x) as a NIfTI file, written by nibabel"
    path = Path(path); path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(a).transpose(2,1,0), np.diag([-spacing[2],-spacing[1],spacing[0],1])), path)
    return str(path)

def square(seed=0, n=48, at=(18,18), side=12, gain=1., offset=0., values=(0,1)):
    "A noisy image with a bright square, and its mask"
    rng,m = np.random.default_rng(seed),np.zeros((3,n,n), np.int16)
    m[:,at[0]:at[0]+side,at[1]:at[1]+side] = values[1]
    return ((100+80*(m>0)+8*rng.normal(size=m.shape))*gain+offset).astype(np.float32), m

def cohort(root, names, split=None, **kw):
    rows = []
    for i,s in enumerate(names):
        x,m = square(i, **kw)
        rows.append(dict(subject=s, scan=s, image=put(root/f'{s}.nii.gz', x), mask=put(root/f'{s}_mask.nii.gz', m)))
    df = pd.DataFrame(rows, dtype=object)
    return df if split is None else df.assign(split=split)

class Threshold(torch.nn.Module):
    "Foreground where the slice is bright: a network that needs no training"
    def __init__(self, classes=2):
        super().__init__()
        self.w,self.n,self.seen = torch.nn.Parameter(torch.tensor(40.)),classes,[]
    def forward(self, x):
        self.seen.append(tuple(x.shape))
        z = self.w*(x[:,:1]-.55)
        return torch.cat([-z, z, *[-z-50]*(self.n-2)], 1)

def bright(recipe, training=None):
    return Segmenter(Threshold(len(recipe.classes)), recipe,
                     dict(arch=dict(arch='threshold'), training=training or {}, provenance={}))
recipe = Recipe(spacing=2., size=48)

# -- people ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('subjects,parts,say', [
    ('A A B', 'labeled valid labeled',
     r'1 subject is in several parts, for example A: training \(a\), validation \(b\)'),
    ('A A A', 'unlabeled valid test', r'for example A: training \(a\), validation \(b\), test \(c\)'),
    ('A B B', 'labeled valid test', r'for example B: validation \(b\), test \(c\)')])
def test_a_subject_in_several_parts(tmp_path, subjects, parts, say):
    df = cohort(tmp_path, 'abc').assign(subject=subjects.split(), split=parts.split())
    df.to_csv(tmp_path/'c.csv', index=False)
    for o in (df, tmp_path/'c.csv'):
        with pytest.raises(CohortError, match=say): load_cohort(o)
    if {'labeled','valid'}<=set(parts.split()): # a table that never went through load_cohort
        with pytest.raises(CohortError, match='several parts'):
            MISegDataLoaders.from_cohort(df, recipe, store=tmp_path/'s', workers=0)
    meant = load_cohort(tmp_path/'c.csv', straddle=True)
    assert load_cohort(save_cohort(meant, tmp_path/'d.csv')).split.tolist()==parts.split() # it is remembered

def test_a_subject_may_be_labelled_and_unlabelled(tmp_path):
    df = cohort(tmp_path, 'abc').assign(subject=['A','A','B'], split=['labeled','unlabeled','valid'])
    assert load_cohort(df).split.tolist()==['labeled','unlabeled','valid']

@pytest.mark.parametrize('how', ['same file', 'link', 'other format', 'other type'])
def test_duplicates_in_several_parts(tmp_path, how):
    df = cohort(tmp_path, 'abcd', ['labeled','labeled','valid','test'])
    a = read_volume(df.image[0])
    if how=='same file': df.loc[2,'image'] = df.image[0]
    if how=='link': os.remove(df.image[2]); os.symlink(df.image[0], df.image[2])
    if how=='other format': df.loc[2,'image'] = str(write_volume(a, tmp_path/'c.mha'))
    if how=='other type': write_volume(a.like(a.array.astype(np.float64)), df.image[2])
    def go(df): return SliceStore(tmp_path/'s', recipe).prepare(load_cohort(df), workers=0, progress=False)
    with pytest.raises(CohortError, match='1 image is .*several parts.*straddle=True'): go(df)
    straddling = load_cohort(df, straddle=True)
    assert len(SliceStore(tmp_path/'s', recipe).prepare(straddling, workers=0, progress=False).scans)==4
    with pytest.raises(CohortError): go(df) # prepared already: it is said again

@pytest.mark.parametrize('value', ['train', '', None, 'Validation'])
def test_values_of_a_split(tmp_path, value):
    df = cohort(tmp_path, 'ab')
    with pytest.raises(CohortError, match=r"split: that of the scan 'b' is .* "
                                          'expected one of labeled, unlabeled, valid, test'):
        load_cohort(df.assign(split=['labeled',value]))
    assert load_cohort(df.assign(split=[' Labeled','VALID '])).split.tolist()==['labeled','valid']

@pytest.mark.parametrize('names,groups', [
    (['anna_ct1','anna_ct2','bert_ct1'], ['anna','anna','bert']),
    (['subj00_a','subj00_b','subj01_a'], ['subj00','subj00','subj01']),
    (['anna/visit1','anna/visit2','bert/visit1'], ['anna','anna','bert']),
    (['Jörg-2020','Jörg-2021','Åsa-2020'], ['Jörg','Jörg','Åsa']),
    (['p1a','p1b','p2a'], ['p1','p1','p2'])])
def test_names_that_share_a_stem(tmp_path, names, groups):
    for i,s in enumerate(names): put(tmp_path/'images'/f'{s}.nii.gz', square(i)[0])
    with pytest.warns(CohortWarning, match='may belong to fewer subjects.*give subject=') as said:
        df = load_cohort(tmp_path, 'folder')
    assert df.subject.tolist()==df.scan.tolist()
    pattern = eval(str(said[0].message).split('give subject=')[1].split(' (a regular')[0])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        norm = [unicodedata.normalize('NFC', o) for o in groups]
        assert sorted(load_cohort(tmp_path, 'folder', subject=pattern).subject)==sorted(norm)
        assert load_cohort(tmp_path, 'folder', subject=str).subject.tolist()==df.scan.tolist()
        assert load_cohort(tmp_path, 'folder', subject=lambda s: 'one').subject.nunique()==1

@pytest.mark.parametrize('names', [
    ['case1','case2','case3'], ['anna','bert'], [f'heart_{i:03d}' for i in range(9)], ['only']])
def test_names_that_share_nothing_that_matters(tmp_path, names): assert related(names) is None

def test_subject_in_every_layout(tmp_path):
    df = cohort(tmp_path, ['x1_a','x1_b','x2_a'])
    df.drop(columns='subject').to_csv(tmp_path/'c.csv', index=False)
    assert load_cohort(tmp_path/'c.csv', subject=r'(x\d)_').subject.tolist()==['x1','x1','x2']
    with pytest.raises(CohortError, match=r"subject='\(y\)': does not match the scan 'x1_a'"):
        load_cohort(tmp_path/'c.csv', subject='(y)')
    with pytest.raises(CohortError, match=r"subject='\(': is not a regular expression"):
        load_cohort(tmp_path/'c.csv', subject='(')

def test_everything_annotated_or_nothing_unlabelled(tmp_path, capsys):
    df = cohort(tmp_path, 'abcd')
    none = df.assign(split=['labeled','labeled','valid','test'])
    assert ("no scan is unlabeled: the methods 'partial' and 'full' need none" in advice(none)
            and "take the method 'full'" in advice(df.assign(split=['labeled','unlabeled','valid','test'])))
    assert advice(df.assign(split=['labeled','unlabeled','valid','test'],
                            mask=[df['mask'][0],None,*df['mask'][2:]])) is None
    SliceStore(tmp_path/'s', recipe).prepare(none, workers=0)
    said = capsys.readouterr().out
    assert said.index("methods 'partial'")<said.index('[') # before the slices are prepared

# -- what comes back ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('values,dtype', [
    ((0,3), np.uint8), ((0,850), np.uint16), ((0,70000), np.int32), ((0,-5), np.int8)])
def test_labels_come_back_as_masks_had_them(tmp_path, values, dtype):
    df = cohort(tmp_path, 'ab', ['labeled','valid'], values=(0,min(values[1],30000)))
    r = replace(recipe, labels={0:0, values[1]:1})
    seg = predict_volume(bright(r), df.image[0], out=tmp_path/'seg.nii.gz')
    back = nib.load(tmp_path/'seg.nii.gz')
    assert seg.array.dtype==dtype and set(np.unique(np.asarray(back.dataobj)))==set(values)
    assert np.array_equal(np.asarray(back.dataobj).transpose(2,1,0), seg.array)
    assert set(np.unique(predict_volume(bright(r), df.image[0], stored=False).array))=={0,1}

def test_labels_of_a_real_training_are_in_the_model_file(tmp_path):
    df = cohort(tmp_path, 'abc', ['labeled','labeled','valid'], values=(0,3))
    for o in df['mask'][:2]: # 1 and 3, nothing between
        m = read_volume(o); a = m.array.copy(); a[0,:4,:4] = 1; write_volume(m.like(a), o)
    from fastmiseg.learner import miseg_learner
    learn = miseg_learner(
        MISegDataLoaders.from_cohort(df, Recipe.auto(df), store=tmp_path/'s', workers=0, n_iters=1), width=2)
    seg = load_segmenter(export_segmenter(learn, tmp_path/'m.safetensors'), 'cpu')
    assert seg.recipe.labels=={0:0, 1:1, 3:2} and seg.recipe.stored==[0,1,3] and seg.about['training']['scans']==2
    assert set(np.unique(seg.predict(df.image[2]).array))<={0,1,3}
    assert len(evaluate_cohort(seg, df, split='all', progress=False))==6

@pytest.mark.parametrize('n,at', [(160,(24,24)), (160,(130,10)), ((96),(60,3))])
def test_a_larger_field_of_view(tmp_path, n, at):
    df = cohort(tmp_path, 'abc', ['labeled','labeled','valid'])
    known = SliceStore(tmp_path/'s', recipe).prepare(df, workers=0, progress=False).summary
    x,m = square(9, n=n, at=at)
    seg = bright(recipe, known)
    with pytest.warns(VolumeWarning, match=f'its field of view is {2*n} x {2*n} mm, '
                                           'that of the training scans at most 96 x 96 mm'):
        got = predict_volume(seg, put(tmp_path/'big.nii.gz', x), bs=2)
    assert (got.array>0).sum()>0 and ((got.array>0)==(m>0)).mean()>.999
    assert max(o[0] for o in seg.model.seen)<=2 and {o[2:] for o in seg.model.seen}=={(48,48)} # memory is bounded
    scores = evaluate_cohort(seg, pd.DataFrame([dict(subject='b', scan='b', image=str(tmp_path/'big.nii.gz'),
                                                     mask=put(tmp_path/'m.nii.gz', m))]), progress=False)
    assert scores.dice[0]>.97 and scores.outside[0]==1

def test_tiles_do_not_depend_on_the_batch_and_one_tile_is_as_before(tmp_path):
    vol = read_volume(put(tmp_path/'a.nii.gz', square(0, n=150, at=(5,90))[0]))
    torch.manual_seed(0)
    net = Segmenter(create_unet('unet', n_in=1, n_out=2, width=2).eval(), recipe,
                    dict(arch={}, training={}, provenance={}))
    for a in ('p','q'): predict_volume(net, vol, probabilities=tmp_path/f'{a}.nii.gz', bs=1 if a=='p' else 7)
    p,q = (read_volume(tmp_path/f'{a}.nii.gz', channels=True).array for a in 'pq')
    assert np.allclose(p, q, atol=1e-5) and np.allclose(p.sum(0), 1, atol=1e-4)
    small = read_volume(put(tmp_path/'b.nii.gz', square(0, n=48)[0]))
    x,where = recipe.slices(small)
    assert np.array_equal(predict_volume(net, small).array,
                          where.inverse(I._probabilities(net.model, x, 16, '')).argmax(0))

def test_preparing_says_what_the_slices_hold(tmp_path, capsys):
    df = (pd.concat([cohort(tmp_path, 'ab'), cohort(tmp_path, 'c', n=96, at=(0,0))], ignore_index=True)
            .assign(split=['labeled','valid','labeled']))
    with pytest.warns(VolumeWarning, match=r'cut off a part of what the mask shows \(100.0%\)'):
        store = SliceStore(tmp_path/'s', recipe).prepare(df, workers=0)
    assert ('slices hold 75% of the field of view (at least 25% of each scan), '
            'and 66.67% of what the masks show (1 masks are cut)' in capsys.readouterr().out)
    assert store.scans.share.tolist()==[1,1,.25] and store.scans.lost.tolist()==[0,0,store.scans.total[2]]

@pytest.mark.parametrize('kw,spacing,say', [
    (dict(), (3.,2.,2.), 'its slices are 3 mm apart, those of the training scans 5 mm'),
    (dict(), (5.,5.,2.), 'its rows are 5 mm apart'),
    (dict(gain=50), (5.,2.,2.), 'its intensities .* those of the training scans'),
    (dict(offset=4000), (5.,2.,2.), 'its intensities'),
    (dict(gain=-1), (5.,2.,2.), 'its intensities'),
    ('tilt', (5.,2.,2.), 'its (slices|rows) run 40 degrees away')])
def test_a_scan_far_from_the_training_scans(tmp_path, kw, spacing, say):
    df = cohort(tmp_path, 'abc', ['labeled','labeled','valid'])
    seg = bright(recipe, SliceStore(tmp_path/'s', recipe).prepare(df, workers=0, progress=False).summary)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        predict_volume(seg, df.image[2])
    vol = Volume(square(7, **({} if kw=='tilt' else kw))[0], spacing)
    if kw=='tilt': c,s = np.cos(np.radians(40)),np.sin(np.radians(40)); vol.direction = (1,0,0, 0,c,-s, 0,s,c)
    write_volume(vol, tmp_path/'far.nii.gz')
    with pytest.warns(VolumeWarning, match=say): predict_volume(seg, tmp_path/'far.nii.gz')
    with pytest.warns(VolumeWarning, match=say):
        predict_cohort(seg, [tmp_path/'far.nii.gz'], tmp_path/'out', progress=False)

# -- other systems -----------------------------------------------------------------------------------------------------
spawned = '''
import multiprocessing as mp, sys, warnings
warnings.filterwarnings('ignore')
import pandas as pd, torch
from fastmiseg.data import MISegDataLoaders
from fastmiseg.scans.recipe import Recipe
if __name__=='__main__':
    torch.set_num_threads(1)
    mp.set_start_method('spawn')
    df = pd.read_pickle(sys.argv[1])
    def batches(n):
        dls = MISegDataLoaders.from_cohort(df, Recipe(spacing=2., size=48), store=sys.argv[2], workers=0,
            num_workers=n, n_iters=2, bs=2, unlabeled_bs=2, augment=None, device='cpu')
        return list(dls.train)+[b for b in dls.valid]
    for a,b in zip(batches(0), batches(1)):
        assert (len(a)==len(b)
                and all(torch.equal(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x,y in zip(a, b)))
        if len(a)==2: assert torch.equal(a[1].scan, b[1].scan) and torch.equal(a[1].index, b[1].index)
    print('same')
'''
def test_spawned_workers(tmp_path):
    cohort(tmp_path, 'abcd', ['labeled','labeled','unlabeled','valid']).to_pickle(tmp_path/'df.pkl')
    (tmp_path/'go.py').write_text(spawned)
    res = subprocess.run([sys.executable, '-W', 'ignore', tmp_path/'go.py', tmp_path/'df.pkl', tmp_path/'s'],
                         capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert res.stdout.endswith('same\n'), res.stderr[-3000:]

def test_a_loader_can_be_pickled_while_it_runs(tmp_path):
    df = cohort(tmp_path, 'abcd', ['labeled','labeled','unlabeled','valid'])
    dls = MISegDataLoaders.from_cohort(df, recipe, store=tmp_path/'s', workers=0, n_iters=2, device='cpu')
    next(iter(dls.train))
    assert len(pickle.loads(pickle.dumps(dls.train)))==2

@pytest.mark.parametrize('text,encoding', [
    ('image,mask\nscans/ä.nii.gz,scans/ä_mask.nii.gz\n', 'utf-8'),
    ('image,mask\r\nscans\\ä.nii.gz,scans\\ä_mask.nii.gz\r\n', 'utf-8-sig'),
    ('Image; Mask\nscans\\ä.nii.gz ; scans\\ä_mask.nii.gz\n;\n', 'cp1252'),
    ('sep=;\r\nimage;mask\r\nscans/ä.nii.gz;scans/ä_mask.nii.gz\r\n', 'latin-1'),
    ('image\tmask\nscans/ä.nii.gz\tscans/ä_mask.nii.gz\n', 'utf-16'),
    ('"image", "mask"\n"scans/ä.nii.gz", "scans/ä_mask.nii.gz"\n', 'utf-8'),
    (unicodedata.normalize('NFD', 'image,mask\nscans/ä.nii.gz,scans/ä_mask.nii.gz\n'), 'utf-8')])
def test_tables_as_spreadsheets_write_them(tmp_path, text, encoding):
    x,m = square()
    put(tmp_path/'scans'/'ä.nii.gz', x); put(tmp_path/'scans'/'ä_mask.nii.gz', m)
    (tmp_path/'c.csv').write_bytes(text.encode(encoding))
    df = load_cohort(tmp_path/'c.csv')
    assert df.scan.tolist()==['ä'] and all(Path(o).is_file() for o in (df.image[0], df['mask'][0]))

@pytest.mark.parametrize('raw,say', [
    (b'PK\x03\x04more', 'is a workbook, not a text file; save it as CSV'),
    (b'image,mask\na,b,c,d\n', 'line 2 has 4 fields, but there are 2 columns'),
    (b'image,image\na,b\n', 'has 2 columns `image`; keep one'),
    (b'im\0age\n', 'holds zero bytes'),
    (b'file,mask\na,b\n', 'has no column `image`, only file, mask'),
    (b'image\nC:\\data\\a.nii.gz\n', 'is a path of a Windows computer'),
    (b'image\n\\\\server\\a.nii.gz\n', 'is a path of a Windows computer'),
    (b'image,mask\n', 'has no rows'),
    (b'# fastmiseg [1]\nimage\na\n', 'has a first line that is not what was written'),
    (b'# fastmiseg {"labels": 3}\nimage\na\n', 'its first line is not what was written')])
def test_tables_that_cannot_be_read(tmp_path, raw, say):
    (tmp_path/'c.csv').write_bytes(raw)
    with pytest.raises(CohortError, match=f'c.csv: .*{say}'): load_cohort(tmp_path/'c.csv')

@pytest.mark.parametrize('name', ['a\nb', 'a\rb', ' a', 'a ', 'a\x85b', 'a\udcff'])
def test_names_that_a_table_cannot_hold(tmp_path, name):
    df = cohort(tmp_path, ['x']).assign(scan=name)
    with pytest.raises(CohortError, match='d.csv: cannot hold the scan'): save_cohort(df, tmp_path/'d.csv')
    assert not (tmp_path/'d.csv').exists()

@pytest.mark.parametrize('name', ['心脏', 'سيف', 'Ελένη', 'a,b', 'a"b', "a'b", 'a;b', '#a', '🫀', 'NA', '007'])
def test_names_in_any_script(tmp_path, name):
    df = cohort(tmp_path, [name], ['labeled'])
    back = load_cohort(save_cohort(df, tmp_path/'d.csv'))
    assert back.scan.tolist()==[name] and back.image.tolist()==df.image.tolist()
    done = predict_cohort(bright(recipe), back, tmp_path/'out', progress=False)
    assert done.problem.tolist()==[None] and nib.load(done.out[0]).shape==(48,48,3)

@pytest.mark.parametrize('version', [1,2])
def test_nnunet(tmp_path, version):
    for i in range(2):
        x,m = square(i, values=(0,3))
        for c in range(2): put(tmp_path/'imagesTr'/f'a_{i:03d}_{c:04d}.nii.gz', x+c)
        put(tmp_path/'labelsTr'/f'a_{i:03d}.nii.gz', m)
    labels = {'background':0, 'vessel':1, 'liver':3} if version==2 else {'0':'background', '1':'vessel', '3':'liver'}
    (tmp_path/'dataset.json').write_text(json.dumps({
        ('channel_names' if version==2 else 'modality'):{'0':'T1','1':'T2'}, 'labels':labels, 'file_ending':'.nii.gz'}))
    with pytest.raises(CohortError, match=r'each scan has 2 channels .* 0 \(T1\), 1 \(T2\)'): load_cohort(tmp_path)
    df = load_cohort(tmp_path, channel='T2')
    assert (df.attrs['layout']=='nnunet' and df.scan.tolist()==['a_000','a_001']
            and all('_0001' in o for o in df.image) and df['mask'].notna().all())
    assert df.attrs['classes']==('background','vessel','liver') and df.attrs['labels']=={0:0, 1:1, 3:2}
    store = SliceStore(tmp_path/'s', Recipe.auto(df)).prepare(df, workers=0, progress=False)
    assert set(np.unique(store.mask('a_000', slice(None))))=={0,2}

@pytest.mark.parametrize('change,say', [
    (dict(labels={'background':0, 'all':[1,2]}), "the label 'all' is a region"),
    (dict(labels={'background':0, 'ignore':2}), 'a label `ignore`'),
    (dict(labels={'a':1}), 'has no background'),
    (dict(labels={'background':0, 'a':1, 'b':1}), 'gives one value to several names'),
    (dict(labels={'background':0, 'a':'x'}), 'expected a whole number'),
    (dict(file_ending='.png'), "its scans end in '.png'"),
    (dict(dataset={}), 'lists its files in `dataset`'),
    (dict(channel_names=[1]), 'its channels are')])
def test_nnunet_refused(tmp_path, change, say):
    put(tmp_path/'imagesTr'/'a_0000.nii.gz', square()[0])
    (tmp_path/'dataset.json').write_text(json.dumps(
        dict(channel_names={'0':'CT'}, labels={'background':0,'a':1}) | change))
    with pytest.raises(CohortError, match=say): load_cohort(tmp_path)

def test_a_decathlon_task_stays_one(tmp_path):
    for i in (1001,1002):
        put(tmp_path/'imagesTr'/f'case_{i}.nii.gz', square(i)[0])
        put(tmp_path/'labelsTr'/f'case_{i}.nii.gz', square(i)[1])
    (tmp_path/'dataset.json').write_text('{"modality":{"0":"CT"},"labels":{"0":"background","1":"a"}}')
    assert (load_cohort(tmp_path).attrs['layout']=='msd'
            and load_cohort(tmp_path).scan.tolist()==['case_1001','case_1002'])

def test_bids(tmp_path):
    for s,v in (('01','1'),('01','2'),('02','1')):
        x,m = square(int(s+v), values=(0,2))
        put(tmp_path/f'sub-{s}/ses-{v}/anat/sub-{s}_ses-{v}_T1w.nii.gz', x)
        put(tmp_path/f'sub-{s}/ses-{v}/anat/sub-{s}_ses-{v}_FLAIR.nii.gz', x)
        put(tmp_path/f'derivatives/manual/sub-{s}/ses-{v}/anat/sub-{s}_ses-{v}_space-orig_desc-x_dseg.nii.gz', m)
        put(tmp_path/f'derivatives/manual/sub-{s}/ses-{v}/anat/sub-{s}_ses-{v}_space-MNI_dseg.nii.gz', m)
    (tmp_path/'derivatives/manual/dseg.tsv').write_text('index\tname\n0\tair\n2\tlesion\n')
    with pytest.raises(CohortError, match=r"several kinds: .*choose one with suffix="): load_cohort(tmp_path)
    df = load_cohort(tmp_path, suffix='T1w')
    assert (df.attrs['layout']=='bids' and df.subject.tolist()==['sub-01','sub-01','sub-02']
            and df.session.tolist()==['1','2','1'])
    assert df['mask'].notna().all() and df.attrs['classes']==('air','lesion') and df.attrs['labels']=={0:0, 2:1}
    put(tmp_path/'derivatives/auto/sub-01/ses-1/sub-01_ses-1_mask.nii.gz', square()[1])
    with pytest.raises(CohortError, match='sub-01_ses-1_T1w.nii.gz: has 2 masks: .*choose with derivative='):
        load_cohort(tmp_path, suffix='T1w')
    assert (load_cohort(tmp_path, suffix='T1w', derivative='manual')['mask'].notna().all()
            and load_cohort(tmp_path, suffix='T1w', mask='desc-x')['mask'].notna().all())
    with pytest.raises(CohortError, match="suffix='T2w': no image ends in it"): load_cohort(tmp_path, suffix='T2w')
    with pytest.raises(CohortError, match='derivatives/none: is not a folder; there are auto, manual'):
        load_cohort(tmp_path, suffix='T1w', derivative='none')

# -- files of ours -----------------------------------------------------------------------------------------------------
def prepared(tmp_path): 
    df = cohort(tmp_path, 'abc', ['labeled','labeled','valid'])
    return df,SliceStore(tmp_path/'s', recipe).prepare(df, workers=0, progress=False)

@pytest.mark.parametrize('kind', ['image.npy','mask.npy','image.json','mask.json','index.json'])
@pytest.mark.parametrize('how', ['zeros','flip','cut'])
def test_damaged_slices_are_seen_and_made_anew(tmp_path, kind, how):
    df,store = prepared(tmp_path)
    want = {s:(store.image(s, slice(None)), store.mask(s, slice(None)), store.where(s)) for s in 'abc'}
    file = next(store.dir.glob(f'*{kind}'))
    raw = bytearray(file.read_bytes())
    if how=='zeros': raw[len(raw)//3:2*len(raw)//3] = bytes(2*len(raw)//3-len(raw)//3)
    if how=='flip': raw[len(raw)//2] ^= 4
    if how=='cut': raw = raw[:len(raw)//2]
    file.write_bytes(raw)
    def look(store): return {s:(store.image(s, slice(None)), store.mask(s, slice(None)), store.where(s)) for s in 'abc'}
    def same(got):
        return (all(np.array_equal(a, b) for s in want for a,b in zip(want[s][:2], got[s][:2]))
                and all(want[s][2]==got[s][2] for s in want))
    try: # seen at once, and made anew
        assert same(look(SliceStore(tmp_path/'s', recipe).prepare(df, workers=0, progress=False)))
    except VolumeError as e: assert 'gone or damaged' in str(e) and 'call `prepare` again' in str(e)
    else: return
    assert same(look(SliceStore(tmp_path/'s', recipe).prepare(df, workers=0, progress=False)))

def test_a_store_that_was_cut_under_a_running_process_is_no_bus_error(tmp_path):
    df,store = prepared(tmp_path)
    for o in store.dir.glob('*.image.npy'): os.truncate(o, 200)
    with pytest.raises(VolumeError, match='gone or damaged'): store.image('a', 0)

@pytest.mark.parametrize('lost', [False,True])
def test_a_store_for_reading(tmp_path, monkeypatch, lost):
    df,store = prepared(tmp_path)
    want = store.image('a', 1)
    if lost: (store.dir/'index.json').unlink() # then what is there is found by its content, and nothing needs writing
    else: df.image.map(os.utime)               # other times, the same bytes: as after a copy
    def refuse(path, **kw): raise WriteError(f'{path}: cannot be written (Read-only file system; 0 MB are free there)')
    monkeypatch.setattr(P, 'whole_file', refuse); monkeypatch.setattr(os, 'access', lambda path, mode: mode!=os.W_OK)
    again = SliceStore(tmp_path/'s', recipe).prepare(df, workers=0, progress=False).verify()
    assert np.array_equal(again.image('a', 1), want)
    with pytest.raises(OSError, match='the slice store cannot be written .*Read-only'):
        SliceStore(tmp_path/'s', recipe).prepare(pd.concat([df, cohort(tmp_path, 'z', ['test'], n=50)]),
                                                 workers=0, progress=False)

def untrained(**kw):
    class Learn:
        model,arch,recipe,cbs,dls = (create_unet(n_in=1, n_out=2, size=(48,48), **kw),
                                     dict(n_in=1, n_out=2, size=(48,48), **kw), recipe, [], None)
    return Learn()

@pytest.mark.parametrize('arch', [
    dict(arch='unet', width=512), dict(arch='dynamic_unet', width=512), dict(arch='torchvision.models.resnet152')])
def test_a_small_file_that_asks_for_a_large_network(tmp_path, arch):
    file = export_segmenter(untrained(arch='unet', width=2), tmp_path/'a.safetensors')
    with safe_open(file, 'pt') as f:
        about,tensors = json.loads(f.metadata()['fastmiseg']),{k:f.get_tensor(k) for k in f.keys()}
    about['arch'] = {**{k:v for k,v in about['arch'].items() if k!='width'}, **arch}
    text = json.dumps(about)
    save_file(tensors, file, metadata=dict(fastmiseg=text, checksum=S._sum_of(text, tensors)))
    code = '''
import resource, sys
from fastmiseg.segmenter import load_segmenter
from fastmiseg.files import digest
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: load_segmenter(sys.argv[1], 'cpu')
except Exception as e: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before, type(e).__name__, e)
'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, file], capture_output=True, text=True).stdout
    assert (int(out.split()[0])<200_000 and 'SegmenterError' in out
            and 'network needs' in out.replace('of its network', 'network needs')), out

@pytest.mark.parametrize('change,say', [
    (lambda a: a['recipe'].update(size=[10**6]*2), 'its recipe cannot be used .*size='),
    (lambda a: a['recipe'].update(percentiles='ab'), 'its recipe cannot be used'),
    (lambda a: a['arch'].update(size=[4096]*3), 'size=.* is not an argument'),
    (lambda a: a.update(training={'spacing':'x'}), 'what it says of the training scans'),
    (lambda a: a.update(provenance=eval('['*30+']'*30)), 'is nested more than 20 levels deep')])
def test_headers_of_models(tmp_path, change, say):
    file = export_segmenter(untrained(arch='unet', width=2), tmp_path/'a.safetensors')
    with safe_open(file, 'pt') as f:
        about,tensors = json.loads(f.metadata()['fastmiseg']),{k:f.get_tensor(k) for k in f.keys()}
    change(about)
    save_file(tensors, file, metadata=dict(fastmiseg=json.dumps(about), checksum=''))
    with pytest.raises(SegmenterError, match=say): load_segmenter(file, 'cpu')

def test_every_damaged_model_is_seen(tmp_path):
    file = export_segmenter(untrained(arch='unet', width=2), tmp_path/'a.safetensors')
    raw,rng = file.read_bytes(),np.random.default_rng(0)
    for _ in range(40):
        bad = bytearray(raw)
        bad[rng.integers(8, len(raw))] ^= 1<<rng.integers(8)
        file.write_bytes(bad)
        with pytest.raises(SegmenterError): load_segmenter(file, 'cpu')

@pytest.mark.parametrize('text,say', [
    ('['*10**5, 'too deeply|levels deep'), ('{"a":NaN}', 'holds NaN'), ('{"a":1,"a":2}', 'names one entry twice'),
    ('{', 'is not JSON'), (b'\xff\xfe\xff', 'is not UTF-8')])
def test_settings_files(tmp_path, text, say):
    (tmp_path/'r.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f'r.json: .*({say})'): read_json(tmp_path/'r.json')
    with pytest.raises(ValueError, match=say): Recipe.named(tmp_path/'r.json', None)

@pytest.mark.parametrize('text', [
    '[]', '3', '{"size": "abc"}', '{"size": [1e12, 5]}', '{"classes": "heart"}', '{"sizes": 3}',
    '{"spacing": [1, -1]}', '{"channels": true}', '{"labels": [1]}'])
def test_recipes_from_files(tmp_path, text):
    (tmp_path/'r.json').write_text(text)
    with pytest.raises(ValueError, match='r.json cannot be used .*(Recipe: |expected)'):
        Recipe.named(tmp_path/'r.json', None)

def test_a_pipe_as_settings(tmp_path):
    os.mkfifo(tmp_path/'r.json')
    with pytest.raises(ValueError, match='is not a regular file'): read_json(tmp_path/'r.json')
    os.mkfifo(tmp_path/'m.safetensors')
    with pytest.raises(SegmenterError, match='m.safetensors: cannot be opened .*pipe'):
        load_segmenter(tmp_path/'m.safetensors', 'cpu')

# -- predict and evaluate ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('what', ['predict','evaluate'])
def test_going_on_after_a_kill(tmp_path, monkeypatch, what):
    df,seg,out = cohort(tmp_path, 'abcde', ['valid']*5),bright(recipe),tmp_path/'out'
    def go(model=seg, **kw):
        if what=='predict': return predict_cohort(model, df, out, progress=False, **kw)
        return evaluate_cohort(model, df, progress=False, notes=tmp_path/'notes.jsonl', **kw)
    whole,read = go(overwrite=True),E.read_volume
    for o in (out.glob('*') if out.exists() else ()): o.unlink()
    n = [0]
    def killed(path, **kw):
        n[0] += path in set(df.image)
        if n[0]==4: raise KeyboardInterrupt
        return read(path, **kw)
    monkeypatch.setattr(E, 'read_volume', killed)
    with pytest.raises(KeyboardInterrupt): go()
    n[0] = 10; before = len(seg.model.seen)
    other = bright(recipe); other.model.w.data += 1
    with pytest.raises(FileExistsError, match='holds an unfinished run with another network or other settings'):
        go(other)
    got = go()
    assert n[0]==12 and len(seg.model.seen)==before+2 # only the two that were left
    pd.testing.assert_frame_equal(got, whole)
    assert [o.name for o in tmp_path.rglob('*.jsonl')]==(['.segmented.jsonl'] if what=='predict' else [])

def test_a_scan_that_changed_is_segmented_again(tmp_path):
    "Where a call was killed. What is finished may have been corrected by hand, and is not replaced unasked"
    df,seg,out = cohort(tmp_path, 'ab', ['valid']*2),bright(recipe),tmp_path/'out'
    predict_cohort(seg, df, out, progress=False)
    options = dict(what='predict', flips=False, largest=False, probabilities=False, uncertainty=False)
    notes = E._Notes(out/E.notes_name, E.identity_of(seg, recipe, **options), True)
    notes.begin()
    for r in df.itertuples(): notes.add(r.scan, looks=E._looks(r.image))
    put(df.image[1], square(7, at=(2,2))[0])
    assert predict_cohort(seg, df, out, progress=False).problem.isna().all()
    assert (read_volume(out/'b.nii.gz').array>0)[:,3:9,3:9].all()
    put(df.image[1], square(5, at=(2,2))[0])
    with pytest.raises(FileExistsError, match='b.nii.gz exists, but its scan has changed since; move it away'):
        predict_cohort(seg, df, out, progress=False)
    (out/'b.nii.gz').unlink()
    assert predict_cohort(seg, df, out, progress=False).attrs['kept']==1

def test_what_was_corrected_by_hand_outlives_a_killed_call(tmp_path, monkeypatch):
    "A finished prediction is called again for a new scan and killed, and then another scan changes"
    df,seg,out = cohort(tmp_path, 'abc', ['valid']*3),bright(recipe),tmp_path/'out'
    def go(rows=df, **kw): return predict_cohort(seg, rows, out, progress=False, **kw)
    go(df[:2])
    (out/'b.nii.gz').write_bytes(b'corrected')
    def killed(*args, **kw): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(E.ScanByScan, 'note', killed)
        with pytest.raises(KeyboardInterrupt): go()
    assert (out/'c.nii.gz').exists()
    put(df.image[1], square(7)[0])
    with pytest.raises(FileExistsError, match='b.nii.gz exists, but its scan has changed since; move it away'): go()
    assert (out/'b.nii.gz').read_bytes()==b'corrected'
    (out/'b.nii.gz').unlink()
    assert go().attrs['kept']==1 and go().attrs['kept']==3

def test_scans_of_other_calls_stay_with_theirs(tmp_path, monkeypatch):
    "Another part of the cohort, in the same folder, by a path from elsewhere"
    df,seg,out = cohort(tmp_path, 'ab', ['valid']*2),bright(recipe),tmp_path/'out'
    vol = read_volume(df.image[0])
    known = summarise_profiles([scan_profile(vol, recipe.place(vol))])
    seg.about['training'] = dict(known, voxels=[short_digest(voxel_digest(vol))])
    def go(*files, **kw): return predict_cohort(seg, files, out, progress=False, **kw).attrs
    assert go(df.image[0])['trained_on']==['a'] and go(df.image[1])['trained_on']==[]
    assert go(df.image[1], overwrite=True)['kept']==0
    monkeypatch.chdir(tmp_path)
    assert go('a.nii.gz', 'b.nii.gz')==dict(kept=2, trained_on=['a'])

def test_a_new_scan_of_a_known_subject(tmp_path):
    "It changes the limits of the others, whose segmentations are there"
    r = replace(recipe, per='subject')
    df,out = cohort(tmp_path, 'abc', ['valid']*3).assign(subject=list('xxy')),tmp_path/'out'
    def go(rows): return predict_cohort(bright(r), df.iloc[rows], out, progress=False)
    go([0,2])
    with pytest.raises(FileExistsError, match='a.nii.gz exists, but a scan of its subject has come or changed since'):
        go([0,1,2])
    (out/'a.nii.gz').unlink()
    assert go([0,1,2]).attrs['kept']==1

@pytest.mark.parametrize('where', ['read','network','room'])
def test_a_scan_too_large_for_memory_does_not_end_the_others(tmp_path, monkeypatch, where):
    df,seg = cohort(tmp_path, 'abc', ['valid']*3),bright(recipe)
    read,forward = E.read_volume,seg.model.forward
    def huge(path, **kw):
        if where=='read' and path==df.image[1]: raise MemoryError
        v = read(path, **kw)
        if where=='room' and path==df.image[1]: v.array = np.broadcast_to(np.float32(1), (200_000,4096,4096))
        return v
    def full(x):
        if where=='network' and len(seg.model.seen)==1:
            seg.model.seen.append(0)
            raise torch.OutOfMemoryError('CUDA out of memory')
        return forward(x)
    monkeypatch.setattr(E, 'read_volume', huge); monkeypatch.setattr(seg.model, 'forward', full)
    monkeypatch.setattr(I, 'scan_profile', lambda v, w: None); monkeypatch.setattr(I, 'how_far', lambda *a: [])
    done = predict_cohort(seg, df, tmp_path/'out', progress=False)
    assert (done.problem.notna().tolist()==[False,True,False] and 'memory' in done.problem[1]
            and 'b.nii.gz' in done.problem[1])
    seg.model.seen.clear()
    scores = evaluate_cohort(seg, df, skip_bad=True, progress=False)
    assert list(scores.attrs['problems'])==['b'] and len(scores)==2

@pytest.mark.parametrize('names,say', [
    (['a','a_probabilities'], "'a' and 'a_probabilities' would both be written to"),
    (['Anna','anna'], "'Anna' and 'anna' would both be written"),
    ([unicodedata.normalize('NFC','é'), unicodedata.normalize('NFD','é')], 'would both be written'),
    (['a','../b'], 'name the scans without slashes'), (['a','c\\b'], 'without slashes'),
    (['a','b\nc'], 'without line breaks'), (['a','b'*250], 'too long'), (['a','b\udcff'], 'not valid UTF-8')])
def test_names_that_cannot_be_files(tmp_path, names, say):
    df = cohort(tmp_path, 'xy', ['valid']*2).assign(scan=names)
    with pytest.raises(ValueError, match=say):
        predict_cohort(bright(recipe), df, tmp_path/'out', probabilities=True, progress=False)
    assert not (tmp_path/'out').exists()

def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*a): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    df,_ = prepared(tmp_path)
    write_text(tmp_path/'t.txt', 'old')
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(WriteError, match=r't.txt: cannot be written '
                                         r'\(No space left on device; \d+ MB are free there\)') as e:
        write_text(tmp_path/'t.txt', 'new')
    assert e.value.errno==errno.ENOSPC and (tmp_path/'t.txt').read_text()=='old'
    with pytest.raises(OSError, match='d.csv: cannot be written .No space'): save_cohort(df, tmp_path/'d.csv')
    with pytest.raises(SegmenterError, match='a.safetensors: cannot be written .No space'):
        export_segmenter(untrained(arch='unet', width=2), tmp_path/'a.safetensors')
    with pytest.raises(OSError, match='store cannot be written .*[.](txt|npy): cannot be written .No space'):
        SliceStore(tmp_path/'other', recipe).prepare(df, workers=0, progress=False)
    assert not [o for o in tmp_path.rglob('.*')]

def test_temporary_names_are_unique_and_fit(tmp_path):
    with whole_file(tmp_path/'a.txt') as a, whole_file(tmp_path/'a.txt') as b: 
        assert a!=b and a.suffix=='.txt'
        a.write_text('1'); b.write_text('2')
    assert (tmp_path/'a.txt').read_text()=='1' and len(os.listdir(tmp_path))==1
    write_text(tmp_path/('x'*250+'.txt'), 'long')

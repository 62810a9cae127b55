"""Further inputs of the kinds in test_cases_scans and test_cases_people, as archives, spreadsheets and other programs
write them"""
import gzip, json, shutil, unicodedata, warnings
from pathlib import Path

import nibabel, numpy as np, pandas as pd, pytest, SimpleITK as sitk
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from fastmiseg.scans.cohort import CohortError, CohortWarning, find_duplicates, load_cohort, related
from fastmiseg.scans.masks import read_mask
from fastmiseg.scans.messages import VolumeError
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.split import split_cohort
from fastmiseg.scans.store import SliceStore
from fastmiseg.scans.volume import Volume, read_volume, write_volume
from test_cases_people import cohort, put as put_nifti, square
from test_cases_scans import (check_places, dataset, item, multi, nii, patch, pixels, put, read, refused,
                              same_as_nibabel, series, steps, turned)

def told(f, category=UserWarning):
    "What comes back, and what was said"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        res = f()
    return res, '\n'.join(str(o.message) for o in w if issubclass(o.category, category))

# ---- DICOM: a series is one volume

def test_orientations_in_equal_numbers(tmp_path):
    series(tmp_path/'a', 6, each=lambda i: {'ImageOrientationPatient':[0,1,0,0,0,-1]} if i%2 else {})
    refused(tmp_path/'a', r'ImageOrientationPatient .* in 3 of its 6 slices: move the 3 that differ')
    for i,o in enumerate(([1,0,0,0,1,0],[0,1,0,0,0,-1],[1,0,0,0,0,-1])):
        put(tmp_path/'localizer'/f'{i}.dcm', pixels(i), ImageOrientationPatient=o)
    refused(tmp_path/'localizer', 'ImageOrientationPatient')

def test_directions_with_other_decimals_in_each_slice(tmp_path):
    o = np.array(turned(17))
    for i in range(6):
        put(tmp_path/f'{i}.dcm', pixels(i), ImageOrientationPatient=[f'{v:.{3+i%4}f}' for v in o],
            ImagePositionPatient=[f'{v:.4f}' for v in np.cross(o[:3], o[3:])*4*i])
    vol,said = read(tmp_path)
    assert (not said and np.allclose(steps(vol)[:,0], o[:3]*.75, atol=1e-6)
            and np.allclose(steps(vol)[:,1], o[3:]*1.5, atol=1e-5))
    check_places(vol, tmp_path.iterdir(), tol=5e-3)

def test_two_reconstructions_between_each_other(tmp_path):
    for i in range(5):
        for k,(kernel,z) in enumerate((('B30f',0.),('B70f',2.5))):
            put(tmp_path/f'{k}_{i}.dcm', pixels(10*k+i), ImagePositionPatient=[0,0,5*i+z], Modality='CT',
                ConvolutionKernel=kernel)
    refused(tmp_path, r'holds 2 volumes .* '
                      r'0: ConvolutionKernel B30f \(5 slices\); 1: ConvolutionKernel B70f \(5 slices\)')
    vol,_ = read(tmp_path, phase=1)
    assert vol.spacing[0]==5
    check_places(vol, tmp_path.glob('1_*'))

def test_two_patients_under_one_series(tmp_path):
    for i in range(4):
        for k,p in enumerate('AB'):
            put(tmp_path/f'{p}{i}.dcm', pixels(i), ImagePositionPatient=[0,0,16*k+4*i], PatientID=p)
    assert 'A0.dcm' in refused(tmp_path, r'B0.dcm: PatientID \(0010,0020\) is another one than in A0.dcm')

def test_series_without_their_uid(tmp_path):
    for i in range(4):
        for k,name in enumerate(('T1','T2')):
            put(tmp_path/f'{name}{i}.dcm', pixels(10*k+i), ImagePositionPatient=[0,0,4*k+8*i],
                SeriesInstanceUID=None, SeriesNumber=k+1, SeriesDescription=name)
    refused(tmp_path, 'holds 2 DICOM series, expected one')
    for k,name in enumerate(('T1','T2')):
        vol,_ = read(tmp_path, series=name)
        assert vol.spacing[0]==8
        check_places(vol, tmp_path.glob(f'{name}*'))

@pytest.mark.parametrize('tags, ok', [
    (dict(SpacingBetweenSlices=3, SliceThickness=3), False),
    (dict(SpacingBetweenSlices=-3, SliceThickness=2), False),
    (dict(SpacingBetweenSlices=1, SliceThickness=5), True),
    (dict(SpacingBetweenSlices=6, SliceThickness=3), True),
    (dict(SliceThickness=2), True)])
def test_slices_further_apart_than_they_say(tmp_path, tags, ok):
    vol,said = read(series(tmp_path, 4, step=6, **tags))
    assert vol.spacing[0]==6
    check_places(vol, tmp_path.iterdir())
    assert not said if ok else said==['has slices 6 mm apart, though SpacingBetweenSlices (0018,0088) is 3: '
                                      'were some left out? Their positions were taken']

@pytest.mark.parametrize('tag, values', [
    ('FlipAngle',[2,10,15]), ('InversionTime',[100,180,260]), ('KVP',[80,140,100]),
    ('DiffusionGradientOrientation',[[1.,0.,0.],[0.,1.,0.],[0.,0.,1.]])])
def test_what_tells_volumes_apart_is_named(tmp_path, tag, values):
    for p,v in enumerate(values):
        for i in range(3):
            put(tmp_path/f'{p}{i}.dcm', pixels(10*p+i), ImagePositionPatient=[0,0,4*i],
                InstanceNumber=3*p+i+1, **{tag:v})
    text = refused(tmp_path, 'holds 3 volumes')
    assert text.count(tag)==3
    for p in range(3): assert f'{p}: {tag} ' in text and len(read(tmp_path, phase=p)[0].array)==3

def test_a_slice_that_was_sent_again_with_other_pixels(tmp_path):
    series(tmp_path, each=lambda i: dict(InstanceNumber=i+1, ContentTime='101500'))
    put(tmp_path/'again.dcm', pixels(9), ImagePositionPatient=[-20,10,8], InstanceNumber=3, ContentTime='111500')
    refused(tmp_path, r'holds 2 volumes .* 0: ContentTime 101500 \(5 slices\); 1: ContentTime 111500 \(1 slice\)')
    assert read(tmp_path, phase=0)[0].array[2,0,0]==200

# ---- DICOM: values

def test_a_slope_that_some_slices_lack(tmp_path):
    slope = lambda i: dict(PixelValueTransformationSequence=[item(RescaleSlope=i+1.5, RescaleIntercept=0)])
    frames = [(pixels(i), [0,0,8*i], slope(i) if i!=2 else {}) for i in range(4)]
    multi(tmp_path/'a'/'m.dcm', frames)
    vol,said = read(tmp_path/'a')
    assert np.allclose(vol.array, [pixels(i)*(1 if i==2 else i+1.5) for i in range(4)])
    assert said==['has 1 of 4 slices without RescaleSlope (0028,1053), for example m.dcm, frame 3: '
                  'it was taken to be 1 there']
    # nothing follows from it
    assert not read(series(tmp_path/'b', each=lambda i: dict(RescaleSlope=1, RescaleIntercept=0) if i else {}))[1]

def test_slices_of_other_bits(tmp_path):
    series(tmp_path, 4)
    a = np.arange(20, dtype='u1').reshape(4,5)
    put(tmp_path/'s02.dcm', a, ImagePositionPatient=[-20,10,8], BitsAllocated=8, BitsStored=8, HighBit=7,
        PixelData=a.tobytes())
    vol,said = read(tmp_path)
    check_places(vol, tmp_path.iterdir())
    assert said==['has 1 of 4 slices of 8 bits, for example s02.dcm, among others of 16: '
                  'their values may be on another scale']

def test_inverted_values_with_a_slope_for_each_slice(tmp_path):
    series(tmp_path, 4, each=lambda i: dict(RescaleSlope=i+1, RescaleIntercept=0), BitsStored=12, HighBit=11,
           PhotometricInterpretation='MONOCHROME1')
    vol,said = read(tmp_path)
    check_places(vol, tmp_path.iterdir())
    assert 'its values are measured and were kept' in said[0]

@pytest.mark.parametrize('vr', ['SS','US'])
def test_padding_of_signed_pixels(tmp_path, vr):
    "The tag may be written as if it were unsigned; the values are as they are stored"
    for i in range(4):
        a = pixels(i).astype('i2')-300
        a[0,0] = -2000
        ds = dataset(a, ImagePositionPatient=[0,0,4*i], Modality='CT', RescaleSlope=1, RescaleIntercept=-24)
        ds.add_new(0x00280120, vr, -2000 if vr=='SS' else 63536)
        ds.save_as(tmp_path/f'{i}.dcm', enforce_file_format=True)
    vol,_ = read(tmp_path)
    check_places(vol, tmp_path.iterdir())
    assert (vol.array[:,0,0]==-2024).all()

def test_signed_among_unsigned_slices(tmp_path):
    series(tmp_path, 4)
    put(tmp_path/'s02.dcm', pixels(9).astype('i2')-950, ImagePositionPatient=[-20,10,8])
    vol,_ = read(tmp_path)
    check_places(vol, tmp_path.iterdir())
    assert vol.array.min()==-50

def test_planar_colours(tmp_path):
    series(tmp_path, 3, PhotometricInterpretation='RGB', SamplesPerPixel=3, PlanarConfiguration=1,
           BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=bytes(60))
    refused(tmp_path, 'is RGB, expected MONOCHROME1 or MONOCHROME2: colour images are not read')

# ---- DICOM: what is no image, and whose it is

seg,rtstruct,parametric = '1.2.840.10008.5.1.4.1.1.66.4','1.2.840.10008.5.1.4.1.1.481.3','1.2.840.10008.5.1.4.1.1.30'
bare = dict.fromkeys(('Rows','Columns','PixelData','ImagePositionPatient'))

@pytest.mark.parametrize('uid, kind, tags', [
    (seg,'Segmentation Storage',{}),
    (rtstruct,'RT Structure Set Storage',bare),
    (parametric,'Parametric Map Storage',bare)])
def test_a_folder_of_other_objects_is_named(tmp_path, uid, kind, tags):
    put(tmp_path/'x.dcm', pixels(), SOPClassUID=uid, **tags)
    refused(tmp_path, 'is a folder without DICOM files of images: '
                      f'it holds 1 other object, for example x.dcm, {kind}; give the folder of the series')

@pytest.mark.parametrize('uid, tags', [(seg,{}), (rtstruct,bare)])
def test_segmentations_as_dicom_are_not_left_out_in_silence(tmp_path, uid, tags):
    for p in ('anna','bert'):
        series(tmp_path/p/'ct')
        put(tmp_path/p/'contours'/'x.dcm', pixels(), SOPClassUID=uid, SeriesInstanceUID='1.2.9', **tags)
    df,said = told(lambda: load_cohort(tmp_path, 'dicom'))
    assert df.scan.tolist()==['anna_ct','bert_ct'] and df['mask'].isna().all()
    assert '2 DICOM segmentations cannot be read as masks and were left out' in said and 'convert them to NIfTI' in said

@pytest.mark.parametrize('syntax', [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize('uid, kind, tags', [
    (seg,'Segmentation Storage',{}), (rtstruct,'RT Structure Set Storage',bare)])
def test_a_segmentation_among_the_slices_is_named_at_once(tmp_path, uid, kind, tags, syntax):
    "When the cohort is loaded, before anything is prepared; and again when the series is read"
    for p in ('anna','bert'): series(tmp_path/p)
    put(tmp_path/'bert'/'z.dcm', pixels(), SOPClassUID=uid, SeriesInstanceUID='1.2.9', syntax=syntax, **tags)
    df,said = told(lambda: load_cohort(tmp_path, 'dicom'))
    assert (df['mask'].isna().all() and '1 DICOM segmentation cannot be read as a mask and was left out, '
            f'for example {tmp_path}/bert/z.dcm ({kind}); convert' in said)
    assert read(tmp_path/'bert')[1]==[f'has 1 object beside its slices that was left out, for example z.dcm, {kind}']

@pytest.mark.parametrize('layout', ['{}', '{}/series'])
def test_one_patient_in_several_folders(tmp_path, layout):
    for k,p in dict(ACC1='X1', ACC2='X2', ACC3='X1').items():
        series(tmp_path/layout.format(k), 2, PatientID=p, SeriesInstanceUID=f'1.2.{k[-1]}')
    df,said = told(lambda: load_cohort(tmp_path, 'dicom'))
    assert df.subject.tolist()==['ACC1','ACC2','ACC1'] # not called by their PatientID, which may be a name
    assert 'have the PatientID of another folder' in said and 'X1' not in said.replace(str(tmp_path), '')
    df,said = told(lambda: load_cohort(tmp_path, 'dicom', subject=r'ACC\d'))
    assert df.subject.tolist()==['ACC1','ACC2','ACC3'] and not said

def test_series_of_several_kinds_in_folders_of_their_own(tmp_path):
    "A T2 and an ADC map of each person: both are scans until somebody says which; then the others stay out"
    kinds = dict(T2='t2_tse_tra', ADC='ep2d_diff_ADC')
    for i,p in enumerate(('anna','bert','carl')):
        for j,(k,about) in enumerate(kinds.items()):
            if (p,k)!=('carl','T2'):
                series(tmp_path/p/k, 2, SeriesDescription=about, SeriesNumber=j+3, SeriesInstanceUID=f'1.2.{i+1}{j}')
    df,said = told(lambda: load_cohort(tmp_path, 'dicom'))
    assert len(df)==5 and ('2 people have series of several kinds, for example anna: ep2d_diff_ADC, t2_tse_tra; all '
                           'are taken. If one kind is wanted, give series=') in said
    for wanted in ('T2','t2_tse_tra',3):
        df,said = told(lambda: load_cohort(tmp_path, 'dicom', series=wanted))
        assert df.scan.tolist()==['anna_T2','bert_T2'] and all(read(o)[0].shape[0]==2 for o in df.image)
        assert (f'series={wanted!r} fits no series of 3 of the 5 folders, for example anna/ADC (ep2d_diff_ADC); they '
                'are left out') in said and 'several kinds' not in said
    with pytest.raises(CohortError, match=r"series='T1' fits .* no series, for example that in anna/ADC \(ep2d_diff"):
        load_cohort(tmp_path, 'dicom', series='T1')

def test_series_of_one_kind_in_other_capitals(tmp_path):
    for i,about in enumerate(('T2','t2')):
        series(tmp_path/'a'/str(i), 2, SeriesDescription=about, SeriesInstanceUID=f'1.{i}')
    assert not told(lambda: load_cohort(tmp_path, 'dicom'))[1]
    series(tmp_path/'a'/'2', 2, SeriesDescription='ADC', SeriesInstanceUID='1.2')
    assert 'one person has series of several kinds, for example a: ' in told(lambda: load_cohort(tmp_path, 'dicom'))[1]

@pytest.mark.parametrize('name', ['scans','SCANS','images'])
@pytest.mark.parametrize('mask', ['anna/mask.nii.gz','anna/session/anna_session.nii.gz'])
def test_series_and_their_masks_in_a_folder_called_images(tmp_path, name, mask):
    "The masks made it a folder of images in NIfTI, of which there were none, or these"
    for i,p in enumerate(('anna','bert')): series(tmp_path/name/p/'session', 2, SeriesInstanceUID=f'1.{i}')
    put_nifti(tmp_path/name/mask, square()[1])
    df = load_cohort(tmp_path)
    assert (df.attrs['layout'], df.scan.tolist())==('dicom', ['anna_session','bert_session'])
    assert df['mask'].tolist()==[str(tmp_path/name/mask), None]
    for o in ('images/b','masks/b'): put_nifti(tmp_path/f'{o}.nii.gz', square()[1])
    (tmp_path/name/mask).unlink()
    assert told(lambda: load_cohort(tmp_path))[0].scan.tolist()==['b']

def test_series_where_some_folders_hold_several(tmp_path):
    for i,p in enumerate(('anna','bert')):
        series(tmp_path/p, 2, SeriesDescription='t2_tse', SeriesInstanceUID=f'1.2.{i}')
    series(tmp_path/'bert', 3, prefix='adc', SeriesDescription='adc', SeriesInstanceUID='1.2.8')
    (tmp_path/'carl').mkdir()
    (tmp_path/'carl'/'a.dcm').write_bytes(b'no DICOM')
    df,said = told(lambda: load_cohort(tmp_path, 'dicom', series='t2'))
    assert df.scan.tolist()==['anna','bert','carl'] and not said # that of Carl is refused when it is read
    assert [read(o)[0].shape[0] for o in df.image[:2]]==[2,2]

def test_masks_of_series_that_are_left_out(tmp_path):
    "That of an ADC map became that of the T2, the only series that was left beside it"
    for i,p in enumerate(('anna','bert')):
        for j,k in enumerate(('T2','ADC')):
            series(tmp_path/p/k, 2, SeriesDescription=k, SeriesInstanceUID=f'1.2.{i+1}{j}')
    def masks(**kw):
        df,said = told(lambda: load_cohort(tmp_path, 'dicom', **kw))
        return {r.scan:r.mask and str(Path(r.mask).relative_to(tmp_path)) for r in df.itertuples()},said
    put_nifti(tmp_path/'anna'/'anna_ADC.nii.gz', square()[1])
    for o in (tmp_path/'masks'/'bert_ADC_seg.nii.gz', tmp_path/'anna'/'ADC'/'other.nii.gz'):
        put_nifti(o, square()[1])
        found,said = masks(series='T2')
        assert found==dict(anna_T2=None, bert_T2=None) and 'belong' not in said
        o.unlink()
    assert masks(series='ADC')[0]==dict(anna_ADC='anna/anna_ADC.nii.gz', bert_ADC=None)
    put_nifti(tmp_path/'bert'/'bert.nii.gz', square()[1])
    assert masks(series='T2')[0]==dict(anna_T2=None, bert_T2='bert/bert.nii.gz')

def test_an_archive_in_which_everybody_has_one_patient_id(tmp_path):
    for k in ('a','b','c'): series(tmp_path/k, 2, PatientID='ANONYMOUS', SeriesInstanceUID=f'1.2.{ord(k)}')
    df,said = told(lambda: load_cohort(tmp_path, 'dicom'))
    assert df.subject.tolist()==['a','b','c'] and not said

@pytest.mark.parametrize('orientation', [[1,0,0,0,1,0], [1,0,0,0,.8,.6]])
@pytest.mark.parametrize('jitter, ok', [(.01,True), (.015,True), (.04,False)])
def test_slices_that_are_a_little_off_their_places(tmp_path, orientation, jitter, ok):
    "Beside SimpleITK, which takes the mean of the distances"
    across = np.cross(orientation[:3], orientation[3:])
    off = jitter*np.array([0,1,-1,.5,-.5,1,-1,0])
    series(tmp_path, 8, ImageOrientationPatient=orientation,
           each=lambda i: {'ImagePositionPatient':[round(float(o),6) for o in across*3*(i+off[i])]})
    if not ok:
        assert ('or resample it first, for example with `dcm2niix`, whose file ends in _Eq' in
                refused(tmp_path, r'slices are 3(\.\d+)? mm apart, but \d.\d+ mm between s\d\d.dcm and s\d\d.dcm'))
        return
    vol,said = read(tmp_path)
    assert (len(said)==1 and 'mm apart, which were taken to be' in said[0]
            and 'no slice is moved by more than' in said[0])
    check_places(vol, sorted(tmp_path.iterdir()), tol=.025)
    r = sitk.ImageSeriesReader()
    r.SetFileNames([str(o) for o in sorted(tmp_path.iterdir())])
    assert np.allclose(vol.spacing[::-1], r.Execute().GetSpacing(), rtol=.005)

# ---- NIfTI, NRRD, MetaImage: geometry beside nibabel and SimpleITK

@pytest.mark.parametrize('degrees', [10,.3])
def test_forms_that_differ_by_a_turn(tmp_path, degrees):
    t,q = np.radians(degrees),np.diag([1,1,4,1.])
    s = q.copy(); s[:2,:2] = [[np.cos(t),-np.sin(t)],[np.sin(t),np.cos(t)]]
    im = nibabel.Nifti1Image(np.zeros((64,64,3),'i2'), None)
    im.header.set_zooms((1,1,4)); im.set_qform(q,1); im.set_sform(s,1); nibabel.save(im, tmp_path/'a.nii.gz')
    vol,said = read(tmp_path/'a.nii.gz')
    same_as_nibabel(vol, tmp_path/'a.nii.gz')
    assert len(said)==1 and 'has a qform and an sform that differ' in said[0]
    assert np.allclose(steps(read(tmp_path/'a.nii.gz', form='qform')[0]), np.diag([-1,-1,4]))

def test_a_sheared_sform_beside_a_qform(tmp_path):
    "As converters write a tilted gantry"
    a = np.arange(60,dtype='i2').reshape(3,4,5)
    f = patch(nii(tmp_path/'a.nii.gz', a, np.diag([1,1,3,1.]), lambda h: h.set_qform(np.diag([1,1,3,1.]),1)),
              srow_y=[0,1,.6,0], sform_code=1)
    vol,said = read(f)
    assert ('that differ by up to' in said[0]
            and np.allclose(vol.direction, sitk.ReadImage(str(f)).GetDirection(), atol=1e-6))
    refused(f, 'not perpendicular', form='sform')

@pytest.mark.parametrize('slope, inter', [(-2,5), (.5,-1024)])
@pytest.mark.parametrize('dtype', ['u1','i2'])
def test_scales_below_zero(tmp_path, slope, inter, dtype):
    f = patch(nii(tmp_path/'a.nii.gz', np.arange(60).reshape(3,4,5).astype(dtype)), scl_slope=slope, scl_inter=inter)
    same_as_nibabel(read(f)[0], f)

def test_complex_voxels_and_nifti_2(tmp_path):
    refused(nii(tmp_path/'a.nii.gz', np.ones((3,4,5),'c8')), 'voxels of a type that cannot be read')
    nibabel.save(nibabel.Nifti2Image(np.ones((3,4,5),'i2'), np.eye(4)), tmp_path/'b.nii.gz')
    refused(tmp_path/'b.nii.gz', 'is NIfTI-2')

nrrd_axes = ['(-1,0,0) (0,2,0) (0,0,3)', '(0,1,0) (0,0,2) (3,0,0)', '(1,0,0) (0,-2,0) (0,0,-3)']
@pytest.mark.parametrize('space', ['LPS','RAS','left-anterior-superior'])
@pytest.mark.parametrize('axes', nrrd_axes)
def test_nrrd_axes_in_any_order_and_direction(tmp_path, space, axes):
    a = np.arange(60,dtype='<i2').reshape(3,4,5)
    f = tmp_path/'a.nrrd'
    f.write_bytes('\n'.join(['NRRD0005','type: short','dimension: 3',f'space: {space}','sizes: 5 4 3',
                             f'space directions: {axes}','space origin: (1,2,3)',
                             'kinds: domain domain domain','centerings: cell cell cell',
                             'endian: little','encoding: raw','','']).encode()+a.tobytes())
    vol,said = read(f)
    signs = dict(LPS=(1,1,1), RAS=(-1,-1,1)).get(space, (1,-1,1)) # what the header says, by hand
    want = np.array([[float(o) for o in v.strip('()').split(',')] for v in axes.split()]).T
    assert (np.allclose(steps(vol), np.diag(signs)@want)
            and np.allclose(vol.origin, np.multiply(signs, (1,2,3))) and not said)
    assert np.array_equal(vol.array, a) and np.allclose(vol.direction, sitk.ReadImage(str(f)).GetDirection())

@pytest.mark.parametrize('keys, says', [
    (('TransformMatrix = 1 0 0 0 1 0 0 0 1','Offset = 7 8 9','Position = 1 1 1'),
     'Offset is .7 8 9., but Position, which means the same, is .1 1 1.'),
    (('TransformMatrix = 1 0 0 0 1 0 0 0 1','Orientation = 0 1 0 0 0 1 1 0 0','Offset = 7 8 9'),
     'TransformMatrix is .*, but Orientation'),
    (('TransformMatrix = 1 0 0 0 1 0 0 0 1','Offset = 7 8 9','ElementByteOrderMSB = True'),
     'BinaryDataByteOrderMSB is .*, but ElementByteOrderMSB'),
    (('Rotation = 1 0 0 0 1 0 0 0 1','TransformMatrix = 1 0 0 0 1.0 0 0 0 1','Origin = 7 8 9','Offset = 7.0 8 9',
      'ElementByteOrderMSB = false'), None)])
def test_meta_names_of_one_thing(tmp_path, keys, says):
    a,f = np.arange(60,dtype='<i2').reshape(3,4,5),tmp_path/'a.mha'
    f.write_bytes('\n'.join(['NDims = 3','BinaryData = True','BinaryDataByteOrderMSB = False',*keys,
                             'ElementSpacing = 1 2 3','ElementSize = 1 1 1','DimSize = 5 4 3',
                             'ElementType = MET_SHORT','ElementDataFile = LOCAL','']).encode()+a.tobytes())
    if says: refused(f, f'has a damaged header: {says}')
    else:
        vol,_ = read(f)
        im = sitk.ReadImage(str(f))
        assert (np.array_equal(vol.array, a) and vol.spacing==(3,2,1)==im.GetSpacing()[::-1]
                and vol.origin==(7,8,9)==im.GetOrigin())

@pytest.mark.parametrize('ext', ['.mhd','.nhdr'])
def test_a_header_that_was_copied_without_its_voxels(tmp_path, ext):
    for k in 'ab': write_volume(Volume(np.full((3,4,5), ord(k), 'i2')), tmp_path/f'{k}{ext}')
    assert not read(tmp_path/f'a{ext}')[1]
    shutil.copy(tmp_path/f'b{ext}', tmp_path/f'a{ext}')
    vol,said = read(tmp_path/f'a{ext}')
    assert (vol.array.max()==ord('b')
            and f'which are those of b{ext}: was its header copied or renamed without its voxels?' in said[0])
    (tmp_path/f'b{ext}').unlink() # a name of its own for the voxels is nothing odd
    assert not read(tmp_path/f'a{ext}')[1]

# ---- masks

@pytest.mark.parametrize('ext', ['.nii.gz','.nrrd'])
def test_masks_with_a_channel_for_each_class(tmp_path, ext):
    m = np.zeros((2,3,4,5),'u1'); m[1,1] = 1; m[0] = 1-m[1]
    write_volume(Volume(m), tmp_path/f'm{ext}')
    with pytest.raises(VolumeError, match=r'has 2 numbers in each voxel, expected one, that of its class; .*arg max'):
        read_mask(tmp_path/f'm{ext}')
    write_volume(Volume(m[1:]), tmp_path/f'one{ext}')
    assert np.array_equal(read_mask(tmp_path/f'one{ext}', classes=2).array, m[1])

@pytest.mark.parametrize('factor, ok', [(.999,True), (1.00001,True), (.98,True), (.5,False), (.8,False)])
def test_masks_of_nearly_whole_numbers(tmp_path, factor, ok):
    m = np.zeros((3,4,5),'f4'); m[1] = factor
    write_volume(Volume(m), tmp_path/'m.nii.gz')
    if ok: assert np.array_equal(read_mask(tmp_path/'m.nii.gz', classes=2).array, m>0)
    else:
        with pytest.raises(VolumeError, match='fractional values'): read_mask(tmp_path/'m.nii.gz', classes=2)

def test_a_mask_that_is_stored_mirrored(tmp_path):
    "At the same place in the patient, but not on the same grid: refused with the remedy, which is right"
    m = np.zeros((6,5,4),'u1'); m[0,1,2] = 1
    image = read_volume(nii(tmp_path/'x.nii.gz', np.ones((6,5,4),'i2')))
    A = np.diag([1.2,1.5,4,1])@np.array([[-1,0,0,5],[0,1,0,0],[0,0,1,0],[0,0,0,1]])
    nii(tmp_path/'m.nii.gz', m[::-1].copy(), A)
    with pytest.raises(VolumeError, match=r'they must lie on one grid: '
                                          r'resample the mask onto the image \(`resample\(mask'):
        read_mask(tmp_path/'m.nii.gz', image)
    from fastmiseg.scans.volume import resample
    assert np.array_equal(resample(read_volume(tmp_path/'m.nii.gz'), to=image, nearest=True).array.T, m)

def masks_of(tmp_path, *values):
    "A cohort with these values in its masks"
    rows = []
    for i,v in enumerate(values):
        x,m = square(i, values=(0,v[-1]))
        for k,o in enumerate(v): m[:,k,k] = o
        rows.append(dict(subject=str(i), scan=f's{i}', image=put_nifti(tmp_path/f'{i}.nii.gz', x),
                         mask=put_nifti(tmp_path/f'{i}m.nii.gz', m)))
    return pd.DataFrame(rows, dtype=object)

def test_one_structure_stored_in_two_ways(tmp_path):
    r,said = told(lambda: Recipe.auto(masks_of(tmp_path/'a', [1], [255])))
    assert (r.labels=={0:0, 1:1, 255:2} and 'no mask holds these values together: 1, 255;' in said
            and 'Recipe(labels={1: 1, 255: 1})' in said)
    for k,v in dict(b=([1,2],[2,3]), c=([1,2],[1],[2])).items():
        assert 'together' not in told(lambda: Recipe.auto(masks_of(tmp_path/k, *v)))[1]

def test_images_instead_of_masks(tmp_path):
    df = masks_of(tmp_path, [1], [1])
    x = read_volume(df.image[0])
    write_volume(x.like(np.rint(x.array).astype('i2')), df['mask'][0])
    _,said = told(lambda: Recipe.auto(df))
    assert 'values in the masks becomes a class' in said and f'{df["mask"][0]}: is it a mask?' in said
    write_volume(x.like(np.arange(x.array.size).reshape(x.shape).astype('i2')), df['mask'][0])
    with pytest.raises(ValueError, match='at most 256 classes can be told apart; .*0m.nii.gz: is it an image'):
        Recipe.auto(df)
    with pytest.raises(CohortError, match='0.nii.gz: is given as the mask of itself'):
        load_cohort(df.assign(mask=df.image))
    _,said = told(lambda: load_cohort(df.assign(mask=df['mask'][1])))
    assert '1 mask is given for scans of several subjects' in said and 'for s0 and s1' in said
    assert not told(lambda: load_cohort(df.assign(mask=df['mask'][1], subject='one')))[1] # two sequences of one person

# ---- people

@pytest.mark.parametrize('a, b', [
    ('P01','p01'), ('P01','P1'), ('007','7'),
    (unicodedata.normalize('NFC','Jörg'), unicodedata.normalize('NFD','Jörg')),
    ('P 1','P  1 '), ('sub-A','SUB-a'), (7.,'7'), (7,'007')])
def test_one_person_written_in_two_ways(tmp_path, a, b):
    df = cohort(tmp_path, 'abcd').assign(subject=[a,b,'Q','R'])
    with pytest.raises(CohortError, match='1 subject is in several parts'):
        told(lambda: load_cohort(df.assign(split=['labeled','valid','labeled','test'])))
    df,said = told(lambda: load_cohort(df))
    assert ('written in several ways' in said)==(df.subject.nunique()==4)
    for seed in range(6):
        s = split_cohort(df, labeled=1, valid=1, seed=seed, show=False)
        assert s['split'][0]==s['split'][1]

@pytest.mark.parametrize('names', [['1.01','1.1','1.10'], ['P10','P1','P100'], ['a1','a11'], ['10','1','100']])
def test_people_that_are_not_one(tmp_path, names):
    df = cohort(tmp_path, 'abc'[:len(names)]).assign(subject=names)
    df,said = told(lambda: load_cohort(df))
    assert df.subject.tolist()==names and not said

@pytest.mark.parametrize('column', ['patient_id','PatientID','Patient','subject_id','Subject ID','participant_id'])
def test_a_column_of_people_under_another_name(tmp_path, column):
    df = cohort(tmp_path, ['kfz','gmb','xyz']).drop(columns='subject')
    df[column] = ['007','007','8']
    df.to_csv(tmp_path/'c.csv', index=False)
    got,said = told(lambda: load_cohort(tmp_path/'c.csv'), CohortWarning)
    assert got.subject.tolist()==['007','007','8'] and f'was taken from `{column}`' in said
    got,said = told(lambda: load_cohort(tmp_path/'c.csv', subject=str))
    assert got.subject.tolist()==['kfz','gmb','xyz'] and not said

def test_people_that_are_missing(tmp_path):
    got,said = told(lambda: load_cohort(cohort(tmp_path, ['kfz','gmb','xyz']).assign(subject=[1.,1.,np.nan])))
    assert got.subject.tolist()==['1','1','xyz'] and '1 of 3 scans have no subject' in said

@pytest.mark.parametrize('nothing', ['NA','N/A','nan','NaN','None','null','-',' '])
def test_masks_that_are_none(tmp_path, nothing):
    df = cohort(tmp_path, ['kfz','gmb'])
    (tmp_path/'c.csv').write_text(f'image,mask,subject\n{df.image[0]},{df["mask"][0]},a\n{df.image[1]},{nothing},b\n')
    assert load_cohort(tmp_path/'c.csv')['mask'].tolist()==[df['mask'][0],None]
    if nothing=='NA': # unless a file is called so
        (tmp_path/'NA').touch()
        assert load_cohort(tmp_path/'c.csv')['mask'][1]==str(tmp_path/'NA')

@pytest.mark.parametrize('names, first, other', [
    (['visit1_anna','visit1_bert','visit2_anna','visit2_bert'], 'visit1_anna', 'visit2_anna'),
    (['left_anna','right_anna','left_bert'], 'left_anna', 'right_anna'),
    (['TCGA-02-0003_1996.06.08','TCGA-02-0003_1997.06.08','TCGA-02-0006_1996.08.23','TCGA-04-0009_1997.06.14'],
     'TCGA-02-0003_1996.06.08', 'TCGA-02-0003_1997.06.08'),
    (['site-2_anna_2020-01-02','site-2_anna_2021-05-03','site-2_bert_2020-01-09'],
     'site-2_anna_2020-01-02', 'site-2_anna_2021-05-03'),
    (['v01_pre','v01_post','v02_pre','v02_post'], 'v01_post', 'v01_pre'),
    (['BraTS-GLI-00005-000','BraTS-GLI-00005-001','BraTS-GLI-00008-000'],
     'BraTS-GLI-00005-000', 'BraTS-GLI-00005-001'),
    (['20200101_P01','20210304_P01','20200109_P02'], '20200101_P01', '20210304_P01')])
def test_what_names_share_is_the_person(names, first, other):
    pattern,pair,_ = related(names)
    assert pair==[first,other]
    from fastmiseg.scans.readers import subject_of
    who = [subject_of(pattern)(o) for o in names]
    assert who[names.index(first)]==who[names.index(other)] and len(set(who))>1

@pytest.mark.parametrize('ext', ['.nii.gz','.nrrd'])
def test_a_duplicate_that_was_stored_in_another_order(tmp_path, ext):
    df = cohort(tmp_path, 'abcd')
    im = nibabel.load(df.image[0])
    turned = im.as_reoriented(nibabel.orientations.ornt_transform(
        nibabel.io_orientation(im.affine), nibabel.orientations.axcodes2ornt('PSR')))
    nibabel.save(turned, df.image[2])
    if ext!='.nii.gz': df.loc[2,'image'] = str(write_volume(read_volume(df.image[2]), tmp_path/f'c{ext}'))
    assert find_duplicates(df)==[('a','c')]
    mirrored = nibabel.Nifti1Image(np.asarray(im.dataobj)[::-1], im.affine) # another place: not the same
    nibabel.save(mirrored, df.image[3])
    assert find_duplicates(df)==[('a','c')]
    with pytest.raises(CohortError, match='1 image is there under several names, in several parts'):
        SliceStore(tmp_path/'s', Recipe(spacing=2., size=48)).prepare(
            df.assign(split=['labeled','valid','test','labeled'], mask=[*df['mask'][:2],None,None]),
            workers=0, progress=False)

# ---- layouts

def bids(root, *names):
    for i,s in enumerate(('01','02')):
        x,m = square(i)
        for o in names: put_nifti(root/o.format(s=s), x if o.endswith(('T1w.nii.gz','FLAIR.nii.gz')) else m)
    return root

@pytest.mark.parametrize('mask', [
    'sub-{s}_space-T1w_label-lesion_mask', 'sub-{s}_T1w_label-lesion_mask',
    'sub-{s}_space-MNI152NLin2009cAsym_desc-brain_mask'])
def test_bids_masks_of_other_images(tmp_path, mask):
    bids(tmp_path, 'sub-{s}/anat/sub-{s}_T1w.nii.gz', 'sub-{s}/anat/sub-{s}_FLAIR.nii.gz',
         f'derivatives/manual/sub-{{s}}/anat/{mask}.nii.gz')
    df,said = told(lambda: load_cohort(tmp_path, suffix='FLAIR'))
    assert (df['mask'].isna().all()
            and '2 masks lie on the grid of a template or of other images than FLAIR' in said
            and mask.format(s='01') in said)
    if 'T1w' in mask:
        assert load_cohort(tmp_path, suffix='T1w')['mask'].notna().all()
        assert load_cohort(tmp_path, suffix='FLAIR', mask='lesion')['mask'].notna().all() # on purpose
    else: assert load_cohort(tmp_path, suffix='FLAIR', mask='brain')['mask'].isna().all()

def test_bids_names_of_classes_are_of_masks_that_are_called_like_their_table(tmp_path):
    anat = 'derivatives/m/sub-{s}/anat/sub-{s}_'
    bids(tmp_path, 'sub-{s}/anat/sub-{s}_T1w.nii.gz',
         *[f'{anat}{o}.nii.gz' for o in ('desc-auto_dseg','desc-manual_dseg','desc-brain_mask')])
    (tmp_path/'derivatives/m/desc-auto_dseg.tsv').write_text('index\tname\n1\tthalamus\n2\tcaudate\n')
    def classes(mask): return load_cohort(tmp_path, mask=mask).attrs['classes']
    assert classes('desc-auto')==('background','thalamus','caudate')
    assert classes('desc-manual') is None and classes('brain') is None
    (tmp_path/'derivatives/m/dseg.tsv').write_text('index\tname\n1\tgrey\n')
    assert classes('desc-manual')==('background','grey') and classes('brain') is None
    assert classes('desc-auto') is None # two tables that do not agree

def test_bids_masks_without_an_image_are_said(tmp_path):
    bids(tmp_path, 'sub-{s}/anat/sub-{s}_T1w.nii.gz', 'sub-{s}/func/sub-{s}_task-rest_bold.nii.gz',
         *[f'derivatives/m/sub-{{s}}/anat/sub-{{s}}_{o}.nii.gz' for o in ('dseg','task-rest_mask')])
    (tmp_path/'derivatives/m/sub-02/anat/sub-02_dseg.nii.gz').rename(tmp_path/'derivatives/m/sub-02_run-1_dseg.nii.gz')
    df,said = told(lambda: load_cohort(tmp_path, suffix='T1w'))
    assert df['mask'].notna().tolist()==[True,False]
    assert '1 mask (sub-02_run-1_dseg.nii.gz) without an image: left out; what is in the name of a mask' in said

def test_nnunet_masks_without_an_image_are_said(tmp_path):
    x,m = square(0)
    for o in ('a','b'): put_nifti(tmp_path/f'imagesTr/{o}_0000.nii.gz', x)
    for o in ('a','B','c','d','e'): put_nifti(tmp_path/f'labelsTr/{o}.nii.gz', m)
    (tmp_path/'dataset.json').write_text('{"labels": {"background": 0, "x": 1}, "channel_names": {"0": "CT"}}')
    df,said = told(lambda: load_cohort(tmp_path))
    assert df['mask'].notna().tolist()==[True,False]
    assert '4 masks (B, c, d, ...) without an image: left out; a mask is called like its image, without _0000' in said

def test_bids_runs_and_acquisitions(tmp_path):
    bids(tmp_path, *[f'sub-{{s}}/anat/sub-{{s}}_run-{r}_T1w.nii.gz' for r in (1,2)],
         *[f'derivatives/m/sub-{{s}}/anat/sub-{{s}}_run-{r}_dseg.nii.gz' for r in (1,2)])
    df = load_cohort(tmp_path)
    assert df.subject.tolist()==['sub-01']*2+['sub-02']*2
    assert all(f'run-{r}' in i and f'run-{r}' in m for i,m,r in zip(df.image, df['mask'], (1,2,1,2)))

def nnunet(root, labels, **more):
    (root/'dataset.json').write_text(json.dumps(dict(channel_names={'0':'T1'}, labels=labels) | more))
    return root

def test_nnunet_names_that_are_there_twice(tmp_path):
    for f in ('imagesTr/a_0000.nii.gz','imagesTr/a_0000.nrrd','labelsTr/a.nii.gz'):
        write_volume(Volume(np.ones((3,4,5),'u1')), tmp_path/f)
    labels = dict(background=0, x=1)
    with pytest.raises(CohortError, match='a_0000.nrrd: has the same name as .*a_0000.nii.gz; keep one'):
        load_cohort(nnunet(tmp_path, labels))
    df = load_cohort(nnunet(tmp_path, labels, file_ending='.nii.gz')) # the others are not of the data set
    assert df.image.tolist()==[str(tmp_path/'imagesTr'/'a_0000.nii.gz')] and df['mask'].notna().all()
    write_volume(Volume(np.ones((3,4,5),'u1')), tmp_path/'labelsTr'/'a.mha')
    (tmp_path/'imagesTr'/'a_0000.nrrd').unlink()
    with pytest.raises(CohortError, match='labelsTr.*has the same name as'): load_cohort(nnunet(tmp_path, labels))

@pytest.mark.parametrize('labels, classes', [
    ({'0':0,'1':2,'2':1}, ('0','2','1')),
    ({'background':'0','tumour':'1'}, ('background','tumour')),
    ({'0':'background','1':'1'}, ('background','1'))])
def test_nnunet_names_made_of_digits(tmp_path, labels, classes):
    write_volume(Volume(np.ones((3,4,5),'u1')), tmp_path/'imagesTr'/'a_0000.nii.gz')
    assert load_cohort(nnunet(tmp_path, labels)).attrs['classes']==classes

# ---- what hospitals send, and what is done to it on the way

def parted(root, places):
    "One series of one person, its files in several folders: folder -> positions"
    for d,zs in places.items():
        for z in zs: put(root/'anna'/d/f'{z}.dcm', pixels(z), ImagePositionPatient=[0,0,4*z], PatientID='X1')

@pytest.mark.parametrize('a, b', [((0,1,2),(3,4,5)), ((0,2,4),(1,3,5)), ((0,1,2),(0,1,2))])
def test_one_series_in_two_folders(tmp_path, a, b):
    "Halves, every second slice, or a copy: each would be a scan of its own"
    parted(tmp_path, dict(DISK1=a, DISK2=b))
    _,said = told(lambda: load_cohort(tmp_path, 'dicom'))
    assert ('2 folders hold files of the same series as another folder, for example anna/DISK1 and anna/DISK2' in said
            and 'put the parts of one scan into one folder' in said)

@pytest.mark.parametrize('which', [[4], [0,1,2,3,4]])
def test_dicom_files_that_are_compressed_one_by_one(tmp_path, which):
    "Else a scan would lose its last slice"
    series(tmp_path)
    for i in which:
        f = tmp_path/f's{i:02}.dcm'
        (tmp_path/f'{f.name}.gz').write_bytes(gzip.compress(f.read_bytes()))
        f.unlink()
    refused(tmp_path, f'holds {len(which)} DICOM files? in compressed form, '
                      f'for example s{which[0]:02}.dcm.gz, which cannot be read: unpack')

def test_what_other_systems_leave_beside_slices(tmp_path):
    vol,_ = read(series(tmp_path/'a'))
    for name in ('._s00.dcm','.DS_Store','Thumbs.db','__MACOSX/._s00.dcm','desktop.ini'):
        (tmp_path/'a'/name).parent.mkdir(exist_ok=True)
        (tmp_path/'a'/name).write_bytes(b'\0\5\x16\7'+bytes(200))
    again,said = read(tmp_path/'a')
    assert np.array_equal(again.array, vol.array) and not said and len(load_cohort(tmp_path, 'dicom'))==1

def test_slices_of_two_scanners_under_one_series(tmp_path):
    series(tmp_path, each=lambda i: dict(Modality='PT' if i==3 else 'CT'))
    refused(tmp_path, r's03.dcm: Modality \(0008,0060\) is another one than in s00.dcm')

@pytest.mark.parametrize('spacing, ok', [
    ((.001,.001,.003),False), ((800,800,3000),False), ((.05,.05,.05),True), ((.15,.15,.3),True), ((4,4,300),True)])
@pytest.mark.parametrize('ext', ['.nii.gz','.mha','.nrrd'])
def test_sizes_that_no_patient_has(tmp_path, spacing, ok, ext):
    "Metres or micrometres, which the header does not say"
    write_volume(Volume(np.ones((8,20,30),'i2'), spacing[::-1]), tmp_path/f'a{ext}')
    said = '\n'.join(read(tmp_path/f'a{ext}')[1])
    assert ('mm large, by its spacing: is that in another unit than mm?' in said)==(not ok), said

@pytest.mark.parametrize('ext', ['.nii.gz','.nii','.mha','.nrrd'])
@pytest.mark.parametrize('content, says', [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n',
     'is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`'),
    (b'../../.git/annex/objects/MD5E-s1.nii.gz', 'is a pointer of git-annex'),
    (b'<!DOCTYPE html><html>Sign in</html>', 'its download failed'),
    (b'\n<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', 'its download failed'),
    (b'PK\3\4'+bytes(100), 'is a ZIP archive: unpack it')])
def test_files_that_stand_where_a_scan_should(tmp_path, ext, content, says):
    (tmp_path/f'a{ext}').write_bytes(content)
    refused(tmp_path/f'a{ext}', says)

def test_compressed_twice(tmp_path):
    f = nii(tmp_path/'a.nii.gz', np.ones((3,4,5),'i2'))
    f.write_bytes(gzip.compress(f.read_bytes()))
    refused(f, 'is gzip-compressed twice: unpack it once')

def drawn(*values, bg=0, dtype='i2'):
    "A mask, a stripe for each value"
    m = np.full((3,48,48), bg, dtype)
    for i,v in enumerate(values): m[:,18:30,18+i] = v
    return m

def auto_of(tmp_path, *masks, **kw):
    rows = []
    for i,m in enumerate(masks):
        rows.append(dict(subject=f'q{i}', scan=f's{i}', image=put_nifti(tmp_path/f'{i}.nii.gz', square(i)[0]),
                         mask=put_nifti(tmp_path/f'{i}m.nii.gz', m)))
    return told(lambda: Recipe.auto(pd.DataFrame(rows, dtype=object), **kw))

@pytest.mark.parametrize('values', [(254,255), (253,254,255,1), (*range(1,8),*range(248,256)), (4,239,255)])
def test_masks_after_lossy_compression(tmp_path, values):
    "Values beside 0 and 255, together in one mask, are no classes"
    with pytest.raises(ValueError, match=rf'the masks hold values near 0 and near 255 \(0, {min(values)}, .*\), '
                                         'as lossy compression .*0m.nii.gz: save them anew'):
        auto_of(tmp_path, drawn(*values), drawn(*values))
    r,_ = auto_of(tmp_path, drawn(*values), drawn(*values), classes=['background', *map(str, values)]) # on purpose
    assert len(r.classes)==1+len(values)

@pytest.mark.parametrize('mask, labels', [
    (drawn(255),{0:0, 255:1}), (drawn(254.97, dtype='f4'),{0:0, 255:1}),
    (drawn(.999, dtype='f4'),None), (drawn(1.0001, 2, dtype='f4'),None)])
def test_masks_of_two_values_are_read_as_meant(tmp_path, mask, labels):
    r,said = auto_of(tmp_path, mask, mask)
    assert r.labels==labels and not said
    assert np.array_equal(read_mask(tmp_path/'0m.nii.gz', classes=r.classes, labels=r.labels).array>0, mask>0)

def test_a_mask_whose_background_is_not_0(tmp_path):
    r,said = auto_of(tmp_path/'a', drawn(2, 3, bg=1), drawn(2, 3, bg=1))
    assert ('no mask holds 0, which is the background; they hold 1, 2, 3. '
            'If the first of these is, give Recipe(labels={1: 0, 2: 1, 3: 2})' in said)
    _,said = auto_of(tmp_path/'b', drawn(*[0]*12, bg=1), drawn(*[0]*12, bg=1))
    assert 'of the voxels of the masks are not 0, the background' in said and 'are they inverted?' in said
    assert not auto_of(tmp_path/'c', drawn(1), drawn(0))[1]

@pytest.mark.parametrize('odd', [-1, 255])
def test_marks_for_voxels_that_nobody_annotated(tmp_path, odd):
    "0 stays the background, and the mark is said to be a class"
    r,said = auto_of(tmp_path, drawn(1, odd), drawn(1, odd))
    assert (r.labels[0]==0 and set(r.labels)=={0, 1, odd}
            and f'the masks hold {odd}, which often marks voxels that nobody annotated' in said)
    if odd<0: assert r.labels=={0:0, -1:1, 1:2}

@pytest.mark.parametrize('step, said', [(1,False), (2,True), (5,True)])
def test_masks_of_every_few_slices(tmp_path, step, said):
    "The slices between are no background"
    x,m = square(0)
    x,m = x[:1].repeat(21, 0)+np.arange(21, dtype='f4')[:,None,None],np.zeros((21,48,48),'u1')
    m[2:20:step,18:30,18:30] = 1
    df = pd.DataFrame([dict(subject=s, scan=s, image=put_nifti(tmp_path/f'{s}.nii.gz', x+i),
                            mask=put_nifti(tmp_path/f'{s}_mask.nii.gz', m)) for i,s in enumerate('ab')], dtype=object)
    text = told(lambda: SliceStore(tmp_path/'s', Recipe(spacing=2., size=48)).prepare(df, workers=0, progress=False))[1]
    assert (f'slices, one in {step}: were only these annotated?' in text)==said, text

def test_a_column_that_was_sorted_alone(tmp_path):
    "Masks of other people, by their names"
    df = cohort(tmp_path, 'abc')
    shifted = df.assign(mask=df['mask'].tolist()[1:]+df['mask'].tolist()[:1])
    shifted.to_csv(tmp_path/'c.csv', index=False)
    _,said = told(lambda: load_cohort(tmp_path/'c.csv'))
    assert (f'3 masks are called like the image of another scan, for example {df["mask"][1]}, '
            'which is given for a, like that of b: was a column sorted or shifted alone?' in said)
    assert not told(lambda: load_cohort(shifted.assign(subject='one')))[1] and not told(lambda: load_cohort(df))[1]

def test_a_data_set_with_a_byte_order_mark(tmp_path):
    for k in 'ab':
        for d in ('imagesTr','labelsTr'): write_volume(Volume(np.ones((3,4,5),'u1')), tmp_path/d/f'{k}.nii.gz')
    (tmp_path/'dataset.json').write_text(
        json.dumps(dict(labels={'0':'background','1':'x'}, modality={'0':'CT'})), encoding='utf-8-sig')
    df = load_cohort(tmp_path)
    assert df.attrs['layout']=='msd' and df.attrs['classes']==('background','x')

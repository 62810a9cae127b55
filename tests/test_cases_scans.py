"Scans as hospitals have them: each kind of fault is read right, or refused in a sentence that names what was found"
import locale
import gzip, os, re, struct, subprocess, sys, textwrap
from pathlib import Path

import nibabel, numpy as np, pydicom, pytest, SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (DeflatedExplicitVRLittleEndian, EnhancedMRImageStorage, ExplicitVRBigEndian,
                         ExplicitVRLittleEndian, HTJ2KLossless, ImplicitVRLittleEndian, MPEG2MPML, MRImageStorage,
                         RLELossless, generate_uid)

from fastmiseg.scans import intact
from fastmiseg.scans.cohort import load_cohort, save_cohort
from fastmiseg.scans.formats import extensions
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.store import SliceStore
from fastmiseg.scans.masks import read_mask
from fastmiseg.scans.messages import VolumeError, VolumeWarning, collect_warnings
from fastmiseg.scans.volume import (
    Volume, choose_volume, read_size, read_volume, resample, scan_files, split_choice, write_volume)

def read(path, **kw):
    "The volume, and what was said"
    with collect_warnings() as found: vol = read_volume(path, **kw)
    return vol, [o.text for o in found]

def refused(path, says, **kw):
    with pytest.raises(VolumeError, match=says) as e: read_volume(path, **kw)
    text = str(e.value)
    assert text.startswith(str(split_choice(path)[0])) and '\n' not in text and len(text)<900, text
    return text

def steps(vol): return np.reshape(vol.direction,(3,3))*vol.spacing[::-1]

# ---- DICOM: writing, and an oracle that knows pydicom only

def dataset(a, syntax=ExplicitVRLittleEndian, **tags):
    a = np.asarray(a)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    order = '>' if syntax==ExplicitVRBigEndian else '<'
    basic = dict(SOPClassUID=MRImageStorage, SOPInstanceUID=generate_uid(), SeriesInstanceUID='1.2.3',
                 StudyInstanceUID='1.2', Modality='MR', ImageOrientationPatient=[1,0,0,0,1,0],
                 ImagePositionPatient=[0,0,0], PixelSpacing=[1.5,.75], SliceThickness=4,
                 Rows=a.shape[-2], Columns=a.shape[-1], SamplesPerPixel=1, PhotometricInterpretation='MONOCHROME2',
                 BitsAllocated=16, BitsStored=16, HighBit=15, PixelRepresentation=int(a.dtype.kind=='i'),
                 PixelData=a.astype(order+('i2' if a.dtype.kind=='i' else 'u2')).tobytes())
    for k,v in {**basic,**tags}.items():
        if v is not None: setattr(ds, k, v)
    if 'PixelData' in ds: ds['PixelData'].VR = 'OW'
    return ds

def put(path, a, **tags):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset(a, **tags).save_as(path, enforce_file_format=True)
    return path

def pixels(i=0, shape=(4,5)): return np.arange(np.prod(shape), dtype='u2').reshape(shape)+100*i

def series(folder, n=5, step=4., each=lambda i: {}, prefix='s', **tags):
    "n slices along z; `each(i)` are the tags of one"
    for i in range(n):
        put(Path(folder)/f'{prefix}{i:02}.dcm', pixels(i),
            **{'ImagePositionPatient':[-20,10,step*i], **tags, **each(i)})
    return Path(folder)

def check_places(vol, files, tol=1e-3):
    "Every slice of these files is in the volume, where its header says and with its values"
    inverse = np.linalg.inv(steps(vol))
    seen = set()
    for f in files:
        ds = pydicom.dcmread(f)
        o,at = (np.array(ds[k].value, float) for k in ('ImageOrientationPatient','ImagePositionPatient'))
        rows,cols = ds.PixelSpacing
        values = ds.pixel_array*float(ds.get('RescaleSlope',1))+float(ds.get('RescaleIntercept',0))
        for r,c in ((0,0), (0,ds.Columns-1), (ds.Rows-1,0), (ds.Rows-1,ds.Columns-1)):
            ijk = inverse@(at+o[:3]*cols*c+o[3:]*rows*r-vol.origin)
            assert np.abs(ijk-np.rint(ijk)).max()<tol, (f, ijk)
            x,y,z = np.rint(ijk).astype(int)
            assert np.isclose(vol.array[z,y,x], values[r,c], rtol=1e-5), f
        seen.add(z)
    assert len(seen)==len(vol.array)

def item(**tags):
    ds = Dataset()
    for k,v in tags.items(): setattr(ds, k, v)
    return ds

def multi(path, frames, shared=None, **tags):
    "An enhanced object; frames: (array, position, further functional groups)"
    own = []
    for a,at,more in frames:
        own.append(item(PlanePositionSequence=[item(ImagePositionPatient=at)] if at is not None else [], **more))
    groups = dict(PlaneOrientationSequence=[item(ImageOrientationPatient=[1,0,0,0,1,0])],
                  PixelMeasuresSequence=[item(PixelSpacing=[1.5,.75], SliceThickness=8)])
    return put(path, np.stack([a for a,*_ in frames]), SOPClassUID=EnhancedMRImageStorage, NumberOfFrames=len(frames),
               ImageOrientationPatient=None, ImagePositionPatient=None, PixelSpacing=None, SliceThickness=None,
               SharedFunctionalGroupsSequence=[item(**{**groups, **(shared or {})})],
               PerFrameFunctionalGroupsSequence=own, **tags)

# ---- DICOM: other slices than the rest

def turned(degrees, axis='x'):
    c,s = np.cos(np.radians(degrees)),np.sin(np.radians(degrees))
    return [1,0,0,0,round(c,6),round(s,6)] if axis=='x' else [round(c,6),round(s,6),0,round(-s,6),round(c,6),0]

@pytest.mark.parametrize('tag, odd, words', [
    ('ImageOrientationPatient', [1,0,0,0,0,-1],
     r'\(0020,0037\) is 1\\0\\0\\0\\0\\-1, but 1\\0\\0\\0\\1\\0 in 4 of its 5 slices'),
    ('ImageOrientationPatient', turned(1), r'\(0020,0037\)'),
    ('ImageOrientationPatient', turned(90,'z'), r'\(0020,0037\)'),
    ('ImageOrientationPatient', [-1,0,0,0,-1,0], r'\(0020,0037\)'),
    ('ImageOrientationPatient', [1,0,0,0,-1,0], r'\(0020,0037\)'),
    ('PixelSpacing', [1.5,.8], r'\(0028,0030\) is 1.5\\0.8, but 1.5\\0.75 in 4 of its 5'),
    ('PixelSpacing', [.75,1.5], r'\(0028,0030\)')])
@pytest.mark.parametrize('which', [0,2,4])
def test_one_slice_is_otherwise(tmp_path, tag, odd, words, which):
    series(tmp_path, each=lambda i: {tag:odd} if i==which else {})
    assert f's{which:02}.dcm: {tag}' in refused(tmp_path, words)

@pytest.mark.parametrize('shape, says', [
    ((4,6), r'Columns \(0028,0011\) is 6, but 5 in 4 of its 5'),
    ((3,5), r'Rows \(0028,0010\) is 3, but 4')])
def test_one_slice_has_another_size(tmp_path, shape, says):
    series(tmp_path)
    put(tmp_path/'s03.dcm', pixels(3, shape), ImagePositionPatient=[-20,10,12])
    refused(tmp_path, f's03.dcm: {says}')

def test_frames_of_other_orientation_or_spacing(tmp_path):
    for k,group in dict(a=dict(PlaneOrientationSequence=[item(ImageOrientationPatient=[0,1,0,0,0,1])]),
                        b=dict(PixelMeasuresSequence=[item(PixelSpacing=[2,2])])).items():
        multi(tmp_path/k/'m.dcm', [(pixels(i), [0,0,8*i], group if i==2 else {}) for i in range(4)])
        refused(tmp_path/k, r'm.dcm, frame 3: (ImageOrientationPatient|PixelSpacing) .* in 3 of its 4 slices')

@pytest.mark.parametrize('tag, value, says', [
    ('ImagePositionPatient', None, r's01.dcm: has no ImagePositionPatient \(0020,0032\); move it out'),
    ('ImageOrientationPatient', None, r's01.dcm: has no ImageOrientationPatient \(0020,0037\)'),
    ('PixelSpacing', None, r's01.dcm: has no PixelSpacing \(0028,0030\); only images with a known size'),
    ('PixelSpacing', [0,.75], r'PixelSpacing \(0028,0030\)'),
    ('PixelSpacing', [-1.5,.75], r'PixelSpacing \(0028,0030\)'),
    ('ImagePositionPatient', [0,0], r'ImagePositionPatient \(0020,0032\) is 0\\0, expected 3 numbers')])
@pytest.mark.parametrize('everywhere', [False,True])
def test_geometry_is_missing(tmp_path, tag, value, says, everywhere):
    series(tmp_path, each=lambda i: {tag:value} if everywhere or i==1 else {})
    refused(tmp_path, says.replace('s01', 's0.') if everywhere else says)

@pytest.mark.parametrize('text', ['nan','inf','abc'])
def test_positions_and_spacings_are_numbers(tmp_path, text):
    for k,(old,tag) in dict(a=(b'-20\\10\\8 ', 'ImagePositionPatient'), b=(b'1.5\\0.75', 'PixelSpacing')).items():
        f = series(tmp_path/k)/'s02.dcm'
        b = f.read_bytes()
        old = next(o for o in (old, b'-20.0\\10.0\\8.0', b'-20\\10\\8.0') if o in b)
        f.write_bytes(b.replace(old, (text+'\\1\\1' if k=='a' else text+'\\1').encode().ljust(len(old))))
        refused(tmp_path/k, f's02.dcm: {tag}')

# ---- DICOM: grids

def oblique(folder, n=5, gap=3.3, sort=None):
    q,_ = np.linalg.qr(np.random.default_rng(4).normal(size=(3,3)))
    q[:,2] = np.cross(q[:,0], q[:,1])
    names = sort or range(n)
    for i,k in enumerate(names):
        put(folder/f'{k}.dcm', pixels(i), ImageOrientationPatient=[round(o,6) for o in q[:,:2].T.ravel()],
            ImagePositionPatient=[round(o,5) for o in np.array([5,-7,9])+q[:,2]*gap*i])
    return folder

def test_oblique_slices_in_any_order_of_names(tmp_path):
    oblique(tmp_path, sort=(3,0,4,1,2))
    vol,said = read(tmp_path)
    check_places(vol, tmp_path.iterdir())
    assert not said and vol.spacing==pytest.approx((3.3,1.5,.75), rel=1e-4)
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    im = sitk.ReadImage(files)
    assert np.array_equal(sitk.GetArrayFromImage(im), vol.array) and np.allclose(im.GetOrigin(), vol.origin, atol=1e-4)
    assert (np.allclose(im.GetDirection(), vol.direction, atol=1e-5)
            and np.allclose(im.GetSpacing()[::-1], vol.spacing, atol=1e-4))

@pytest.mark.parametrize('decimals, step', [(2,.625), (3,.6251), (2,1.25), (1,1.25), (1,3.33), (2,2.998), (4,.33333)])
@pytest.mark.parametrize('start', [0.,-217.3])
def test_rounded_positions(tmp_path, decimals, step, start):
    n = 24
    series(tmp_path, n, each=lambda i: {'ImagePositionPatient':['-20','10',f'{start+step*i:.{decimals}f}']})
    vol,said = read(tmp_path)
    assert vol.shape==(n,4,5) and vol.spacing[0]==pytest.approx(step, abs=10.**-decimals/(n-1)*1.1)
    assert vol.array[:,0,0].tolist()==[100*i for i in range(n)]
    assert vol.origin[2]+(n-1)*vol.spacing[0]==pytest.approx(start+step*(n-1), abs=10.**-decimals)

def test_a_stated_distance_is_taken_where_rounding_allows_it(tmp_path):
    at = lambda i: {'ImagePositionPatient':['0','0',f'{.625*i:.2f}'], 'SpacingBetweenSlices':'0.625'}
    assert read(series(tmp_path/'a', 9, each=at))[0].spacing[0]==.625
    wrong = lambda i: {**at(i), 'SpacingBetweenSlices':'0.7'}
    assert read(series(tmp_path/'b', 9, each=wrong))[0].spacing[0]==pytest.approx(.625, abs=2e-3)

@pytest.mark.parametrize('zs', [
    (0,4,8,16,20), (0,4,8,12.3,16), (0,4,7,12,16), ('0.00','4.00','8.00','12.20','16.00'),
    (0,8,12,16,20), (0,5,10,16,20)])
def test_gaps_and_uneven_slices(tmp_path, zs):
    series(tmp_path, each=lambda i: {'ImagePositionPatient':[0,0,zs[i]]})
    refused(tmp_path, r'slices are .* mm apart, but .* mm between s0\d.dcm and s0\d.dcm '
                      r'\(their ImagePositionPatient \(0020,0032\)\): a slice is missing')

def test_a_slice_that_is_there_twice(tmp_path):
    series(tmp_path/'copy')
    (tmp_path/'copy'/'again.dcm').write_bytes((tmp_path/'copy'/'s02.dcm').read_bytes())
    refused(tmp_path/'copy', r's02.dcm: is the same slice as again.dcm \(SOPInstanceUID \(0008,0018\)')
    series(tmp_path/'other')
    put(tmp_path/'other'/'again.dcm', pixels(9), ImagePositionPatient=[-20,10,8])
    refused(tmp_path/'other', r'6 slices are at 5 places: '
                              r'2 are at one \(again.dcm, s02.dcm\) and nothing tells them apart')

def test_a_slice_that_is_shifted_sideways(tmp_path):
    for k,at in dict(a=[-19,10,8], b=[-20,13,8]).items():
        series(tmp_path/k, each=lambda i: {'ImagePositionPatient':at} if i==2 else {})
        refused(tmp_path/k, r's02.dcm: ImagePositionPatient \(0020,0032\) .* shifted sideways')

@pytest.mark.parametrize('degrees', [15,-20,.5])
def test_a_tilted_gantry_is_refused(tmp_path, degrees):
    t = np.radians(degrees)
    series(tmp_path/'shear', each=lambda i: {'ImagePositionPatient':[0, round(4*i*np.tan(t),4), 4*i]},
           GantryDetectorTilt=degrees)
    refused(tmp_path/'shear', rf'sheared by {abs(degrees):.1f} degrees .* '
                              rf'GantryDetectorTilt \(0018,1120\) is {degrees}.*dcm2niix')
    series(tmp_path/'table', each=lambda i: {'ImagePositionPatient':[0,0,4*i]}, ImageOrientationPatient=turned(degrees))
    refused(tmp_path/'table', rf'sheared by {abs(degrees):.1f} degrees .* is missing.*straighten it first')

def test_a_tilt_that_was_straightened_and_a_small_drift(tmp_path):
    t = 15
    n = np.array([0,-np.sin(np.radians(t)),np.cos(np.radians(t))])
    series(tmp_path/'straight', each=lambda i: {'ImagePositionPatient':[round(o,5) for o in n*4*i]},
           ImageOrientationPatient=turned(t), GantryDetectorTilt=t)
    vol,said = read(tmp_path/'straight')
    check_places(vol, (tmp_path/'straight').iterdir()); assert not said
    series(tmp_path/'drift', each=lambda i: {'ImagePositionPatient':[f'{4*i*1e-3:.5f}',0,4*i]})
    vol,said = read(tmp_path/'drift')
    check_places(vol, (tmp_path/'drift').iterdir(), tol=.03)
    assert said==['has slices that drift sideways (by 1e-03 mm in a mm), which was corrected']
    d = np.reshape(vol.direction,(3,3)); assert np.allclose(d@d.T, np.eye(3), atol=1e-12)

def test_a_single_slice_says_how_thick_it_is(tmp_path):
    vol,_ = read(series(tmp_path/'a', 1, SliceThickness=7))
    assert vol.shape==(1,4,5) and vol.spacing==(7,1.5,.75)
    assert read(series(tmp_path/'c', 1, SliceThickness=7, SpacingBetweenSlices=8))[0].spacing[0]==8
    assert read(series(tmp_path/'e', 1, SliceThickness=7, SpacingBetweenSlices=0))[0].spacing[0]==7
    for k,v in dict(b=None, d=0).items():
        series(tmp_path/k, 1, SliceThickness=v)
        refused(tmp_path/k, r's00.dcm: (has no )?SliceThickness \(0018,0050\)')

# ---- DICOM: several volumes

def cine(folder, phases=3, n=4, tags=lambda p,i: {}, names='p{p}_{i}.dcm'):
    for p in range(phases):
        for i in range(n):
            put(folder/names.format(p=p, i=i), pixels(10*p+i), ImagePositionPatient=[-20,10,4*i], **tags(p,i))
    return folder

_apart = dict(
    trigger=lambda p,i: dict(TriggerTime=30*p), echo=lambda p,i: dict(EchoTime=2.3+2.3*p),
    number=lambda p,i: dict(EchoNumbers=p+1),
    time=lambda p,i: dict(TemporalPositionIdentifier=p+1), acquisition=lambda p,i: dict(AcquisitionNumber=p+1),
    b=lambda p,i: dict(DiffusionBValue=500.*p), clock=lambda p,i: dict(AcquisitionTime=f'10150{p}.5'),
    kind=lambda p,i: dict(ImageType=['ORIGINAL','PRIMARY','ABC'[p]]), by_slice=lambda p,i: dict(TriggerTime=30*p+7*i),
    instance=lambda p,i: dict(InstanceNumber=4*p+i+1), instance_by_slice=lambda p,i: dict(InstanceNumber=3*i+p+1))

@pytest.mark.parametrize('how', _apart)
def test_phases_are_counted_and_chosen(tmp_path, how):
    cine(tmp_path, tags=_apart[how])
    assert ('choose one with phase=0 to phase=2' in
            refused(tmp_path, r'holds 3 volumes \(phases, echoes or acquisitions\) in one series, expected one'))
    for p in range(3):
        vol,_ = read(tmp_path, phase=p)
        assert vol.array[:,0,0].tolist()==[100*(10*p+i) for i in range(4)]
        check_places(vol, [tmp_path/f'p{p}_{i}.dcm' for i in range(4)])
        assert np.array_equal(read_volume(choose_volume(tmp_path, phase=p)).array, vol.array)
    for wrong in (3,-1,'late'):
        refused(tmp_path, rf'phase={wrong!r}.*it holds 3 volumes, expected a number from 0 to 2', phase=wrong)

def test_one_slice_in_time(tmp_path):
    for i in range(12): put(tmp_path/f'{i:02}.dcm', pixels(i), TriggerTime=30*i)
    refused(tmp_path, 'holds 12 volumes .* 0: TriggerTime 0 \\(1 slice\\); 1: TriggerTime 30')
    assert read(tmp_path, phase=7)[0].array[0,0,0]==700

def test_echoes_between_each_other_are_not_one_volume(tmp_path):
    for k,tag in dict(a=('EchoTime',(2.3,4.6)), b=('DiffusionBValue',(0.,800.)),
                      c=('TemporalPositionIdentifier',(1,2))).items():
        series(tmp_path/k, 6, each=lambda i: {tag[0]:tag[1][i%2]})
        refused(tmp_path/k, f'holds 2 volumes .*{tag[0]}')
        vol,_ = read(tmp_path/k, phase=1)
        assert vol.spacing[0]==8 and vol.array[:,0,0].tolist()==[100,300,500]

def test_what_may_differ_between_the_slices_of_one_volume(tmp_path):
    series(tmp_path, 6, each=lambda i: dict(TriggerTime=13*i, AcquisitionNumber=i%2, AcquisitionTime=f'10150{i}',
                                            EchoTime=2.3+1e-4*i, ContentTime=f'10160{i}'))
    assert read(tmp_path)[0].shape==(6,4,5)

def test_phases_that_are_not_whole(tmp_path):
    cine(tmp_path, tags=lambda p,i: dict(AcquisitionNumber=p))
    (tmp_path/'p1_3.dcm').unlink(); (tmp_path/'p2_1.dcm').unlink()
    refused(tmp_path, 'holds 3 volumes .* 1: AcquisitionNumber 1 \\(3 slices\\)')
    assert read(tmp_path, phase=1)[0].shape==(3,4,5)
    refused(tmp_path, 'a slice is missing', phase=2)
    cine(tmp_path/'b', phases=2); (tmp_path/'b'/'p1_3.dcm').unlink()
    refused(tmp_path/'b', '7 slices are at 4 places: 2 are at one .* nothing tells them apart')

def test_several_series(tmp_path):
    series(tmp_path, prefix='a', SeriesNumber=4, SeriesDescription='T1 axial')
    series(tmp_path, 3, prefix='b', SeriesInstanceUID='1.2.4', SeriesNumber=5, SeriesDescription='T2 axial fs')
    text = refused(tmp_path, 'holds 2 DICOM series, expected one; '
                             'move each into a folder of its own, or choose one with series=')
    assert '1.2.3 (4, T1 axial, 5 files)' in text and '1.2.4 (5, T2 axial fs, 3 files)' in text
    for k in ('1.2.4', 5, '5', 'T2 axial fs', 't2', 'FS'): assert read(tmp_path, series=k)[0].shape[0]==3
    assert read(choose_volume(tmp_path, series='T1 axial'))[0].shape[0]==5
    refused(tmp_path, "series='axial' fits 2 of its 2 DICOM series", series='axial')
    refused(tmp_path, "series='flair' fits 0 of its 2 DICOM series", series='flair')

@pytest.mark.parametrize('number', [3, '3'])
def test_the_number_of_a_series_is_not_looked_for_in_descriptions(number, tmp_path):
    series(tmp_path, SeriesNumber=2, SeriesDescription='T2 3mm')
    refused(tmp_path, "series='3' fits 0 of its 1 DICOM series, expected one; give the UID", series=number)
    assert read(tmp_path, series='3mm')[0].shape[0]==read(tmp_path, series=2)[0].shape[0]==5

def test_cohorts_choose_series_and_phase(tmp_path):
    for s in ('anna','bert'):
        for k,n in dict(T1=1, T2=2).items():
            for p in range(3):
                series(tmp_path/s, 4, prefix=f'{k}{p}', SeriesInstanceUID=f'1.2.{n}', SeriesDescription=k,
                       TriggerTime=50*p)
    df = load_cohort(tmp_path, 'dicom', series='T2', phase=1)
    assert df.scan.tolist()==['anna','bert'] and df.image[0]==f'{tmp_path/"anna"}#series=T2&phase=1'
    vol = read_volume(df.image[0])
    assert np.array_equal(vol.array, read_volume(tmp_path/'anna', series='T2', phase=1).array)
    again = load_cohort(save_cohort(df, tmp_path/'cohort.csv'))
    assert again.image.tolist()==df.image.tolist()
    store = lambda **kw: SliceStore(tmp_path/'store', Recipe(size=16, spacing=1)).prepare(
        load_cohort(tmp_path, 'dicom', **kw), workers=0, progress=False)
    for n,phase in ((2,1), (4,2), (4,1)): # the choice is a part of what is prepared
        store(series='T2', phase=phase)
        assert len(list((tmp_path/'store').rglob('*.image.npy')))==n

def test_a_path_that_looks_like_a_choice(tmp_path):
    series(tmp_path/'a#phase=1')
    assert read(tmp_path/'a#phase=1')[0].shape[0]==5
    assert choose_volume('x', series='a/b & #c', phase=2)=='x#series=a%2Fb %26 %23c&phase=2'
    assert split_choice('x#series=a%2Fb %26 %23c&phase=2')==('x', dict(series='a/b & #c', phase='2'))
    with pytest.raises(VolumeError, match="form='sform' does not apply"):
        read_volume(series(tmp_path/'b'), form='sform')
    with pytest.raises(VolumeError, match='phase=.1. does not apply'):
        read_volume(nii(tmp_path/'a.nii', np.ones((2,2,2),'i2')), phase=1)

# ---- DICOM: values

def test_rescale_values_that_differ_by_slice(tmp_path):
    series(tmp_path/'slope', each=lambda i: dict(RescaleSlope=f'{1/(i+1):.6f}', RescaleIntercept=0), Modality='PT')
    vol,_ = read(tmp_path/'slope')
    assert vol.array.dtype==np.float32
    check_places(vol, (tmp_path/'slope').iterdir())
    series(tmp_path/'whole', each=lambda i: dict(RescaleSlope=1+i%2, RescaleIntercept=-1000+i))
    vol,_ = read(tmp_path/'whole')
    assert vol.array.dtype==np.int16 and vol.array.min()==-1000
    check_places(vol, (tmp_path/'whole').iterdir())
    series(tmp_path/'some', each=lambda i: dict(RescaleSlope=.5) if i==3 else {})
    vol,_ = read(tmp_path/'some')
    check_places(vol, (tmp_path/'some').iterdir())
    series(tmp_path/'zero', each=lambda i: dict(RescaleSlope=0) if i==3 else {})
    refused(tmp_path/'zero', r's03.dcm: RescaleSlope \(0028,1053\) is 0')

@pytest.mark.parametrize('signed', [False,True])
def test_stored_bits(tmp_path, signed):
    "Twelve bits of sixteen: what lies above them is no part of the value, but its sign"
    a = np.array([[0,1,2047],[100,5,9]]) if not signed else np.array([[-2048,-1,2047],[100,5,-9]])
    kw = dict(BitsStored=12, HighBit=11, PixelRepresentation=int(signed))
    for i in range(3):
        put(tmp_path/f'{i}.dcm', (a&0xfff|0x3000*(i==1)).astype('u2'), ImagePositionPatient=[0,0,i], **kw)
    vol,_ = read(tmp_path)
    assert all(np.array_equal(o, a) for o in vol.array) and vol.array.dtype==('i2' if signed else 'u2')

def test_monochrome1(tmp_path):
    series(tmp_path/'a', BitsStored=12, HighBit=11)
    series(tmp_path/'b', BitsStored=12, HighBit=11, PhotometricInterpretation='MONOCHROME1')
    (a,_),(b,said) = read(tmp_path/'a'),read(tmp_path/'b')
    assert np.array_equal(b.array, 4095-a.array) and 'MONOCHROME1' in said[0] and 'inverted' in said[0]
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path/'b'))
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(files)), b.array)
    series(tmp_path/'ct', Modality='CT', RescaleSlope=1, RescaleIntercept=-1024, RescaleType='HU',
           PhotometricInterpretation='MONOCHROME1')
    vol,said = read(tmp_path/'ct')
    check_places(vol, (tmp_path/'ct').iterdir()); assert 'were kept' in said[0]
    series(tmp_path/'mixed', each=lambda i: dict(PhotometricInterpretation='MONOCHROME1') if i==2 else {})
    refused(tmp_path/'mixed', r's02.dcm: PhotometricInterpretation \(0028,0004\) is MONOCHROME1, '
                              'but MONOCHROME2 in other slices')

@pytest.mark.parametrize('tags, says', [
    (dict(ImageType=['ORIGINAL','PRIMARY','M','MOSAIC']), r'ImageType \(0008,0008\) .* a mosaic'),
    (dict(PhotometricInterpretation='PALETTE COLOR'), r'PhotometricInterpretation \(0028,0004\) is PALETTE COLOR'),
    (dict(PhotometricInterpretation='RGB', SamplesPerPixel=3), 'is RGB, expected MONOCHROME1'),
    (dict(ModalityLUTSequence=[item(ModalityLUTType='HU')]),
     r'ModalityLUTSequence \(0028,3000\), which is not supported'),
    (dict(NumberOfFrames=1, Rows=0), '1 DICOM files cannot be read')])
def test_images_of_other_kinds(tmp_path, tags, says):
    refused(series(tmp_path, each=lambda i: tags if i==4 else {}), says)

# ---- DICOM: files

@pytest.mark.parametrize('syntax', [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
                         ids=lambda o: o.name)
def test_transfer_syntaxes(tmp_path, syntax):
    series(tmp_path, syntax=syntax)
    vol,_ = read(tmp_path)
    check_places(vol, tmp_path.iterdir()); assert vol.array.dtype==np.dtype('u2') and vol.array.dtype.isnative

def test_files_without_preamble_and_without_an_ending(tmp_path):
    series(tmp_path, syntax=ImplicitVRLittleEndian)
    for f in list(tmp_path.iterdir()):
        ds = pydicom.dcmread(f)
        del ds.file_meta
        with open(f.with_suffix(''), 'wb') as o:
            pydicom.filewriter.dcmwrite(o, ds, implicit_vr=True, little_endian=True)
        f.unlink()
    vol,_ = read(tmp_path)
    assert vol.array[:,0,0].tolist()==[0,100,200,300,400] and vol.spacing==(4,1.5,.75)

def test_run_lengths(tmp_path):
    series(tmp_path)
    a = read(tmp_path)[0]
    for f in tmp_path.iterdir():
        ds = pydicom.dcmread(f); ds.compress(RLELossless); ds.save_as(f)
    assert np.array_equal(read(tmp_path)[0].array, a.array)

@pytest.mark.parametrize('how, syntax', [('JPEG','1.2.840.10008.1.2.4.70'), ('JPEG2000','1.2.840.10008.1.2.4.90')])
@pytest.mark.parametrize('signed', [False,True])
def test_jpeg(tmp_path, how, syntax, signed):
    a = np.random.default_rng(0).integers(-500 if signed else 0, 1500, (5,32,24)).astype('i2' if signed else 'u2')
    before = locale.setlocale(locale.LC_ALL)
    w = sitk.ImageFileWriter()
    w.KeepOriginalImageUIDOn(); w.UseCompressionOn(); w.SetCompressor(how)
    for i,s in enumerate(a):
        im = sitk.GetImageFromArray(s)
        for k,v in {'0008|0060':'MR', '0020|000e':'1.2.3', '0008|0018':f'1.2.3.{i}', '0020|0032':f'0\\0\\{5*i}',
                    '0020|0037':'1\\0\\0\\0\\1\\0'}.items(): im.SetMetaData(k,v)
        w.SetFileName(str(tmp_path/f'{i}.dcm')); w.Execute(im)
        ds = pydicom.dcmread(tmp_path/f'{i}.dcm')
        ds.RescaleSlope,ds.RescaleIntercept = (2,-100) if i==2 else (1,0)
        ds.save_as(tmp_path/f'{i}.dcm')
        assert ds.file_meta.TransferSyntaxUID==syntax
    locale.setlocale(locale.LC_ALL, before) # which ITK's encoder changes
    vol,_ = read(tmp_path)
    assert locale.setlocale(locale.LC_ALL)==before
    a = a.astype(int); a[2] = 2*a[2]-100
    assert np.array_equal(vol.array, a) and vol.spacing[0]==5
    b = (tmp_path/'3.dcm').read_bytes()
    (tmp_path/'3.dcm').write_bytes(b[:-300])
    refused(tmp_path, '1 DICOM files cannot be read, for example 3.dcm')

@pytest.mark.parametrize('syntax, todo', [
    (HTJ2KLossless, 'pip install pylibjpeg pylibjpeg-openjpeg'), (MPEG2MPML, 'gdcmconv')], ids=lambda o: str(o)[-20:])
def test_a_compression_that_cannot_be_read(tmp_path, syntax, todo):
    series(tmp_path)
    for f in tmp_path.iterdir():
        ds = pydicom.dcmread(f)
        ds.PixelData = pydicom.encaps.encapsulate([b'1234'*30])
        ds['PixelData'].is_undefined_length = True
        ds['PixelData'].VR = 'OB'
        ds.file_meta.TransferSyntaxUID = syntax; ds.save_as(f)
    assert todo in refused(tmp_path, r's00.dcm: its pixels are compressed as .*'
                                     rf'Transfer Syntax UID \(0002,0010\) is {syntax}')

def test_objects_that_are_not_images_lie_beside(tmp_path):
    vol = read(series(tmp_path))[0]
    for i,uid in enumerate((
        '1.2.840.10008.5.1.4.1.1.88.22','1.2.840.10008.5.1.4.1.1.11.1','1.2.840.10008.5.1.4.1.1.481.3',
        '1.2.840.10008.5.1.4.1.1.104.1','1.2.840.10008.5.1.4.1.1.88.59','1.2.840.10008.5.1.4.1.1.66',
        '1.3.12.2.1107.5.9.1')):
        put(tmp_path/f'x{i}.dcm', pixels(), SOPClassUID=uid, SeriesInstanceUID='1.2.9',
            **dict.fromkeys(('Rows','Columns','PixelData','ImagePositionPatient')))
    put(tmp_path/'seg.dcm', pixels(), SOPClassUID='1.2.840.10008.5.1.4.1.1.66.4', SeriesInstanceUID='1.2.8',
        Modality='SEG')
    put(tmp_path/'dose.dcm', pixels(), SOPClassUID='1.2.840.10008.5.1.4.1.1.481.2', SeriesInstanceUID='1.2.8',
        Modality='RTDOSE')
    put(tmp_path/'DICOMDIR', pixels(), SOPClassUID='1.2.840.10008.1.3.10', Rows=None, Columns=None, PixelData=None)
    (tmp_path/'notes.txt').write_text('Dear colleague')
    again,said = read(tmp_path)
    assert np.array_equal(again.array, vol.array) and again.origin==vol.origin
    assert said==['has 3 objects beside its slices that were left out, for example x2.dcm, RT Structure Set Storage']
    only = tmp_path/'only'; only.mkdir()
    for f in tmp_path.glob('x*.dcm'): f.rename(only/f.name)
    refused(only, 'is a folder without DICOM files')
    (tmp_path/'DICOMDIR').rename(only/'DICOMDIR')
    df = load_cohort(tmp_path, 'dicom')
    assert df.image.tolist()==[str(tmp_path)]

def test_more_pixels_than_rows_and_columns(tmp_path):
    series(tmp_path)
    put(tmp_path/'s02.dcm', pixels(2), ImagePositionPatient=[-20,10,8], PixelData=pixels(2).tobytes()+bytes(12))
    refused(tmp_path, r's02.dcm \(it has more pixels than Rows \(0028,0010\) and Columns')

def test_slices_of_two_frames_of_reference(tmp_path):
    for k in 'ab':
        series(tmp_path/k, 6, each=lambda i: dict(FrameOfReferenceUID=f'1.9.{i%2 if k=="a" else i//3}'))
        refused(tmp_path/k, 'holds 2 volumes .*FrameOfReferenceUID 1.9.0')

def test_slices_that_are_damaged(tmp_path):
    for k,cut in dict(header=300, pixels=-7, name=100).items():
        f = series(tmp_path/k)/'s03.dcm'
        f.write_bytes(f.read_bytes()[:cut])
        refused(tmp_path/k, '1 DICOM files cannot be read, for example s03.dcm .*export the series again')

@pytest.mark.skipif(not hasattr(os,'mkfifo'), reason='needs named pipes')
def test_pipes_among_slices(tmp_path):
    for k in ('pipe.dcm','IM0007'):
        series(tmp_path/k); os.mkfifo(tmp_path/k/k)
        refused(tmp_path/k, f'{k}: is a named pipe')
    series(tmp_path/'link'); (tmp_path/'link'/'z.dcm').symlink_to('/dev/zero')
    refused(tmp_path/'link', 'z.dcm: is a device')
    series(tmp_path/'lost'); (tmp_path/'lost'/'z.dcm').symlink_to(tmp_path/'nowhere')
    refused(tmp_path/'lost', 'z.dcm: cannot be opened')

# ---- DICOM: enhanced multi-frame

@pytest.mark.parametrize('order', [(0,1,2,3,4,5), (0,3,1,4,2,5), (5,4,3,2,1,0), (2,0,5,1,4,3)])
def test_frames_in_any_order(tmp_path, order):
    f = multi(tmp_path/'m.dcm', [(pixels(i), [-3,7,8*z-20], {}) for i,z in enumerate(order)])
    vol,_ = read(tmp_path)
    assert vol.spacing==(8,1.5,.75) and vol.origin==(-3,7,-20)
    raw = pydicom.dcmread(f)
    for frame,own in zip(raw.pixel_array, raw.PerFrameFunctionalGroupsSequence):
        z = (float(own.PlanePositionSequence[0].ImagePositionPatient[2])-vol.origin[2])/vol.spacing[0]
        assert np.array_equal(vol.array[round(z)], frame)

def test_frames_with_gaps_or_without_places(tmp_path):
    multi(tmp_path/'gap'/'m.dcm', [(pixels(i), [0,0,z], {}) for i,z in enumerate((0,24,8,40,16))])
    refused(tmp_path/'gap', r'slices are 8 mm apart, but 16 mm between m.dcm, frame 2 and m.dcm, frame 4')
    multi(tmp_path/'lost'/'m.dcm', [(pixels(i), None if i==2 else [0,0,8*i], {}) for i in range(4)])
    refused(tmp_path/'lost', r'm.dcm, frame 3: has no ImagePositionPatient \(0020,0032\)')
    put(tmp_path/'bare'/'m.dcm', np.stack([pixels(i) for i in range(4)]), NumberOfFrames=4)
    refused(tmp_path/'bare', r'm.dcm: holds 4 frames, but not where they are '
                             r'\(no PerFrameFunctionalGroupsSequence \(5200,9230\)\)')
    f = multi(tmp_path/'few'/'m.dcm', [(pixels(i), [0,0,8*i], {}) for i in range(4)])
    ds = pydicom.dcmread(f); del ds.PerFrameFunctionalGroupsSequence[3]; ds.save_as(f)
    refused(tmp_path/'few', r'NumberOfFrames \(0028,0008\) is 4, but 3 frames are described')

@pytest.mark.parametrize('group', [
    lambda p: dict(FrameContentSequence=[item(TemporalPositionIndex=p+1)]),
    lambda p: dict(MREchoSequence=[item(EffectiveEchoTime=2.5*(p+1))]),
    lambda p: dict(MRDiffusionSequence=[item(DiffusionBValue=400.*p)]),
    lambda p: dict(CardiacSynchronizationSequence=[item(NominalCardiacTriggerDelayTime=35.*p)]),
    lambda p: {}])
@pytest.mark.parametrize('by_phase', [True,False])
def test_frames_of_several_phases(tmp_path, group, by_phase):
    places = [(p,i) for p in range(3) for i in range(4)]
    if not by_phase: places.sort(key=lambda o: o[1])
    multi(tmp_path/'m.dcm', [(pixels(10*p+i), [0,0,8*i], group(p)) for p,i in places])
    refused(tmp_path, 'holds 3 volumes')
    for p in range(3): assert read(tmp_path, phase=p)[0].array[:,0,0].tolist()==[100*(10*p+i) for i in range(4)]

def test_frames_of_several_stacks(tmp_path):
    turn = dict(PlaneOrientationSequence=[item(ImageOrientationPatient=[0,1,0,0,0,1])])
    frames = [(pixels(i), [0,0,8*i], dict(FrameContentSequence=[item(StackID='1')])) for i in range(4)]
    frames += [(pixels(10+i), [8*i,0,0], dict(FrameContentSequence=[item(StackID='2')], **turn)) for i in range(3)]
    multi(tmp_path/'m.dcm', frames[::-1])
    refused(tmp_path, r'holds 2 volumes .* 0: StackID 1 \(4 slices\); 1: StackID 2 \(3 slices\)')
    a,b = (read(tmp_path, phase=p)[0] for p in (0,1))
    assert a.array[:,0,0].tolist()==[0,100,200,300] and b.array[:,0,0].tolist()==[1000,1100,1200]
    assert np.allclose(np.reshape(b.direction,(3,3))[:,2], [1,0,0]) and b.spacing==(8,1.5,.75)

def test_frames_over_several_files_and_with_values_of_their_own(tmp_path):
    scale = lambda i: dict(PixelValueTransformationSequence=[
        item(RescaleSlope=.5*(i+1), RescaleIntercept=-i, RescaleType='US')])
    for k in range(2): multi(tmp_path/f'm{k}.dcm', [(pixels(i), [0,0,8*i], scale(i)) for i in (4+k,2+k,0+k)])
    vol,_ = read(tmp_path)
    assert vol.array.dtype==np.float32 and np.allclose(vol.array, [pixels(i)*.5*(i+1)-i for i in range(6)])

# ---- NIfTI

def nii(path, a, affine=None, header=lambda h: None, dtype=None, **kw):
    im = nibabel.Nifti1Image(a, np.diag([1.2,1.5,4,1]) if affine is None else affine, dtype=dtype or a.dtype)
    header(im.header)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(im, path)
    return path

def patch(path, **fields):
    "Write raw header fields of a NIfTI file, as no library would"
    zipped = path.name.endswith('.gz')
    b = bytearray(gzip.decompress(path.read_bytes()) if zipped else path.read_bytes())
    h = nibabel.Nifti1Header(bytes(b[:348]), check=False)
    for k,v in fields.items(): h[k] = v
    b[:348] = h.binaryblock
    path.write_bytes(gzip.compress(bytes(b)) if zipped else bytes(b))
    return path

def same_as_nibabel(vol, path):
    im = nibabel.load(path)
    lps = np.diag([-1,-1,1])
    assert np.allclose(vol.array, np.asarray(im.dataobj).reshape(vol.array.T.shape).T)
    assert (np.allclose(steps(vol), lps@im.affine[:3,:3], atol=1e-4)
            and np.allclose(vol.origin, lps@im.affine[:3,3], atol=1e-3))

@pytest.mark.parametrize('ext, other', [('.nii.gz','.nii'), ('.nii','.nii.gz'), ('.nii.gz','.hdr'), ('.nii','.img')])
def test_a_namesake_never_stands_in(tmp_path, ext, other):
    f = nii(tmp_path/f'p{ext}', np.full((6,6,4),100,'i2'))
    if other in ('.hdr','.img'): nibabel.save(nibabel.Nifti1Pair(np.full((6,6,4),7,'i2'), np.eye(4)), tmp_path/'p.hdr')
    else: nii(tmp_path/f'p{other}', np.full((5,6,4),7,'i2'))
    vol,_ = read(f)
    assert vol.array.max()==100 and read_size(f)[:3]==(6,6,4)
    same_as_nibabel(vol, f)

def test_a_mask_beside_its_image_under_the_same_name(tmp_path):
    nii(tmp_path/'p.nii.gz', np.full((6,6,4),100,'i2')); nii(tmp_path/'p.nii', np.ones((6,6,4),'u1'))
    assert read_mask(tmp_path/'p.nii', image=read_volume(tmp_path/'p.nii.gz'), classes=2).array.max()==1

def test_endings_in_capitals(tmp_path):
    f = nii(tmp_path/'p.nii.gz', np.full((6,6,4),100,'i2')); f = f.rename(tmp_path/'P.NII.GZ')
    assert read(f)[0].array.max()==100

@pytest.mark.parametrize('mirror', [True,False])
@pytest.mark.parametrize('codes, taken', [((1,2),'qform'), ((1,1),'sform'), ((4,1),'sform'), ((2,4),'qform')])
def test_qform_and_sform_differ(tmp_path, codes, taken, mirror):
    a = np.arange(210, dtype='i2').reshape(7,6,5)
    q = np.diag([1,1,4,1.]); s = q.copy()
    if mirror: s[0] = -1,0,0,6
    else: s[:3,3] = 3,0,0
    im = nibabel.Nifti1Image(a, None)
    im.header.set_zooms((1,1,4))
    im.set_qform(q, codes[0])
    im.set_sform(s, codes[1])
    nibabel.save(im, tmp_path/'i.nii.gz')
    vol,said = read(tmp_path/'i.nii.gz')
    other = dict(qform='sform', sform='qform')[taken]
    assert (len(said)==1 and f'the {taken} was taken; the {other} would put the centre' in said[0]
            and f'form={other!r}' in said[0])
    assert ('axes to LAS' in said[0] or 'instead of LAS' in said[0]) if mirror else '3.0 mm away' in said[0]
    # as SimpleITK takes it
    assert np.allclose(vol.direction, sitk.ReadImage(tmp_path/'i.nii.gz').GetDirection(), atol=1e-6)
    for form,A in dict(qform=q, sform=s).items():
        for v in (read(tmp_path/'i.nii.gz', form=form)[0], read(f'{tmp_path}/i.nii.gz#form={form}')[0]):
            assert (np.allclose(steps(v), np.diag([-1,-1,1])@A[:3,:3], atol=1e-6)
                    and np.allclose(v.origin, np.diag([-1,-1,1])@A[:3,3], atol=1e-6))
    if taken=='sform': same_as_nibabel(vol, tmp_path/'i.nii.gz')

def test_qform_and_sform_that_agree_are_silent(tmp_path):
    rng = np.random.default_rng(2)
    for k in range(8):
        q,_ = np.linalg.qr(rng.normal(size=(3,3)))
        A = np.eye(4); A[:3,:3] = q*rng.uniform(.4,5,3); A[:3,3] = rng.uniform(-300,300,3)
        f = nii(tmp_path/f'{k}.nii.gz', rng.integers(0,99,(40,50,30)).astype('i2'), A,
                lambda h: (h.set_qform(A,1), h.set_sform(A,1)))
        vol,said = read(f)
        assert not said
        same_as_nibabel(vol, f)
        A[:3,3] += 1e-4 # rounding
        f = nii(tmp_path/f'{k}.nii.gz', rng.integers(0,99,(40,50,30)).astype('i2'), A, lambda h: h.set_sform(A,2))
        assert not read(f)[1]

def test_differing_forms_are_said_once_for_a_cohort(tmp_path):
    for i in range(4):
        q = np.diag([1,1,4,1.]); s = q.copy(); s[0,3] = 3+i
        for d in ('images','masks'):
            im = nibabel.Nifti1Image(np.random.default_rng(i).integers(0,2,(16,16,5)).astype('u1'), None)
            im.header.set_zooms((1,1,4)); im.set_qform(q,1); im.set_sform(s,2)
            (tmp_path/d).mkdir(exist_ok=True); nibabel.save(im, tmp_path/d/f'{i}.nii.gz')
    df = load_cohort(tmp_path, 'folder', classes=('background','x'))
    with pytest.warns(VolumeWarning) as seen:
        SliceStore(tmp_path/'store', Recipe(size=16, spacing=1)).prepare(df, workers=0, progress=False)
    text = '\n'.join(str(o.message) for o in seen)
    assert text.count('a qform and an sform that differ')==1 and '8 files' in text
    df = load_cohort(tmp_path, 'folder', form='sform')
    assert all(o.endswith('.nii.gz#form=sform') for o in [*df.image, *df['mask']])
    assert [read(o)[0].origin[0] for o in df.image]==[-3,-4,-5,-6]
    only = patch(nii(tmp_path/'q.nii', np.ones((2,2,2),'u1')), qform_code=1, sform_code=0)
    assert read(only, form='sform')[1]==['has no sform: its qform was taken'] and not read(only, form='qform')[1]

def test_no_form_at_all_is_said(tmp_path):
    f = patch(nii(tmp_path/'a.nii', np.ones((3,4,5),'u1')), qform_code=0, sform_code=0)
    vol,said = read(f)
    assert (vol.spacing==pytest.approx((4,1.5,1.2))
            and said==['has neither qform nor sform: its axes are taken to run to the left, back and head'])

@pytest.mark.parametrize('value', [0,-1.5,np.nan,np.inf])
@pytest.mark.parametrize('axis', [1,2,3])
@pytest.mark.parametrize('forms', [(1,0),(0,1),(0,0)])
def test_nifti_spacings(tmp_path, value, axis, forms):
    f = nii(tmp_path/'a.nii.gz', np.ones((3,4,5),'u1'))
    p = nibabel.load(f).header['pixdim'].copy(); p[axis] = value
    refused(patch(f, pixdim=p, qform_code=forms[0], sform_code=forms[1]),
            r'pixdim is .*, expected positive spacings; correct it')

@pytest.mark.parametrize('field, value', [
    ('srow_x',[0,0,0,5]), ('srow_y',[0,np.nan,0,0]), ('srow_z',[0,0,4,np.inf]), ('qoffset_x',np.nan),
    ('quatern_b',np.nan), ('qoffset_z',-np.inf), ('quatern_c',5.)])
def test_nifti_placements_are_numbers(tmp_path, field, value):
    f = nii(tmp_path/'a.nii.gz', np.ones((3,4,5),'u1'), header=lambda h: h.set_qform(np.diag([1.2,1.5,4,1]),1))
    refused(patch(f, **{field:value}), 'has a damaged header: its [qs]form')

@pytest.mark.parametrize('ext', ['.nii.gz','.nii'])
@pytest.mark.parametrize('shear', [2e-4,1e-3,1e-2,.3])
def test_shear(tmp_path, ext, shear):
    A = np.diag([1,1,3,1.]); A[0,1] = shear
    f = nii(tmp_path/f'a{ext}', np.ones((3,4,5),'i2'), A, lambda h: h.set_qform(None, 0))
    if shear>1e-3:
        refused(f, r'has axes that are not perpendicular \(off by .* degrees\): '
                   'resample it onto a rectangular grid first, for example with nibabel')
    else:
        vol,said = read(f)
        d = np.reshape(vol.direction,(3,3))
        assert np.allclose(d@d.T, np.eye(3), atol=1e-12) and 'not quite perpendicular' in said[0]
        assert np.abs(steps(vol)-np.diag([-1,-1,1])@A[:3,:3]).max()<=shear

@pytest.mark.parametrize('shear', [5e-4,2e-2])
@pytest.mark.parametrize('ext', ['.mha','.nrrd'])
def test_shear_in_other_files(tmp_path, ext, shear):
    f = write_volume(Volume(np.ones((3,4,5),'i2')), tmp_path/f'a{ext}')
    old,new = ((b'TransformMatrix = 1 0 0', f'TransformMatrix = 1 {shear} 0') if ext=='.mha' else
               (b'(1,0,0) (0,1,0)', f'(1,{shear},0) (0,1,0)'))
    edit(f, old, new)
    if shear>1e-3: refused(f, 'not perpendicular')
    else: assert 'not quite perpendicular' in read(f)[1][0]

@pytest.mark.parametrize('code, factor', [(0,1),(1,1000),(2,1),(3,1e-3)])
@pytest.mark.parametrize('forms', [(1,0),(0,1),(1,1),(0,0)])
def test_nifti_units(tmp_path, code, factor, forms):
    A = np.diag([1.2,1.5,4,1])/factor; A[:3,3] = np.array([7,-8,9])/factor; A[3,3] = 1
    f = nii(tmp_path/'a.nii.gz', np.ones((3,4,5),'u1'), A, lambda h: h.set_qform(A, 1))
    vol,said = read(patch(f, xyzt_units=code|8, qform_code=forms[0], sform_code=forms[1]))
    assert vol.spacing==pytest.approx((4,1.5,1.2)) and (forms==(0,0) or np.allclose(vol.origin, [-7,8,9]))
    assert any('converted to mm' in o for o in said)==(factor!=1)

def test_a_unit_that_is_none(tmp_path):
    refused(patch(nii(tmp_path/'a.nii', np.ones((3,4,5),'u1')), xyzt_units=5),
            'the unit of its geometry is code 5, expected 1')
    f = write_volume(Volume(np.ones((3,4,5),'i2')), tmp_path/'a.mha')
    edit(f, b'ElementType', 'DistanceUnits = inch\nElementType')
    refused(f, "a geometry in 'inch'")

def edit(path, old, new):
    b = path.read_bytes()
    assert old in b, b[:600]
    path.write_bytes(b.replace(old, new if isinstance(new,bytes) else new.encode('utf-8'), 1))
    return path

@pytest.mark.parametrize('ext', ['.mha','.nrrd','.mhd','.nhdr'])
@pytest.mark.parametrize('unit, factor', [('um',1e-3),('mm',1),('cm',10),('m',1000)])
def test_units_of_other_files(tmp_path, ext, unit, factor):
    vol = Volume(np.ones((3,4,5),'i2'), (4.,1.5,1.2), (7.,-8.,9.))
    f = write_volume(Volume(vol.array, tuple(np.array(vol.spacing)/factor), tuple(np.array(vol.origin)/factor)),
                     tmp_path/f'a{ext}')
    edit(f, *((b'ElementType', f'DistanceUnits = {unit}\nElementType') if ext[1]=='m' else
              (b'kinds', f'space units: "{unit}" "{unit}" "{unit}"\nkinds')))
    back,said = read(f)
    assert np.allclose(back.spacing, vol.spacing) and np.allclose(back.origin, vol.origin) and len(said)==(unit!='mm')

@pytest.mark.parametrize('dtype', ['i2','u1','f4'])
@pytest.mark.parametrize('order', ['<','>'])
def test_byte_orders_and_scales(tmp_path, dtype, order):
    im = nibabel.Nifti1Image(np.arange(60).reshape(3,4,5).astype(order+dtype), np.diag([1.2,1.5,4,1]),
                             header=nibabel.Nifti1Header(endianness=order))
    nibabel.save(im, tmp_path/'a.nii.gz')
    same_as_nibabel(read(tmp_path/'a.nii.gz')[0], tmp_path/'a.nii.gz')
    patch_big = dict(scl_slope=.25, scl_inter=-3)
    b = bytearray(gzip.decompress((tmp_path/'a.nii.gz').read_bytes()))
    b[112:120] = struct.pack(order+'ff', *patch_big.values())
    (tmp_path/'b.nii').write_bytes(b)
    vol,_ = read(tmp_path/'b.nii')
    assert vol.array.dtype==np.float32 and nibabel.load(tmp_path/'b.nii').header.endianness==order
    same_as_nibabel(vol, tmp_path/'b.nii')

@pytest.mark.parametrize('slope, inter, ok', [
    (0,5,True), (np.nan,np.nan,True), (1,0,True), (np.inf,0,False), (2,np.nan,False), (-1,np.inf,False)])
def test_odd_scales(tmp_path, slope, inter, ok):
    f = patch(nii(tmp_path/'a.nii.gz', np.arange(60,dtype='i2').reshape(3,4,5)), scl_slope=slope, scl_inter=inter)
    if ok: assert np.array_equal(read(f)[0].array.T.ravel(), np.arange(60)) and read(f)[0].array.dtype==np.int16
    else: refused(f, 'scl_slope is .* and scl_inter .*, expected finite numbers')

def test_extensions_members_and_frames(tmp_path):
    a = np.arange(60,dtype='i2').reshape(3,4,5)
    im = nibabel.Nifti1Image(a, np.eye(4))
    im.header.extensions.append(nibabel.nifti1.Nifti1Extension('comment', b'n+1 '*400))
    nibabel.save(im, tmp_path/'a.nii.gz'); same_as_nibabel(read(tmp_path/'a.nii.gz')[0], tmp_path/'a.nii.gz')
    b = gzip.decompress((tmp_path/'a.nii.gz').read_bytes())
    for k,cuts in dict(two=(400,), three=(100,352), four=(1,5,len(b)-1)).items():
        pieces = np.split(np.frombuffer(b,'u1'), cuts)
        (tmp_path/f'{k}.nii.gz').write_bytes(b''.join(gzip.compress(o.tobytes()) for o in pieces))
        same_as_nibabel(read(tmp_path/f'{k}.nii.gz')[0], tmp_path/'a.nii.gz')
    whole = (tmp_path/'two.nii.gz').read_bytes()
    (tmp_path/'cut.nii.gz').write_bytes(whole[:-9]); refused(tmp_path/'cut.nii.gz', 'is cut off')
    (tmp_path/'more.nii.gz').write_bytes(whole+gzip.compress(b'more'))
    refused(tmp_path/'more.nii.gz', 'but there are more')
    for shape in ((3,4,5,1),(3,4,5,1,1)):
        f = nii(tmp_path/'f.nii.gz', a.reshape(shape)); assert np.array_equal(read(f)[0].array.T, a)
        assert read(f, channels=True)[0].array.shape==(1,5,4,3)

def test_several_members_in_an_nrrd_file(tmp_path):
    a = np.random.default_rng(0).integers(0,999,(5,4,3)).astype('i2')
    f = write_volume(Volume(a), tmp_path/'a.nrrd')
    head,data = f.read_bytes().split(b'\n\n', 1)
    raw = gzip.decompress(data)
    f.write_bytes(head+b'\n\n'+gzip.compress(raw[:50])+gzip.compress(raw[50:]))
    try: assert np.array_equal(read(f)[0].array, a)
    except VolumeError as e: assert 'SimpleITK cannot use it' in str(e)

@pytest.mark.parametrize('kind', ['RGB','RGBA'])
def test_colours_and_vectors(tmp_path, kind):
    c = len(kind)
    a = np.random.default_rng(0).integers(0,255,(3,4,5,c)).astype('u1')
    rgb = np.ascontiguousarray(a).view([(o,'u1') for o in kind])[...,0]
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), tmp_path/'rgb.nii.gz')
    refused(tmp_path/'rgb.nii.gz', rf'sizes \(3, 4, 5\) and {c} components per voxel, expected 3; give channels=True')
    assert np.array_equal(read(tmp_path/'rgb.nii.gz', channels=True)[0].array, a.T)
    v = np.random.default_rng(0).normal(size=(3,4,5,1,c)).astype('f4')
    nii(tmp_path/'vector.nii.gz', v, header=lambda h: h.set_intent('vector'))
    refused(tmp_path/'vector.nii.gz', 'expected 3; give channels=True')
    assert np.array_equal(read(tmp_path/'vector.nii.gz', channels=True)[0].array, v[...,0,:].T)
    for ext in ('.mha','.nrrd'):
        sitk.WriteImage(sitk.GetImageFromArray(a.transpose(2,1,0,3), isVector=True), tmp_path/f'v{ext}')
        refused(tmp_path/f'v{ext}', f'{c} components per voxel')
        assert np.array_equal(read(tmp_path/f'v{ext}', channels=True)[0].array, a.T)

def test_colours_at_a_single_point_in_time(tmp_path):
    a = np.arange(120, dtype=np.float32).reshape(1,3,4,5,2)
    sitk.WriteImage(sitk.GetImageFromArray(a, isVector=True), str(tmp_path/'a.mha'))
    vol = read_volume(tmp_path/'a.mha', channels=True)
    np.testing.assert_array_equal(vol.array, np.moveaxis(a[0], -1, 0))

@pytest.mark.parametrize('spacing', [1., (1.,1.), (1.,1.,0.)], ids=str)
def test_a_spacing_to_resample_to_is_three_numbers(spacing):
    with pytest.raises(ValueError, match='resample: spacing must be three positive numbers .* not'):
        resample(Volume(np.zeros((2,3,4), np.float32)), spacing=spacing)

def test_pairs_and_analyze(tmp_path):
    a = np.arange(60,dtype='i2').reshape(3,4,5)
    nibabel.save(nibabel.Nifti1Pair(a, np.eye(4)), tmp_path/'pair.hdr')
    nibabel.save(nibabel.AnalyzeImage(a, np.eye(4)), tmp_path/'old.hdr')
    for f in ('pair.hdr','pair.img','old.hdr','old.img'):
        refused(tmp_path/f, 'Analyze or NIfTI pair .* save it as one .nii.gz file')
    (tmp_path/'pair.hdr').rename(tmp_path/'pair.nii'); refused(tmp_path/'pair.nii', 'is the header of a pair')
    (tmp_path/'old.hdr').rename(tmp_path/'old.nii'); refused(tmp_path/'old.nii', 'not a NIfTI file')

# ---- masks with a scale factor

@pytest.mark.parametrize('labels', [(0,1,2,3,4), (0,1), (0,1,20), (0,3,9)])
@pytest.mark.parametrize('stored', ['i2','u1','i1'])
def test_scaled_labels(tmp_path, labels, stored):
    m = np.zeros((8,8,8)); m[np.arange(len(labels))] = np.array(labels,float)[:,None,None]
    im = nibabel.Nifti1Image(m, np.eye(4)); im.set_data_dtype(stored); nibabel.save(im, tmp_path/'m.nii.gz')
    got = read_mask(tmp_path/'m.nii.gz')
    assert got.array.dtype==np.uint8 and np.array_equal(got.array.T, m)
    assert read_mask(tmp_path/'m.nii.gz', labels={o:i for i,o in enumerate(labels)}).array.max()==len(labels)-1

@pytest.mark.parametrize('values', [(0,.5,1), (0,.93,1), (0,.98,1,1.01), (0,1,1.4), (-.4,0,1)])
@pytest.mark.parametrize('ext', ['.nii.gz','.mha'])
def test_soft_masks_are_none(tmp_path, values, ext):
    a = np.resize(np.array(values,'f4'), (3,4,5))
    write_volume(Volume(a), tmp_path/f'm{ext}')
    with pytest.raises(VolumeError, match='voxels have fractional values'): read_mask(tmp_path/f'm{ext}')

# ---- MetaImage and NRRD headers

@pytest.mark.parametrize('ext', ['.mha','.mhd'])
@pytest.mark.parametrize('line, bad', [
    (line, bad) for line in ('ElementSpacing','Offset','TransformMatrix') for bad in ('nan','inf','-inf')
]+[('ElementSpacing','0'),('ElementSpacing','-2')])
def test_meta_geometry(tmp_path, ext, line, bad):
    f = write_volume(Volume(np.ones((3,4,5),'i2')), tmp_path/f'a{ext}')
    n = 9 if line=='TransformMatrix' else 3
    old = re.search(rb'^'+line.encode()+rb' = [^\n]*', f.read_bytes(), re.M)[0]
    edit(f, old, f'{line} = '+' '.join(['1']*(n-1)+[bad]))
    refused(f, f'has a damaged header: {line} is .*, expected (positive|finite) numbers')

@pytest.mark.parametrize('ext', ['.nrrd','.nhdr'])
@pytest.mark.parametrize('old, new', [
    (b'(0,0,1)','(0,0,0)'), (b'(0,0,1)','(nan,nan,nan)'), (b'(0,0,1)','(0,0,inf)'),
    (b'origin: (0,0,0)','origin: (0,nan,0)'), (b'origin: (0,0,0)','origin: (inf,0,0)')])
def test_nrrd_geometry(tmp_path, ext, old, new):
    refused(edit(write_volume(Volume(np.ones((3,4,5),'i2')), tmp_path/f'a{ext}'), old, new),
            r'has a damaged header: space (directions|origin)')

@pytest.mark.parametrize('spacings', ['1 1 0','1 nan 1','-1 1 1','inf 1 1','1 1'])
def test_nrrd_spacings(tmp_path, spacings):
    f = write_volume(Volume(np.ones((3,4,5),'i2')), tmp_path/'a.nrrd')
    edit(f, b'space: left-posterior-superior\n', '')
    edit(f, b'space directions: (1,0,0) (0,1,0) (0,0,1)', f'spacings: {spacings}')
    edit(f, b'space origin: (0,0,0)\n', '')
    refused(f, 'has a damaged header: .*spacings')
    edit(f, f'spacings: {spacings}'.encode(), 'spacings: 1 2 3')
    vol,said = read(f)
    assert vol.spacing==(3,2,1) and 'does not say how it lies in the patient' in said[0]

@pytest.mark.parametrize('space, flips', [
    ('right-anterior-superior',(-1,-1,1)), ('RAS',(-1,-1,1)),
    ('left-anterior-superior',(1,-1,1)), ('LPS',(1,1,1))])
def test_nrrd_spaces(tmp_path, space, flips):
    f = edit(write_volume(Volume(np.ones((3,4,5),'i2'), (3.,2.,1.)), tmp_path/'a.nrrd'),
             b'left-posterior-superior', space)
    vol,said = read(f)
    assert np.allclose(steps(vol), np.diag(flips)*np.array([1,2,3])) and not said
    assert read(edit(f, space.encode(), 'scanner-xyz'))[1]

def raw_nrrd(path, *lines, a=np.arange(60,dtype='i2').reshape(3,4,5)):
    path.write_bytes('\n'.join(['NRRD0004','type: short',*lines,'endian: little','encoding: raw','','']).encode()
                     +a.astype('<i2').tobytes())
    return path

def test_nrrd_axes_without_a_direction(tmp_path):
    space = ('dimension: 3','space: left-posterior-superior','sizes: 5 4 3')
    refused(raw_nrrd(tmp_path/'a.nrrd', *space, 'space directions: (1,0,0) (0,1,0) none'),
            '3 sizes, but space directions are')
    refused(raw_nrrd(tmp_path/'b.nrrd', *space, 'space directions: (1,0,0) (0,1,0)'),
            '3 sizes, but space directions are')
    assert (read(raw_nrrd(tmp_path/'c.nrrd', *space, 'space directions: (1,0,0) (0,1,0) (0,0,1)'))[1]
            ==['does not say where it lies (`space origin`): it is taken to begin at 0'])
    vector = ('dimension: 4','space: left-posterior-superior','sizes: 3 5 4 1','kinds: vector domain domain domain',
              'space origin: (1,2,3)')
    vol,said = read(raw_nrrd(tmp_path/'d.nrrd', *vector, 'space directions: none (1,0,0) (0,1,0) (0,0,2)'),
                    channels=True)
    assert vol.array.shape==(3,1,4,5) and vol.spacing==(2,1,1) and not said

@pytest.mark.parametrize('space, ok', [
    ('left-posterior-superior-time',True), ('right-anterior-superior-time',False), ('RAST',False)])
def test_nrrd_spaces_with_time(tmp_path, space, ok):
    f = raw_nrrd(tmp_path/'a.nrrd', 'dimension: 4', f'space: {space}', 'sizes: 5 4 3 1',
                 'kinds: domain domain domain domain', 'space directions: (1,0,0,0) (0,1,0,0) (0,0,2,0) (0,0,0,1)',
                 'space origin: (1,2,3,0)')
    if ok: assert read(f)[0].origin==(1,2,3) and not read(f)[1]
    else: refused(f, 'has a space that cannot be read')

@pytest.mark.parametrize('line, new', [
    ('TransformMatrix','0 0 0 0 0 0 0 0 0'), ('TransformMatrix','2 0 0 0 1 0 0 0 1'),
    ('TransformMatrix','1 0 0 0 1 0'), ('Offset','0 0')])
def test_meta_axes(tmp_path, line, new):
    f = write_volume(Volume(np.ones((3,4,5),'i2')), tmp_path/'a.mha')
    old = re.search(rb'^'+line.encode()+rb' = [^\n]*', f.read_bytes(), re.M)[0]
    refused(edit(f, old, f'{line} = {new}'), f'has a damaged header: {line} is .{new}., expected')

def test_meta_without_a_place(tmp_path):
    f = write_volume(Volume(np.ones((3,4,5),'i2')), tmp_path/'a.mha')
    edit(f, b'TransformMatrix = 1 0 0 0 1 0 0 0 1\n', '')
    assert 'does not say how it lies in the patient (TransformMatrix)' in read(f)[1][0]
    edit(f, b'Offset = 0 0 0\n', '')
    assert '(Offset, TransformMatrix)' in read(f)[1][0]

@pytest.mark.parametrize('ext', ['.mha','.nrrd'])
def test_byte_orders_of_other_files(tmp_path, ext):
    a = np.arange(60,dtype='i2').reshape(3,4,5)
    f = write_volume(Volume(a), tmp_path/f'a{ext}')
    head = (b'ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = True\nOffset = 0 0 0\n'
            b'TransformMatrix = 1 0 0 0 1 0 0 0 1\nDimSize = 5 4 3\nElementSpacing = 1 1 2\nElementType = MET_SHORT\n'
            b'ElementDataFile = LOCAL\n' if ext=='.mha' else
            b'NRRD0004\ntype: short\ndimension: 3\nspace: LPS\nsizes: 5 4 3\n'
            b'space directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (0,0,0)\nendian: big\nencoding: raw\n\n')
    f.write_bytes(head+a.astype('>i2').tobytes())
    vol,said = read(f)
    assert np.array_equal(vol.array, a) and vol.spacing==(2,1,1) and not said

def test_images_of_two_dimensions(tmp_path):
    f = patch(nii(tmp_path/'a.nii', np.ones((5,6),'i2'), np.eye(4)), pixdim=[1,1,1,0,0,0,0,0], qform_code=0)
    assert read(f)[0].array.shape==(1,6,5) and 'is a 2D image: it is taken to be 1 mm thick' in read(f)[1]
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4,5),'i2')), tmp_path/'b.mha')
    assert (read(tmp_path/'b.mha')[0].array.shape==(1,4,5)
            and 'is a 2D image: it is taken to be 1 mm thick' in read(tmp_path/'b.mha')[1])

def test_intensity_functions(tmp_path):
    a = np.arange(60,dtype='i2').reshape(3,4,5)
    f = edit(write_volume(Volume(a), tmp_path/'a.mha'), b'ElementType',
             'ElementToIntensityFunctionSlope = 0.5\nElementToIntensityFunctionOffset = -3\nElementType')
    assert np.allclose(read(f)[0].array, a*.5-3)
    refused(edit(f, b'Slope = 0.5', 'Slope = nan'), 'Slope is .nan., expected finite')
    g = edit(write_volume(Volume(a), tmp_path/'a.nrrd'), b'kinds', 'old min: 0\nold max: 9\nkinds')
    refused(g, 'has quantised voxels')

# ---- files that do harm

def kinds(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    (tmp_path/'link').symlink_to(tmp_path/'pipe'); (tmp_path/'zero').symlink_to('/dev/zero')
    return dict(pipe='a named pipe', link='a named pipe', zero='a device')

@pytest.mark.skipif(not hasattr(os,'mkfifo'), reason='needs named pipes')
@pytest.mark.parametrize('ext', [*extensions,'.dcm',''])
def test_only_regular_files_are_opened(tmp_path, ext):
    for k,what in kinds(tmp_path).items():
        f = tmp_path/f'x_{k}{ext}'
        f.symlink_to(tmp_path/k)
        for use in (read_volume, read_size, scan_files, read_mask):
            with pytest.raises(VolumeError, match=f'is {what}.*, not a regular file, and was not opened'): use(f)

@pytest.mark.skipif(not hasattr(os,'mkfifo'), reason='needs named pipes')
@pytest.mark.parametrize('ext', ['.mhd','.nhdr'])
def test_data_files_that_are_pipes(tmp_path, ext):
    f = write_volume(Volume(np.ones((3,4,5),'i2')), tmp_path/f'a{ext}')
    data = next(o for o in tmp_path.iterdir() if o!=f)
    for k,what in kinds(tmp_path).items():
        data.unlink(); data.symlink_to(tmp_path/k)
        refused(f, f'has its voxels in {data.name}, which is {what}')

@pytest.mark.skipif(not hasattr(os,'mkfifo'), reason='needs named pipes')
@pytest.mark.parametrize('column', ['image','mask'])
def test_pipes_in_a_cohort_do_not_hang(tmp_path, column):
    "In a process of its own, with a time limit: opening the pipe would wait for ever"
    for i in range(3):
        for k in ('','m'):
            write_volume(Volume(np.random.default_rng(i).integers(0,2,(3,16,16)).astype('u1')),
                         tmp_path/f'{i}{k}.nii.gz')
    os.mkfifo(tmp_path/'p.nii.gz')
    rows = [f'{"p" if i==1 and column=="image" else i}.nii.gz,{"p" if i==1 and column=="mask" else f"{i}m"}.nii.gz,s{i}'
            for i in range(3)]
    (tmp_path/'c.csv').write_text('image,mask,scan\n'+'\n'.join(rows))
    code = '''
        import sys
        from fastmiseg.scans.cohort import *
        from fastmiseg.scans.split import split_cohort
        from fastmiseg.scans.recipe import Recipe
        from fastmiseg.scans.store import SliceStore
        from fastmiseg.scans.messages import VolumeError
        df = load_cohort(sys.argv[1]+'/c.csv', classes=('background','x'))
        print(check_cohort(df, show=False).problem.tolist())
        df = split_cohort(df, 1, 1)
        try: SliceStore(sys.argv[1]+'/store', Recipe(size=16, spacing=1)).prepare(df, workers=0, progress=False)
        except VolumeError as e: print(e)'''
    p = subprocess.run([sys.executable, '-c', textwrap.dedent(code), str(tmp_path)],
                       capture_output=True, text=True, timeout=120)
    assert p.returncode==0 and p.stdout.count('is a named pipe (FIFO), not a regular file')>=2, (p.stdout, p.stderr)

@pytest.mark.parametrize('name', [
    '/etc/passwd','../secret.raw','sub/../../secret.raw','~/secret.raw','C:\\secret.raw','..\\secret.raw',
    '\\\\server\\x.raw'])
@pytest.mark.parametrize('ext', ['.mha','.mhd','.nrrd','.nhdr'])
def test_headers_read_nothing_outside_their_folder(tmp_path, ext, name):
    (tmp_path/'secret.raw').write_bytes(b'secret'*1000)
    f = write_volume(Volume(np.ones((3,4,5),'i2')), tmp_path/'in'/f'a{ext}')
    head = f.read_bytes().split(b'\n\n')[0].rstrip() if ext[1]=='n' else f.read_bytes()
    if ext in ('.mha','.mhd'):
        head = re.sub(rb'ElementDataFile = [^\n]*', b'ElementDataFile = '+name.replace('\\','\\\\').encode(), head)
    else: head = re.sub(rb'\ndata file: [^\n]*', b'', head)+b'\ndata file: '+name.encode()+b'\n'
    f.write_bytes(head)
    refused(f, 'names a file outside its own folder')
    with pytest.raises(VolumeError, match='outside its own folder'): scan_files(f)

def test_a_data_file_below_its_header_is_read(tmp_path):
    a = np.arange(60,dtype='i2').reshape(3,4,5)
    sitk.WriteImage(sitk.GetImageFromArray(a), tmp_path/'a.mhd')
    (tmp_path/'raw').mkdir(); (tmp_path/'a.raw').rename(tmp_path/'raw'/'a.raw')
    edit(tmp_path/'a.mhd', b'= a.raw', '= raw/a.raw')
    assert (np.array_equal(read(tmp_path/'a.mhd')[0].array, a)
            and scan_files(tmp_path/'a.mhd')[1]==str(tmp_path/'raw'/'a.raw'))

@pytest.mark.parametrize('ext, old, new', [
    ('.mha', b'ElementDataFile', 'HeaderSize = -1\nElementDataFile'),
    ('.mhd', b'ElementDataFile', 'HeaderSize = -1\nElementDataFile'),
    ('.mha', b'ElementDataFile', 'HeaderSize = -7\nElementDataFile'),
    ('.nrrd', b'kinds', 'byte skip: -1\nkinds'), ('.nhdr', b'kinds', 'byteskip: -1\nkinds')])
def test_unknown_lengths(tmp_path, ext, old, new):
    f = tmp_path/f'a{ext}'
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((3,4,5),'i2')), f)
    refused(edit(f, old, new), r'does not say where its voxels begin \((HeaderSize|byte skip) is')

def test_keys_that_stand_twice(tmp_path):
    f = write_volume(Volume(np.ones((3,4,5),'i2')), tmp_path/'a.mha')
    refused(edit(f, b'ElementType', 'DimSize = 5 4 2\nElementType'), "says 'DimSize' twice")
    f = write_volume(Volume(np.ones((3,4,5),'i2')), tmp_path/'a.nrrd')
    refused(edit(f, b'kinds', 'sizes: 5 4 2\nkinds'), "says 'sizes' twice")

@pytest.mark.parametrize('ext', ['.nii.gz','.mha','.nrrd'])
@pytest.mark.parametrize('lo, hi', [(0,1e39),(-1e300,0),(-3e38,3e38)])
def test_ranges_that_float32_cannot_hold(tmp_path, ext, lo, hi):
    a = np.ones((3,4,5)); a[0,0,0],a[1,1,1] = lo,hi
    refused(write_volume(Volume(a), tmp_path/f'a{ext}'), r'its voxels range from .* to .*, which float32 cannot hold')
    refused(tmp_path/f'a{ext}', 'float32 cannot hold', nan_to_zero=True)

def test_ranges_by_scale(tmp_path):
    refused(patch(nii(tmp_path/'a.nii.gz', np.arange(60,dtype='i2').reshape(3,4,5)), scl_slope=3e37),
            'float32 cannot hold')
    f = edit(write_volume(Volume(np.arange(60,dtype='i2').reshape(3,4,5)), tmp_path/'a.mha'),
             b'ElementType', 'ElementToIntensityFunctionSlope = 1e38\nElementType')
    refused(f, 'float32 cannot hold')

@pytest.mark.parametrize('ext', ['.nii.gz','.mha','.nrrd'])
def test_sizes_are_compared_with_free_memory(tmp_path, ext, monkeypatch):
    f = write_volume(Volume(np.zeros((60,1000,1000),'u1')), tmp_path/f'a{ext}')
    assert f.stat().st_size<10**6
    unpacked = []
    monkeypatch.setattr(intact, 'free_memory', lambda: 10**8)
    monkeypatch.setattr(intact, '_count',
                        lambda pieces, limit, keep=None: unpacked.append(limit) or intact_count(pieces, limit, keep))
    refused(f, r'needs about 0.2 GB of memory, but 0.1 GB are free: close other programs, crop or resample')
    assert max(unpacked, default=0)<1000 # no more than the header

intact_count = intact._count

def test_memory_of_a_series(tmp_path, monkeypatch):
    series(tmp_path, 3)
    for f in tmp_path.iterdir():
        ds = pydicom.dcmread(f); ds.Rows = ds.Columns = 60000; ds.save_as(f)
    monkeypatch.setattr(intact, 'free_memory', lambda: 10**9)
    refused(tmp_path, r'needs about 64.8 GB of memory, but 1.0 GB are free')

def test_memory_under_a_limit(tmp_path):
    "The process's own limit counts too"
    pytest.importorskip('resource')
    f = write_volume(Volume(np.zeros((300,1000,1000),'u1')), tmp_path/'a.nii.gz')
    code = '''
        import resource, sys
        from fastmiseg.scans.volume import read_volume
        import psutil
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms+(200<<20), resource.RLIM_INFINITY))
        try: read_volume(sys.argv[1])
        except ValueError as e: print(e)'''
    p = subprocess.run([sys.executable, '-c', textwrap.dedent(code), str(f)], capture_output=True, text=True)
    assert 'needs about 0.9 GB of memory, but 0.2 GB are free' in p.stdout, (p.stdout, p.stderr)

@pytest.mark.parametrize('name, sform', [
    ('steps of 1 mm', np.diag([-1,-1,1,1.])),
    ('turned, and half', np.array([[0,.75,0,5],[-.75,0,0,6],[0,0,5,7],[0,0,0,1.]]))])
def test_an_sform_without_the_spacings(tmp_path, name, sform):
    "As in the public ACDC hearts: pixdim has the spacings, the sform only the axes"
    im = nibabel.Nifti1Image(np.zeros((6,5,4), np.int16), None)
    im.header.set_zooms((1.5,1.5,10)); im.set_sform(sform, 2, update_affine=False); im.header.set_sform(sform, 2)
    nibabel.save(im, p:=tmp_path/'a.nii.gz')
    assert nibabel.load(p).header['qform_code']==0
    with pytest.warns(UserWarning, match=r'has spacings \(1.5, 1.5, 10\) mm in pixdim, but .* '
                                         'those of the pixdim were taken, as SimpleITK does'):
        vol = read_volume(p)
    itk = sitk.ReadImage(str(p))
    assert np.allclose(vol.spacing[::-1], itk.GetSpacing()) and np.allclose(vol.origin, itk.GetOrigin())
    assert np.allclose(vol.direction, itk.GetDirection())
    with pytest.warns(UserWarning, match='those of the sform were taken'): vol = read_volume(p, form='sform')
    assert np.allclose(vol.spacing[::-1], np.linalg.norm(sform[:3,:3], axis=0))

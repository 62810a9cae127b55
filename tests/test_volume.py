"Reading and writing scans: round trips, hostile paths, processes, DICOM series"
import os, re, subprocess, sys, tempfile, textwrap, threading, warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import nibabel, numpy as np, pytest, SimpleITK as sitk
from hypothesis import HealthCheck, given, settings, strategies as st

from fastmiseg.scans.formats import extensions
from fastmiseg.scans.masks import check_same_geometry, read_mask, read_scan
from fastmiseg.scans.messages import (
    VolumeError, VolumeWarning, collect_warnings, summarise_warnings)
from fastmiseg.scans.volume import Volume, read_volume, resample, write_volume

def rotation(rng):
    q,r = np.linalg.qr(rng.normal(size=(3,3)))
    return tuple((q*np.sign(np.linalg.det(q))).ravel().tolist())

def scan(rng=None, dtype=np.int16, shape=(4,6,5), **kw):
    rng = rng or np.random.default_rng(0)
    a = rng.integers(0, 100, shape).astype(dtype)
    return Volume(a, **{**dict(spacing=(5.,1.25,1.5), origin=(-30.,42.5,7.25), direction=rotation(rng)), **kw})

def odd_sform(path, n=1):
    "A NIfTI file like ACDC's: its sform has other spacings than its qform"
    im = nibabel.Nifti1Image(np.random.default_rng(n).integers(1,99,(6,5,4)).astype(np.int16), None)
    im.header.set_sform(np.diag([1.1,2,3,1]), 1); im.header.set_qform(np.diag([1,2,3,1]), 1)
    nibabel.save(im, path)
    return path

# ---- round trips

@pytest.mark.parametrize('ext', extensions)
@pytest.mark.parametrize('dtype', ['u1','i1','u2','i2','u4','i4','i8','f4','f8','?','f2','>i2','>f4'])
def test_dtype_survives(ext, dtype, tmp_path):
    vol = scan(dtype=dtype)
    back = read_volume(write_volume(vol, tmp_path/f'a{ext}'))
    expected = {'?':np.uint8, 'f2':np.float32}.get(dtype, np.dtype(dtype).newbyteorder('='))
    assert back.array.dtype==expected and np.array_equal(back.array, vol.array)

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), ext=st.sampled_from(extensions))
def test_geometry_survives(seed, ext, tmp_path):
    rng = np.random.default_rng(seed)
    vol = scan(rng, spacing=tuple(rng.uniform(.2, 12, 3)), origin=tuple(rng.uniform(-500, 500, 3)),
               shape=tuple(rng.integers(1, 7, 3)))
    back = read_volume(write_volume(vol, tmp_path/f'a{ext}'))
    assert np.allclose(back.spacing, vol.spacing, rtol=1e-6)
    assert np.allclose(back.origin, vol.origin, rtol=1e-6, atol=1e-4)
    assert np.allclose(back.direction, vol.direction, atol=1e-5)

@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31))
def test_nibabel_sees_the_same_place(seed, tmp_path):
    rng = np.random.default_rng(seed)
    vol = scan(rng, spacing=tuple(rng.uniform(.2, 12, 3)), origin=tuple(rng.uniform(-500, 500, 3)))
    nib = nibabel.load(write_volume(vol, tmp_path/'a.nii.gz'))
    ras = np.diag([-1,-1,1])
    assert np.allclose(nib.affine[:3,:3], ras@np.reshape(vol.direction,(3,3))@np.diag(vol.spacing[::-1]), atol=1e-4)
    assert np.allclose(nib.affine[:3,3], ras@vol.origin, atol=1e-4)
    assert np.array_equal(np.asarray(nib.dataobj).T, vol.array)

def test_channels(tmp_path):
    vol = scan(shape=(3,4,6,5))
    for ext in extensions:
        f = write_volume(vol, tmp_path/f'a{ext}')
        back = read_volume(f, channels=True)
        assert np.array_equal(back.array, vol.array) and np.allclose(back.direction, vol.direction, atol=1e-6), ext
        with pytest.raises(VolumeError, match=r'expected 3; give channels=True'): read_volume(f)
    assert nibabel.load(tmp_path/'a.nii.gz').shape==(5,6,4,3)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4,6,5,3),np.uint8), isVector=True), tmp_path/'rgb.mha')
    assert read_volume(tmp_path/'rgb.mha', channels=True).array.shape==(3,4,6,5)
    with pytest.raises(VolumeError, match='3 components per voxel'): read_volume(tmp_path/'rgb.mha')

def test_few_and_many_dimensions(tmp_path):
    for shape,expected in [((5,6),(1,6,5)), ((5,6,4,1),(4,6,5)), ((5,6,4,1,1),(4,6,5))]:
        nibabel.save(nibabel.Nifti1Image(np.zeros(shape,np.int16), np.eye(4)), tmp_path/'a.nii.gz')
        assert read_volume(tmp_path/'a.nii.gz').array.shape==expected
    nibabel.save(nibabel.Nifti1Image(np.zeros((5,6,4,2,3),np.int16), np.eye(4)), tmp_path/'a.nii.gz')
    with pytest.raises(VolumeError, match='has 5 dimensions'): read_volume(tmp_path/'a.nii.gz', channels=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((5,6,4),np.complex64), np.eye(4)), tmp_path/'a.nii.gz')
    with pytest.raises(VolumeError, match='a type that cannot be read|complex'): read_volume(tmp_path/'a.nii.gz')
    nibabel.save(nibabel.Nifti2Image(np.zeros((5,6,4),np.int16), np.eye(4)), tmp_path/'a.nii')
    with pytest.raises(VolumeError, match='NIfTI-2'): read_volume(tmp_path/'a.nii')

def test_scaled_and_extended_nifti(tmp_path):
    im = nibabel.Nifti1Image(np.arange(60,dtype=np.int16).reshape(5,4,3), np.eye(4))
    im.header.set_slope_inter(.5, 10)
    im.header.extensions.append(nibabel.nifti1.Nifti1Extension('comment', b'x'*100))
    nibabel.save(im, tmp_path/'a.nii.gz')
    assert np.allclose(read_volume(tmp_path/'a.nii.gz').array.T, np.asarray(nibabel.load(tmp_path/'a.nii.gz').dataobj))

# ---- writing

def test_failed_write_leaves_nothing(tmp_path):
    f = write_volume(scan(), tmp_path/'a.nii.gz')
    before = f.read_bytes()
    code = '''
        import resource, signal, sys, numpy as np
        from fastmiseg.scans.messages import VolumeError
        from fastmiseg.scans.volume import *
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        big = Volume(np.random.default_rng(0).integers(0, 30000, (10,64,64)).astype(np.int16))
        for name in 'a.nii.gz b.nii.gz b.nii b.mha b.mhd b.nrrd'.split():
            try: write_volume(big, f'{sys.argv[1]}/{name}')
            except VolumeError as e: print(e)
            else: print('written?', name)'''
    p = subprocess.run([sys.executable, '-c', textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True)
    lines = p.stdout.splitlines()
    assert (p.returncode==0 and len(lines)==6
            and all('VolumeError' not in o and str(tmp_path) in o and 'written?' not in o
                    for o in lines)), (p.stdout, p.stderr)
    assert os.listdir(tmp_path)==['a.nii.gz'] and f.read_bytes()==before

def test_unwritable(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(VolumeError, match='cannot be written'): write_volume(scan(), tmp_path/'file'/'a.nii.gz')
    with pytest.raises(VolumeError, match='must end in one of .nii, .nii.gz'): write_volume(scan(), tmp_path/'a.png')
    (tmp_path/'dir.nii.gz').mkdir()
    with pytest.raises(VolumeError, match='cannot be written'): write_volume(scan(), tmp_path/'dir.nii.gz')
    assert sorted(os.listdir(tmp_path))==['dir.nii.gz','file']

@pytest.mark.parametrize('array,kind', [(np.ones((2,3,4), np.complex64),'complex64'), (np.full((2,3,4), 'a'),'<U1')])
def test_what_no_file_holds(array, kind, tmp_path):
    with pytest.raises(VolumeError, match=f'a.nii: cannot be written, its voxels are of type {kind}'):
        write_volume(Volume(array), tmp_path/'a.nii')
    assert not os.listdir(tmp_path)

# ---- paths

@pytest.mark.parametrize('name', ['with space', 'Müller 中文 ß', "quote's & $HOME;*", 'x'*240, '-dash', '.hidden'])
@pytest.mark.parametrize('ext', ['.nii.gz','.mha','.mhd','.nrrd'])
def test_names(name, ext, tmp_path):
    vol = scan()
    f = write_volume(vol, tmp_path/name/(name+ext))
    assert np.array_equal(read_volume(f).array, vol.array)

def test_a_prediction_of_a_scan_in_capitals(tmp_path):
    of = odd_sform(tmp_path/'p1.nii.gz')
    sform,capitals = nibabel.load(of).get_sform(),of.rename(tmp_path/'P1.NII.GZ')
    write_volume(read_volume(capitals), tmp_path/'mask.nii.gz', of=capitals)
    assert np.array_equal(nibabel.load(tmp_path/'mask.nii.gz').get_sform(), sform)

def test_long_paths(tmp_path):
    d = tmp_path.joinpath(*['deep'*30]*8)
    f = write_volume(scan(), d/'a.nii.gz')
    assert len(str(f))>900 and read_volume(f).shape==(4,6,5)
    with pytest.raises(VolumeError, match='too long'): read_volume(tmp_path/('x'*300+'.nii'))
    with pytest.raises(VolumeError, match='too long'): read_volume(tmp_path.joinpath(*['y'*200]*30, 'a.nii'))

def test_impossible_paths(tmp_path):
    with pytest.raises(VolumeError, match='embedded null'): read_volume('a\0b.nii')
    raw = os.fsencode(tmp_path)+b'/\xff.nii'
    Path(os.fsdecode(raw)).write_bytes(b'x')
    with pytest.raises(VolumeError, match='not valid UTF-8'): read_volume(os.fsdecode(raw))
    with pytest.raises(VolumeError, match='not valid UTF-8'): write_volume(scan(), os.fsdecode(raw))
    (tmp_path/'a').symlink_to(tmp_path/'b'); (tmp_path/'b').symlink_to(tmp_path/'a')
    with pytest.raises(VolumeError, match='symbolic links'): read_volume(tmp_path/'a')
    (tmp_path/'gone.nii').symlink_to(tmp_path/'nowhere.nii')
    with pytest.raises(VolumeError, match='gone.nii: does not exist; '
                                          'expected a scan: check the name, and where a link leads'):
        read_volume(tmp_path/'gone.nii')
    os.mkfifo(tmp_path/'pipe.nii')
    with pytest.raises(VolumeError, match='is a named pipe'): read_volume(tmp_path/'pipe.nii')

@pytest.mark.skipif(not hasattr(os,'fork'), reason='needs fork')
def test_no_permission():
    with tempfile.TemporaryDirectory() as d:
        f = write_volume(scan(), Path(d)/'a.nii.gz')
        os.chmod(d, 0o755); os.chmod(f, 0)
        r,w = os.pipe()
        if not (pid := os.fork()):
            try:
                if not os.geteuid(): os.setuid(65534)  # root may read everything: ask as nobody
                try: text = repr(read_volume(f))
                except VolumeError as e: text = str(e)
                os.write(w, text.encode())
            finally: os._exit(0)
        os.close(w); os.waitpid(pid,0)
        assert os.read(r, 10000).decode()==f'{f}: cannot be opened (Permission denied)'

# ---- warnings

def test_a_warning_is_said_once(tmp_path, capfd):
    f = odd_sform(tmp_path/'a.nii.gz')
    with pytest.warns(VolumeWarning, match='a qform and an sform that differ by up to 0.5 mm') as seen: read_volume(f)
    assert len(seen)==1 and str(seen[0].message).startswith(str(f))
    assert capfd.readouterr()==('','')
    sitk.ReadImage(str(f))               # outside of our reading SimpleITK speaks as ever
    assert 'unexpected scales' in capfd.readouterr().err

def test_warnings_as_errors_do_not_break_itk(tmp_path):
    f = odd_sform(tmp_path/'a.nii.gz')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(VolumeWarning): read_volume(f)
    with collect_warnings() as found: read_volume(f)
    assert len(found)==1

def test_warnings_belong_to_the_thread(tmp_path):
    files = [odd_sform(tmp_path/f'{i}.nii.gz', i) for i in range(4)]
    got = {}
    def work(f):
        with collect_warnings() as found:
            for _ in range(10): read_volume(f)
        got[f] = found
    threads = [threading.Thread(target=work, args=(f,)) for f in files]
    for o in threads: o.start()
    for o in threads: o.join()
    assert all(len(o)==10 and {w.path for w in o}=={str(f)} for f,o in got.items())

def _worker(f):
    with collect_warnings() as found: read_volume(f)
    return found

@pytest.mark.parametrize('start', ['fork','spawn'])
def test_warnings_come_back_from_processes(start, tmp_path, capfd):
    files = [odd_sform(tmp_path/f'{i}.nii.gz', i) for i in range(3)]
    with ProcessPoolExecutor(2, mp_context=get_context(start)) as pool: found = sum(pool.map(_worker, files), [])
    lines = summarise_warnings(found)
    assert len(lines)==1 and re.match('3 files, for example [^:]+: has a qform and an sform that differ', lines[0])
    assert 'sform' not in capfd.readouterr().err

# ---- masks and geometry

def test_noise_is_accepted_with_a_warning_and_more_is_not(tmp_path):
    image = scan(dtype=np.float32)
    for field,noise,wrong in [('origin',(1e-4,0,0),(.1,0,0)), ('spacing',(1e-4,0,0),(.1,0,0)),
                              ('direction',(1e-4,)+(0,)*8,(.1,)+(0,)*8)]:
        other = lambda d: replace(image, **{field: tuple(np.add(getattr(image,field), d))})
        with collect_warnings() as found: check_same_geometry(image, other(noise))
        assert len(found)==1 and field in found[0].text
        with pytest.raises(VolumeError, match=f'its {field} is .* but that of the image is .*resample'):
            check_same_geometry(image, other(wrong))
    with collect_warnings() as found: check_same_geometry(image, image)
    assert not found
    f = write_volume(image, tmp_path/'image.mha')
    g = write_volume(replace(image.like(image.array>50), spacing=(5.,1.25,2.)), tmp_path/'mask.nrrd')
    with pytest.raises(VolumeError) as e: read_scan(f, g)
    assert str(f) in str(e.value) and str(g) in str(e.value)

def test_same_mask_in_another_format_is_silent_or_noise(tmp_path):
    image = scan(np.random.default_rng(3), origin=(-123.456789,234.567891,-1234.56789))
    f = write_volume(image, tmp_path/'image.mha')
    g = write_volume(image.like((image.array>50)*1.), tmp_path/'mask.nii.gz')
    with collect_warnings(): x,y = read_scan(f, g)
    assert y.array.dtype==np.uint8 and y.origin==x.origin and y.direction==x.direction

@pytest.mark.parametrize('dtype', ['u1','i2','u2','i4','i8','f4','f8'])
def test_mask_values(dtype, tmp_path):
    a = np.array([0,3,60,100]).astype(dtype).reshape(1,2,2)
    f = write_volume(Volume(a), tmp_path/'m.mha')
    assert read_mask(f).array.ravel().tolist()==[0,3,60,100]
    assert read_mask(f, labels={3:1,60:2,100:3}).array.ravel().tolist()==[0,1,2,3]
    with pytest.raises(VolumeError, match='holds the values 60, 100, declared are 0, 1, 2, 3'): read_mask(f, classes=4)
    f = write_volume(Volume(a.astype('i2')-1), tmp_path/'m.mha')
    with pytest.raises(VolumeError, match='holds the value -1, declared are 0, 1, 2'): read_mask(f)

def test_mask_with_nan(tmp_path):
    f = write_volume(Volume(np.array([0,1,np.nan,1],np.float32).reshape(1,2,2)), tmp_path/'m.nii.gz')
    with pytest.raises(VolumeError, match='1 of 4 voxels are NaN'): read_mask(f)

# ---- DICOM

def write_series(folder, vol, uid='1.2.3.4', names=None, leave_out=()):
    "The slices of `vol` as DICOM files, numbered against the direction of the stack"
    folder.mkdir(parents=True, exist_ok=True)
    im,w = vol.to_sitk(),sitk.ImageFileWriter()
    w.KeepOriginalImageUIDOn()
    d,n = vol.direction,vol.shape[0]
    for i in range(n):
        if i in leave_out: continue
        s = im[:,:,i]
        at = im.TransformIndexToPhysicalPoint((0,0,i))
        for k,v in {'0020|000e':uid, '0020|000d':uid+'.1', '0008|0018':f'{uid}.{i+9}', '0008|0060':'MR',
                    '0020|0013':str(n-i), '0018|0050':str(vol.spacing[0]),
                    '0020|0032':'\\'.join(f'{o:.6f}' for o in at),
                    '0020|0037':'\\'.join(f'{d[k]:.7f}' for k in (0,3,6,1,4,7))}.items(): s.SetMetaData(k,v)
        w.SetFileName(str(folder/f'IM{n-i:04d}.dcm')); w.Execute(s)
    return folder

def test_dicom_series(tmp_path):
    vol = scan(np.random.default_rng(5), shape=(6,8,7))
    back = read_volume(write_series(tmp_path/'série 1', vol))
    assert np.array_equal(back.array, vol.array)
    assert (np.allclose(back.spacing, vol.spacing, atol=1e-4) and np.allclose(back.origin, vol.origin, atol=1e-4)
            and np.allclose(back.direction, vol.direction, atol=1e-5))
    (tmp_path/'série 1'/'notes.txt').write_text('not a slice')
    assert read_volume(tmp_path/'série 1').shape==vol.shape

@pytest.mark.filterwarnings('ignore:.*Non uniform sampling')
def test_bad_dicom_series(tmp_path):
    vol = scan(shape=(6,8,7))
    with pytest.raises(VolumeError, match='slices are 5 mm apart, but 10 mm between .*: a slice is missing'):
        read_volume(write_series(tmp_path/'gap', vol, leave_out=[2]))
    write_series(tmp_path/'two', scan(shape=(2,8,7)), '1.2.3.5')
    for o in (tmp_path/'two').iterdir(): o.rename(o.with_name('B'+o.name))
    write_series(tmp_path/'two', vol)
    with pytest.raises(VolumeError, match='holds 2 DICOM series, expected one; move each'): read_volume(tmp_path/'two')
    (tmp_path/'none').mkdir()
    with pytest.raises(VolumeError, match='a folder without DICOM files'): read_volume(tmp_path/'none')
    for i in (0,3,5):                      # SimpleITK would leave out the first and the last without a word
        for cut in (10,60,10**6):
            f = sorted(write_series(tmp_path/'damaged', vol).iterdir())[i]
            f.write_bytes(f.read_bytes()[:-cut])
            with pytest.raises(VolumeError, match=f'1 DICOM files cannot be read, for example {f.name}'):
                read_volume(tmp_path/'damaged')
    (tmp_path/'bytes').mkdir(); Path(os.fsdecode(os.fsencode(tmp_path)+b'/bytes/\xff.dcm')).write_bytes(b'x')
    with pytest.raises(VolumeError, match='not valid UTF-8'): read_volume(tmp_path/'bytes')

# ---- resampling

def test_resample_keeps_places():
    "A linear function of the world is the same function after resampling, on oblique grids too"
    rng = np.random.default_rng(0)
    vol = scan(rng, dtype=np.float64, shape=(9,12,11))
    w = rng.normal(size=3)
    def world(v):
        idx = np.stack(np.meshgrid(*[np.arange(n)*s for n,s in zip(v.shape,v.spacing)], indexing='ij'), -1)[...,::-1]
        return idx@np.reshape(v.direction,(3,3)).T+v.origin
    vol.array = world(vol)@w
    for new in [(2.5,1.25,1.5),(5,.5,.7),(7,2,2)]:
        r = resample(vol, spacing=new)
        inside = tuple(slice(2,-2) for _ in range(3)) if min(r.shape)>4 else slice(1,-1)
        assert np.allclose(r.array[inside], (world(r)@w)[inside], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match='three positive numbers'): resample(vol, spacing=(1,0,1))
    with pytest.raises(ValueError, match='either `to`'): resample(vol)

@pytest.mark.parametrize('array, says', [
    (np.full((4,6,5), 7, np.int16), 'has a constant value of 7'),
    (np.arange(30, dtype=np.int16).reshape(1,6,5), 'has a single slice')])
def test_odd_images_are_told_and_kept(tmp_path, array, says):
    path = write_volume(Volume(array, (1.,1.,1.)), tmp_path/'odd.nii.gz')
    mask = write_volume(Volume(np.zeros(array.shape, np.uint8), (1.,1.,1.)), tmp_path/'mask.nii.gz')
    with collect_warnings() as found: x,y = read_scan(path, mask)
    texts = [o.text for o in found]
    assert says in texts and 'is empty: background only' in texts and np.array_equal(x.array, array)

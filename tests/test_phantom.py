"""The phantom as files: the same in every process, for every cohort size, after an interruption, and for two
independent readers"""
import hashlib, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pandas as pd, pytest

from fastmiseg.scans.cohort import CohortError
from fastmiseg.scans.phantom import make_phantom, phantom_scan
from fastmiseg.scans.masks import check_same_geometry
from fastmiseg.scans.volume import read_volume

small = dict(size=(24,32), n_slices=(4,5))

def _digest(*scans): return hashlib.sha256(b''.join(o.array.tobytes() for s in scans for o in s)).hexdigest()

def _python(code, **kw):
    return subprocess.Popen([sys.executable, '-c', 'from fastmiseg.scans.phantom import *\n'+code],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def test_same_in_another_process():
    code = ('import hashlib\n'
            'scans = b"".join(o.array.tobytes() for i in range(3) for o in phantom_scan(i, 7))\n'
            'print(hashlib.sha256(scans).hexdigest())')
    out, err = _python(code, env={**os.environ, 'PYTHONHASHSEED':'99'}).communicate(timeout=300)
    assert out.strip()==_digest(*(phantom_scan(i, 7) for i in range(3))), err[-2000:]

def test_a_subject_does_not_depend_on_the_cohort(tmp_path):
    a, b = make_phantom(tmp_path/'a', 2, seed=3, **small), make_phantom(tmp_path/'b', 4, seed=3, **small)
    for k in ('image','mask'): assert [Path(o).read_bytes() for o in a[k]]==[Path(o).read_bytes() for o in b[k][:2]]
    c = make_phantom(tmp_path/'c', 2, seed=4, **small)
    assert Path(a.image[0]).read_bytes()!=Path(c.image[0]).read_bytes()

def test_files(tmp_path):
    df = make_phantom(tmp_path, 3, **small)
    assert list(df.columns)==['subject','scan','image','mask'] and df['scan'].is_unique
    assert df.attrs['classes']==('background','RV','Myo','LV')
    csv = pd.read_csv(tmp_path/'cohort.csv')
    assert (list(csv.image)==[f'images/heart{i:03d}.nii.gz' for i in range(3)]
            and all((tmp_path/o).exists() for o in csv['mask']))
    for r in df.itertuples():
        image, mask = read_volume(r.image), read_volume(r.mask)
        check_same_geometry(image, mask)
        d = np.array(image.direction).reshape(3,3)
        assert abs(d).max(0).max()<.95 and np.linalg.norm(image.origin)>1 # oblique, not at the world's origin
        assert set(np.unique(mask.array))<={0,1,2,3} and 5-1e-6<=image.spacing[0]<=10+1e-6 # NIfTI keeps float32

def test_two_readers_agree(tmp_path):
    nib = pytest.importorskip('nibabel')
    df = make_phantom(tmp_path, 1, **small)
    vol, img = read_volume(df.image[0]), nib.load(df.image[0])
    assert np.array_equal(np.asarray(img.dataobj).T, vol.array)
    lps = np.diag([-1,-1,1,1])@img.affine                             # nibabel's world is RAS
    d = np.array(vol.direction).reshape(3,3)
    np.testing.assert_allclose(lps[:3,:3], d*np.array(vol.spacing[::-1]), atol=1e-4)
    np.testing.assert_allclose(lps[:3,3], vol.origin, atol=1e-3)

@pytest.mark.parametrize('i', range(12))
def test_plausible(i):
    image, mask = phantom_scan(i)
    n, H, W = image.shape
    assert 8<=n<=12 and 96<=min(H,W)<=max(H,W)<=128 and 5<=image.spacing[0]<=10 and 1.1<image.spacing[1]<1.9
    ml = {c:(mask.array==c).sum()*np.prod(image.spacing)/1000 for c in (1,2,3)}
    assert 3<ml[1]<250 and 15<ml[2]<250 and 10<ml[3]<250, ml
    assert image.array.min()>=0 and image.array.std()>0
    edge = mask.array.copy(); edge[:,1:-1,1:-1] = 0
    assert (edge>0).sum() < .02*(mask.array>0).sum()                  # the heart is in the field of view

def test_killed_and_called_again(tmp_path):
    want = make_phantom(tmp_path/'want', 12)
    p = _python(f'make_phantom({str(tmp_path/"got")!r}, 12)')
    t = time.monotonic()
    while len(list((tmp_path/'got').glob('masks/*.nii.gz')))<2 and p.poll() is None and time.monotonic()-t<300:
        time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.communicate()
    got = make_phantom(tmp_path/'got', 12)
    for k in ('image','mask'): assert [Path(o).read_bytes() for o in got[k]]==[Path(o).read_bytes() for o in want[k]]

def test_two_processes_at_once(tmp_path):
    ps = [_python(f'print(len(make_phantom({str(tmp_path/"p")!r}, 4, size=(24,32), n_slices=(4,5))))')
          for _ in range(2)]
    for p in ps:
        out, err = p.communicate(timeout=300)
        assert out.strip()=='4', err[-2000:]
    for i,r in make_phantom(tmp_path/'p', 4, **small).iterrows():
        assert np.array_equal(read_volume(r['image']).array, phantom_scan(i, **small)[0].array)

def test_messages(tmp_path):
    make_phantom(tmp_path/'p', 1, **small)
    with pytest.raises(CohortError, match=r"holds another phantom: .*'n_subjects': 1.* found, "
                                          r".*'n_subjects': 2.* asked for. Use another folder"):
        make_phantom(tmp_path/'p', 2, **small)
    (tmp_path/'file').write_text('')
    with pytest.raises(CohortError, match='file is a file, but the phantom needs a folder'):
        make_phantom(tmp_path/'file', 1)
    (tmp_path/'p'/'phantom.json').write_text('{"format"')
    with pytest.raises(CohortError, match='phantom.json cannot be read'): make_phantom(tmp_path/'p', 1, **small)
    with pytest.raises(CohortError, match=r'n_slices=\(3, 2\): expected'): make_phantom(tmp_path/'q', 1, n_slices=(3,2))
    assert not (tmp_path/'q').exists()

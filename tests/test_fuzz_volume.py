"""Damaged files of three formats: reading ends in a `Volume` or a `VolumeError`, never in a crash, a hang or silent
garbage"""
import json, resource, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import pytest

from fastmiseg.scans.messages import VolumeError, collect_warnings
from fastmiseg.scans.volume import Volume, read_volume, write_volume

CASES = 150 # for each of the kinds of file below
KINDS = {'dcm':('',''), 'nii.gz':('.nii.gz','.nii.gz'), 'nii':('.nii','.nii'), 'mha':('.mha','.mha'),
         'mhd':('.mhd','.mhd'), 'zraw':('.mhd','.zraw'), 'nrrd':('.nrrd','.nrrd'), 'raw nrrd':('.nrrd','.nrrd')}

def _whole():
    z,y,x = np.ogrid[-1:1:6j, -1:1:16j, -1:1:20j]
    noise = np.random.default_rng(0).integers(0, 30, (6,16,20))
    return Volume((900*np.exp(-3*(x*x+y*y+z*z))+noise).astype(np.int16), (5.,1.25,1.5), (-30.,42.5,7.25),
                  (.6,-.8,0., .8,.6,0., 0.,0.,1.))

def _damage(b, rng, gz):
    """One to eight faults of one sort in the bytes `b`; in half of the gzip files before compression, where no checksum
    helps (-> bytes, was it so?)"""
    import gzip
    inner = gz and rng.random()<.5
    b = bytearray(gzip.decompress(bytes(b)) if inner else b)
    head = rng.random()<.7
    at = lambda: int(rng.integers(min(len(b), 420 if head else len(b))))
    kind = rng.choice(['flip','byte','cut','drop','insert','zero','digit','swap'])
    for _ in range(rng.integers(1, 9)):
        if not b: break
        i = at()
        if kind=='flip': b[i] ^= 1<<int(rng.integers(8))
        elif kind=='byte': b[i] = int(rng.integers(256))
        elif kind=='cut': del b[int(rng.integers(len(b))):]
        elif kind=='drop': del b[i:i+int(rng.integers(1, 40))]
        elif kind=='insert': b[i:i] = rng.bytes(int(rng.integers(1, 40)))
        elif kind=='zero': b[i:i+8] = bytes(len(b[i:i+8]))
        elif kind=='digit':
            digits = [k for k in range(min(len(b),420)) if 48<=b[k]<58]
            if digits: b[digits[int(rng.integers(len(digits)))]] = int(rng.choice(list(b'0123456789-.e ')))
        else:
            j = at(); b[i],b[j] = b[j],b[i]
    return (gzip.compress(bytes(b)) if inner else bytes(b)), inner

def _series(folder, vol):
    "As slices of a DICOM series"
    import SimpleITK as sitk
    folder.mkdir()
    im,w,d = vol.to_sitk(),sitk.ImageFileWriter(),vol.direction
    w.KeepOriginalImageUIDOn()
    for i in range(len(vol.array)):
        s = im[:,:,i]
        tags = {'0020|000e':'1.2.3', '0008|0018':f'1.2.3.{i}', '0008|0060':'MR', '0018|0050':str(vol.spacing[0]),
                '0020|0032':'\\'.join(f'{o:.6f}' for o in im.TransformIndexToPhysicalPoint((0,0,i))),
                '0020|0037':'\\'.join(f'{d[k]:.7f}' for k in (0,3,6,1,4,7))}
        for k,v in tags.items(): s.SetMetaData(k, v)
        w.SetFileName(str(folder/f'{i}.dcm')); w.Execute(s)

def _batch(kind, seed):
    "Damage and read `CASES` files; one line of JSON for each on stdout, so that a crash shows after which"
    resource.setrlimit(resource.RLIMIT_AS, (3<<30, 3<<30)) # a header that claims a terabyte must not get it
    (ext,hit),whole,rng = KINDS[kind],_whole(),np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as d:
        f = Path(d)/f'scan{ext}'
        if kind=='dcm': _series(f, whole)
        if kind in ('mhd','raw nrrd'):
            import SimpleITK as sitk
            sitk.WriteImage(whole.to_sitk(), str(f), useCompression=False)
        elif kind!='dcm': write_volume(whole, f)
        hit = f.with_name('scan'+hit) if kind!='dcm' else f/'2.dcm'
        good = hit.read_bytes()
        for i in range(CASES):
            bad,inner = _damage(good, rng, kind=='nii.gz')
            hit.write_bytes(bad)
            print(json.dumps(dict(i=i)), flush=True)
            try:
                with collect_warnings(): vol = read_volume(f)
                same = vol.array.shape==whole.array.shape and np.array_equal(vol.array, whole.array)
                ok = vol.array.ndim==3 and np.isfinite(vol.array).all() and all(1e-4<=o<=1e4 for o in vol.spacing)
                print(json.dumps(dict(i=i, end='volume', sum=kind=='zraw' or kind=='nii.gz' and not inner,
                                      same=bool(same), ok=bool(ok), vox=int(vol.array.size))), flush=True)
            except VolumeError as e: print(json.dumps(dict(i=i, end='error', text=str(e))), flush=True)

@pytest.mark.parametrize('kind', KINDS)
def test_damaged_files(kind, tmp_path):
    p = subprocess.run([sys.executable, __file__, kind, '0'], capture_output=True, text=True, timeout=120)
    lines = [json.loads(o) for o in p.stdout.splitlines()]
    assert p.returncode==0, f'case {lines[-1] if lines else None}: exit {p.returncode}\n{p.stderr[-2000:]}'
    ends = [o for o in lines if 'end' in o]
    assert len(ends)==CASES
    for o in ends:
        if o['end']=='error':
            assert 'scan' in o['text'] and '\n' not in o['text'] and 'Traceback' not in o['text'], o
            assert len(o['text'])<600, o
        else:
            assert o['ok'], o
            assert o['same'] or not o['sum'], f'damage under a checksum went unnoticed: {o}'
            assert o['vox']<=1<<20, o
    assert sum(o['end']=='error' for o in ends)>CASES//5

if __name__=='__main__': _batch(sys.argv[1], int(sys.argv[2]))

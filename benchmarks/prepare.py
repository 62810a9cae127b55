"""Preparing MSD Hippocampus (260 scans) in two processes against the same SimpleITK work in a plain
loop, and start-up with 10,000 prepared scans

    python benchmarks/prepare.py [folder of the data set; default: FASTMISEG_DATA] [--repeats 3] [--scans 10000]
"""
import argparse, os, platform, statistics, subprocess, sys, tempfile, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path

import numpy as np, pandas as pd
import SimpleITK as sitk

import fastmiseg
from fastmiseg.scans.cohort import load_cohort
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.store import SliceStore
from fastmiseg.scans.volume import Volume

recipe = Recipe.hippocampus()

def plain_loop(df, out):
    """What one writes without a library: read, orient, percentiles, resample to 64x48 at 1 mm, save;
    no checks, no way back"""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    W,H = recipe.size[::-1]
    for r in df.itertuples():
        img,mask = (sitk.DICOMOrient(sitk.ReadImage(o), 'LPS') for o in (r.image, r.mask))
        lo,hi = np.percentile(sitk.GetArrayViewFromImage(img), recipe.percentiles)
        n,s,size = np.array(img.GetSize()),np.array(img.GetSpacing()),(W, H, img.GetSize()[2])
        spacing = (1., 1., s[2])
        start = img.TransformContinuousIndexToPhysicalPoint(((n-1)/2-(np.array(size)-1)/2*spacing/s).tolist())
        grid = lambda o, how: sitk.GetArrayFromImage(
            sitk.Resample(o, size, sitk.Transform(), how, start, spacing, img.GetDirection()))
        x = np.clip((grid(sitk.Cast(img, sitk.sitkFloat32), sitk.sitkLinear)-lo)/(hi-lo), 0, 1)
        np.save(out/f'{r.scan}.npy', np.rint(x[:,None]*65535).astype(np.uint16))
        np.save(out/f'{r.scan}_mask.npy', grid(mask, sitk.sitkNearestNeighbor).astype(np.uint8))

def seconds(f):
    "Seconds on the wall, and of processor time in this process and its workers"
    t,c = time.perf_counter(),sum(os.times()[:4])
    f()
    return time.perf_counter()-t, sum(os.times()[:4])-c

def compare(df, repeats):
    "Median seconds of the plain loop and of the store, taken in turns"
    took = {k:[] for k in ('plain loop','store, this process','store, 2 processes')}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as d:
            d = Path(d)
            (d/'plain').mkdir()
            took['plain loop'].append(seconds(lambda: plain_loop(df, d/'plain')))
            for k,w in (('store, this process',0), ('store, 2 processes',2)):
                took[k].append(seconds(
                    lambda: SliceStore(d/k, recipe).prepare(df, workers=w, progress=False)))
    return {k:[statistics.median(o) for o in zip(*v)] for k,v in took.items()}

start = '''
import sys, time, pandas as pd
from fastmiseg.scans.store import SliceStore
from fastmiseg.scans.recipe import Recipe
df = pd.read_pickle(sys.argv[2])
t = time.perf_counter()
store = SliceStore(sys.argv[1], Recipe()).prepare(df)
print(time.perf_counter()-t, len(store.scans))
'''
def start_up(n):
    "Seconds until a new process has opened a store with n prepared scans and their masks"
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        a,rows = np.zeros((2,8,8), np.int16),[]
        for i in range(n):
            a.flat[:4] = i%100,i//100,1,200
            image,mask = str(d/f'{i}.nii'),str(d/f'{i}_mask.nii')
            sitk.WriteImage(Volume(a).to_sitk(), image)
            sitk.WriteImage(Volume((a>150).astype(np.uint8)).to_sitk(), mask)
            rows.append(dict(subject=str(i), scan=str(i), image=image, mask=mask, split='labeled'))
        df = pd.DataFrame(rows)
        SliceStore(d/'store', Recipe()).prepare(df, progress=False)
        df.to_pickle(d/'df.pkl')
        took = [subprocess.run([sys.executable, '-c', start, str(d/'store'), str(d/'df.pkl')],
                               capture_output=True, text=True, check=True).stdout.split()
                for _ in range(3)]
    assert all(int(k)==n for _,k in took)
    return statistics.median(float(t) for t,_ in took)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', nargs='?', default=os.environ.get('FASTMISEG_DATA'))
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--scans', type=int, default=10_000)
    args = p.parse_args()
    df = load_cohort(args.data) if args.data else None
    print(f'{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, '
          f'Python {platform.python_version()}, fastmiseg {fastmiseg.__version__}, '
          f'SimpleITK {sitk.Version.VersionString()}, numpy {np.__version__}\n')
    print('| what | seconds | processor seconds | against the plain loop |\n|---|---|---|---|')
    if args.data:
        for k,(wall,cpu) in (took := compare(df, args.repeats)).items():
            print(f'| {len(df)} scans, {k} | {wall:.2f} | {cpu:.2f} | '
                  f'{took["plain loop"][0]/wall:.2f} times as fast |')
    else: print('| (no data: give the folder of MSD Hippocampus or set FASTMISEG_DATA) | | | |')
    if args.scans: print(f'| start-up with {args.scans:,} prepared scans | {start_up(args.scans):.2f} | | |')

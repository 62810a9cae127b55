"""What checksums cost: prepared slices when they are first read, a model when it is loaded

    python benchmarks/checksums.py [--scans 40] [--repeats 3]
"""
import argparse, os, platform, statistics, tempfile, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path

import torch

from fastmiseg.data import MISegDataLoaders
from fastmiseg.learner import miseg_learner
from fastmiseg.scans.split import split_cohort
from fastmiseg.scans.phantom import make_phantom
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.store import SliceStore
from fastmiseg.segmenter import export_segmenter, load_segmenter
import fastmiseg.segmenter as S

def seconds(f, repeats):
    "Median seconds on the wall"
    took = []
    for _ in range(repeats):
        t = time.perf_counter()
        f()
        took.append(time.perf_counter()-t)
    return statistics.median(took)

def slices(d, n, repeats):
    "Seconds to prepare, to verify and to read every slice once; their MB; and loaders of them"
    df = split_cohort(make_phantom(d/'scans', n_subjects=n), labeled=n//2, valid=n//4, show=False)
    recipe = Recipe(spacing=1, size=224, classes=df.attrs['classes'])
    prepare = lambda to: SliceStore(to, recipe).prepare(df, workers=0, progress=False)
    took = seconds(lambda: prepare(d/f'{time.time_ns()}'), 1)
    store = prepare(d/'store')
    size = sum(o.stat().st_size for o in store.dir.glob('*.npy'))/1e6
    verify = (seconds(lambda: prepare(d/'store').verify(), repeats)
              -seconds(lambda: prepare(d/'store'), repeats))
    store.verify()
    def read():
        for r in store.scans.itertuples():
            for i in range(r.n): store.image(r.scan, i)
    return (took, verify, seconds(read, repeats), size,
            MISegDataLoaders.from_cohort(df, recipe, store=d/'store', workers=0, n_iters=1))

def models(d, dls, repeats):
    "Seconds for loading the paper's network, for its checksum, and its MB"
    learn = miseg_learner(dls, width=32)
    file = export_segmenter(learn, d/'m.safetensors')
    tensors = {k:v.cpu() for k,v in learn.model.state_dict().items()}
    return (seconds(lambda: load_segmenter(file, 'cpu'), repeats),
            seconds(lambda: S._sum_of('', tensors), repeats),
            file.stat().st_size/1e6)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--scans', type=int, default=40)
    p.add_argument('--repeats', type=int, default=3)
    args = p.parse_args()
    torch.set_num_threads(1)
    print(f'{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, '
          f'torch {torch.__version__}\n')
    with tempfile.TemporaryDirectory() as d:
        prepare,verify,read,size,dls = slices(Path(d), args.scans, args.repeats)
        load,check,mb = models(Path(d), dls, args.repeats)
    print('| what | seconds | MB | GB/s |\n|---|---|---|---|')
    for what,s,m in (('preparing slices', prepare, size),
                     ('verifying them, once in a process and its workers', verify, size),
                     ('reading each once', read, size),
                     ('loading a model', load, mb),
                     ('of which its checksum', check, mb)):
        print(f'| {what} | {s:.3f} | {m:.0f} | {m/1e3/s:.2f} |')

"""Batches a second from the slice store, with augmentation, against the training step of the
paper's U-Net on the same batch:

    python benchmarks/data.py [DATA]"""
import argparse, os, platform, tempfile, time, warnings
from dataclasses import replace
warnings.filterwarnings('ignore')
from pathlib import Path

import psutil, torch
from fastmiseg.scans.cohort import load_cohort
from fastmiseg.scans.split import split_cohort
from fastmiseg.scans.phantom import make_phantom
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.store import SliceStore
from fastmiseg.data import MISegDataLoaders
from fastmiseg.learner import miseg_learner

def rate(it, n, work=lambda b: None):
    "Milliseconds to a batch, the first one (start of workers, warming up) left out"
    work(next(it))
    t = time.perf_counter()
    for _ in range(n): work(next(it))
    return (time.perf_counter()-t)/n*1e3

def endless(dl):
    while True: yield from dl

# what is said about it: workers, changes of the recipe, share of draws that show a class
cases = {'loading and augmentation': (0,{},0), 'the same in one worker': (1,{},0),
         'with strong augmentation and draws that show a class': (0,dict(augment='strong'),1/3),
         'with elastic deformation as well': (0,dict(augment='strong', elastic=1.),1/3)}

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('data', nargs='?', default=os.environ.get('FASTMISEG_DATA'),
                   help='a cohort; by default FASTMISEG_DATA, or else the phantom')
    p.add_argument('--repeats', type=int, default=3)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        df = load_cohort(a.data) if a.data else make_phantom(Path(tmp)/'scans', 20)
        df = split_cohort(df, labeled=4, valid=4)
        recipe = Recipe.auto(df)
        recipe = replace(recipe, rotate=10., flip='hv', jitter=.3)
        print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; '
              f'slices {recipe.size}; batches of 4 labelled + 10 unlabelled\n')
        print('| | ms to a batch | times faster than the step |\n|---|---|---|')
        best = {}
        SliceStore(Path(tmp)/'store', recipe).prepare(df, progress=False)
        for _ in range(a.repeats):
            for k,(workers,changes,foreground) in cases.items():
                dls = MISegDataLoaders.from_cohort(
                    df, replace(recipe, **changes), store=Path(tmp)/'store', n_iters=200,
                    num_workers=workers, foreground=foreground)
                best[k] = min(best.get(k, 1e9), rate(iter(dls.train), 150))
            learn = miseg_learner(dls)
            learn.create_opt()
            def step(b):
                x_l,x_u,y = b
                loss = learn.loss_func(
                    learn.model(torch.cat([x_l,x_u,x_u]).as_subclass(torch.Tensor))[:len(x_l)], y)
                loss.backward()
                learn.opt.step()
                learn.opt.zero_grad()
            b = dls.one_batch()
            best['step'] = min(best.get('step', 1e9), rate(iter([b]*8), 6, step))
        it,memory = endless(dls.train),psutil.Process().memory_info
        for _ in range(100): next(it)
        before = memory().rss
        for _ in range(1000): next(it)
        for k in cases: print(f"| {k} | {best[k]:.1f} | {best['step']/best[k]:.1f} |")
        print(f"| training step, 4 + 10 + 10 images | {best['step']:.0f} | 1 |")
        print(f"\nMemory of the process after 1,000 more batches: {(memory().rss-before)/2**20:+.0f} MB.")

if __name__=='__main__': main()

"""Validation metrics over 2,000 slices of 256x256, 4 classes: fastmiseg, fastai, monai and a numpy loop.
Prints a markdown table."""
import argparse, platform, time, warnings
from importlib.metadata import version
from types import SimpleNamespace

warnings.filterwarnings('ignore')
import numpy as np, torch
from fastai.metrics import DiceMulti
from fastmiseg.metrics import VolumeDice, VolumePrecision, VolumeSensitivity

def batches(n, size, C, bs, device, per_volume=20):
    "`n` slices in batches of `bs`; a few distinct batches of logits, used again and again"
    g, pool = torch.Generator().manual_seed(0), []
    for _ in range(3):
        y = torch.nn.functional.interpolate(
            torch.rand(bs, 1, 8, 8, generator=g), size=size)[:,0].mul(C).long()
        logits = (torch.randn(bs, C, size, size, generator=g)
                  + 2*torch.nn.functional.one_hot(y, C).movedim(-1, 1)).contiguous()
        pool.append((logits.to(device), y.to(device)))
    for k,i in enumerate(range(0, n, bs)):
        m = min(bs, n-i)
        x, y = (o[:m].clone() if m<bs else o.view_as(o) for o in pool[k%3])
        y.index = torch.arange(i, i+m)
        y.scan = y.index//per_volume
        yield SimpleNamespace(pred=x, y=y, yb=(y,), dl=None, dls=None)

def ours(*metrics):
    def f(data):
        for m in metrics: m.reset()
        for b in data:
            for m in metrics: m.accumulate(b)
        return [m.value for m in metrics][0]
    return f

def fastai(data):
    m = DiceMulti()
    m.reset()
    for b in data: m.accumulate(b)
    return m.value

def monai(data):
    from monai.metrics import DiceMetric
    m = DiceMetric(include_background=False, ignore_empty=False, num_classes=4)
    for b in data: m(b.pred.argmax(1, keepdim=True), b.y[:,None])
    return m.aggregate().item()

def numpy_loop(data):
    inter, union = {}, {}
    for b in data:
        pred, y = b.pred.cpu().numpy().argmax(1), b.y.cpu().numpy()
        for p,t,s in zip(pred, y, b.y.scan.tolist()):
            for c in range(1, 4):
                inter[s,c] = inter.get((s,c), 0) + 2*((p==c)&(t==c)).sum()
                union[s,c] = union.get((s,c), 0) + (p==c).sum()+(t==c).sum()
    return float(np.mean([inter[k]/union[k] if union[k] else 1. for k in inter]))

def argmax_only(data):
    for b in data: b.pred.argmax(1)
    return float('nan')

def main():
    p = argparse.ArgumentParser(description=__doc__)
    for k,v in dict(n=2000, size=256, bs=32, repeats=3).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = p.parse_args()
    rows = {
        'fastmiseg `VolumeDice`': ('volume', ours(VolumeDice())),
        'fastmiseg `VolumeDice`, per class, sensitivity, precision (6 metrics)': (
            'volume', ours(VolumeDice(), *VolumeDice.per_class('0123'),
                           VolumeSensitivity(), VolumePrecision())),
        'fastai `DiceMulti`': ('epoch, with background', fastai),
        'monai `DiceMetric`': ('slice', monai),
        'numpy loop': ('volume', numpy_loop),
        'torch `argmax` alone': ('', argmax_only),
    }
    sync = torch.cuda.synchronize if a.device.startswith('cuda') else lambda: None
    names = ['torch','fastai','monai','numpy']
    print(f'{a.n} slices of {a.size}x{a.size}, 4 classes, batches of {a.bs}, {a.device}, '
          f'{torch.get_num_threads()} thread(s), Python {platform.python_version()}, '
          + ', '.join(f'{o} {version(o)}' for o in names) + f'; best of {a.repeats}\n')
    print('| metric | Dice per | seconds | CPU seconds | value |\n|---|---|---|---|---|')
    for name,(per,f) in rows.items():
        ts, cpu = [], []
        try:
            for _ in range(a.repeats):
                data = batches(a.n, a.size, 4, a.bs, a.device)
                data = [*data]                                # builds the pool, which is not timed
                sync()
                t, c = time.perf_counter(), time.process_time()
                v = f(data)
                sync()
                ts.append(time.perf_counter()-t)
                cpu.append(time.process_time()-c)
            print(f'| {name} | {per} | {min(ts):.2f} | {min(cpu):.2f} | {v:.4f} |', flush=True)
        except ImportError as e: print(f'| {name} | {per} | not installed: {e.name} | | |')

if __name__=='__main__': main()

"""Where the host waits for the device during an epoch of each method, and what is copied between them
(a part of `gpu.sh`).

Every synchronisation that `torch.cuda.set_sync_debug_mode` notices is put down to the innermost line of
fastmiseg or fastai that caused it; copies and launches are counted by the profiler. On a CPU only the
counting is exercised.
"""
import collections, traceback, warnings
import torch
from torch.profiler import ProfilerActivity, profile
from fastai.basics import Callback
from gpu import DEVICE, DRY, add, missing
from gpu_step import METHODS, learner

class Watch(Callback):
    "What makes the host wait, in the steps from `first` on: line -> how often"
    order = -200
    def __init__(self, first): self.first,self.seen,self.steps = first,collections.Counter(),0
    def before_fit(self):
        self.before,self.filters = warnings.showwarning,warnings.filters[:]
        warnings.simplefilter('always')
        warnings.showwarning = self.note
    def before_batch(self):
        if self.training and self.iter==self.first and DEVICE=='cuda': torch.cuda.set_sync_debug_mode('warn')
        self.steps += self.training and self.iter>=self.first
    def after_train(self):
        if DEVICE=='cuda': torch.cuda.set_sync_debug_mode('default')
    def after_fit(self):
        warnings.showwarning = self.before
        warnings.filters[:] = self.filters
    def note(self, message, *args, **kw):
        if 'synchroniz' not in str(message): return
        self.seen[whose()] += 1

def whose():
    "The innermost frame of fastmiseg or fastai, as text"
    frames = [f for f in traceback.extract_stack()[:-2] if f.filename!=__file__]
    for f in reversed(frames):
        for package in ('fastmiseg','fastai'):
            if f'/{package}/' in f.filename:
                return (f"{package}/{f.filename.rsplit(f'/{package}/', 1)[1]}:{f.lineno} "
                        f"{f.name}: {f.line}")
    return 'elsewhere: ' + ' < '.join(f'{f.name}:{f.lineno}' for f in reversed(frames[-3:]))

def copies(learn, steps):
    "Kernels, and copies by kind, of a step"
    learn.dls.train.n_iters = steps
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*(DEVICE=='cuda')
    learn.fit(1, 1e-4)
    with profile(activities=kinds) as p: learn.fit(1, 1e-4)
    seen = collections.Counter(e.name for e in p.events() if e.device_type==torch.autograd.DeviceType.CUDA)
    copied = {k:n for k,n in seen.items() if 'Memcpy' in k}
    return {k: round(n/steps, 2) for k,n in sorted(copied.items())}

def main():
    steps = 2 if DRY else 6
    copied = 'Copies (the end of the epoch and its validation included)'
    for name in METHODS:
        if 'textbook' in name or not missing('waiting', table=copied, method=name): continue
        if DRY and name!='pseudo-labels + teacher': continue
        try:
            learn = learner(name, 'bf16' if DEVICE=='cuda' else 'fp32', steps+3)
            learn.fit(1, 1e-4)
            watch = Watch(3 if not DRY else 0)
            learn.fit(1, 1e-4, cbs=watch)
            for where,n in watch.seen.most_common() or [('none',0)]:
                add('waiting', table='Synchronisations', method=name, line=where,
                    times_a_step=round(n/max(1, watch.steps), 2))
                print(f'{name}: {n/max(1, watch.steps):.2f} a step: {where}')
            for kind,n in (copies(learn, steps) or {'none':0}).items():
                add('waiting', table=copied, method=name, kind=kind, times_a_step=n)
                print(f'{name}: {n} a step: {kind}')
        except Exception as e:
            traceback.print_exc()
            add('waiting', table='Failures', method=name, error=f'{type(e).__name__}: {e}'[:300])
        finally:
            if DEVICE=='cuda': torch.cuda.set_sync_debug_mode('default')

if __name__=='__main__': main()

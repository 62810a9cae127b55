"""Milliseconds, launches and memory of a step of each method at the paper's size, in fp32, TF32 and bf16 (a part of `gpu.sh`).

The step is fastai's whole loop on batches that lie on the device: 4 labelled and 10 unlabelled images of 224×224, of which 24 go through
the U-Net of width 16. Methods take turns; the time from one step's beginning to the next one's, by CUDA events; medians.
"""
import collections, cProfile, io, pstats, sys, traceback
from statistics import median
import torch
from torch.profiler import ProfilerActivity, profile
from fastai.basics import Callback, Learner, noop, set_seed
from fastai.losses import CrossEntropyLossFlat
from fastmiseg.callback.baselines import ConsistencyCallback, EntropyMinCallback
from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.data import SemiSupDataBlock
from fastmiseg.learner import miseg_learner
from fastai.data.block import TransformBlock
from fastai.vision.core import TensorImage, TensorMask
from gpu import DEVICE, DRY, Clock, add, table

SIZE,WIDTH,LABELED,UNLABELED = (32,4,2,3) if DRY else (224,16,4,10)
METHODS = {'labels only': lambda: [], 'entropy minimisation': lambda: [EntropyMinCallback()], 'consistency': lambda: [ConsistencyCallback()],
           'Mean Teacher': lambda: [EMATeacherCallback()], 'all terms of the paper': lambda: [MIRegCallback()],
           'all terms, with a teacher': lambda: [MIRegCallback(), EMATeacherCallback()]}
try:
    from step import TextbookMIReg
    METHODS['all terms, textbook losses'] = lambda: [TextbookMIReg()]
except ImportError as e: print(f'no textbook losses: {e}')
if DRY: METHODS = {k:o for k,o in METHODS.items() if k in ('labels only','consistency') or 'all terms' in k}
PRECISIONS = ['fp32'] if DEVICE=='cpu' else ['bf16','tf32','fp32']

def set_precision(how):
    torch.set_float32_matmul_precision('high' if how=='tf32' else 'highest')
    torch.backends.cudnn.allow_tf32 = how=='tf32'

def loaders(n_iters):
    gen = lambda i: torch.Generator().manual_seed(i)
    image = TransformBlock(type_tfms=lambda i: TensorImage(torch.rand(1,SIZE,SIZE,generator=gen(i))))
    mask = TransformBlock(type_tfms=lambda i: TensorMask(torch.randint(4,(SIZE,SIZE),generator=gen(i))))
    block = SemiSupDataBlock(blocks=[image,mask], splitter=lambda items: (range(20), range(20,21), range(21,60)))
    dls = block.dataloaders(list(range(60)), bs=LABELED, unlabeled_bs=UNLABELED, n_iters=n_iters, device=DEVICE)
    dls.c = 4
    return dls

def repeat(dl, n=4):
    "Replace what the paired loader reads by `n` batches that lie on the device"
    kept = [b for _,b in zip(range(n), dl)]
    cls = type(dl)
    def __iter__(self):
        for i in range(self.n_iters): yield kept[i%n]
    dl.__class__ = type('Repeated', (cls,), dict(__iter__=__iter__))

def learner(cbs, how, n_iters):
    set_seed(0)
    set_precision(how)
    dls = loaders(max(4, n_iters))
    repeat(dls.train)
    dls.train.n_iters = n_iters
    learn = miseg_learner(dls, width=WIDTH, cbs=cbs)
    learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__=='ProgressCallback'])
    learn.logger = noop
    return getattr(learn, f'to_{how}')() if how in ('bf16','fp16') else learn

class Mark(Callback):
    "A mark at the beginning of each training step, and at the end of the last"
    order = -100
    def before_fit(self): self.clock = Clock()
    def before_batch(self):
        if self.training: self.clock.mark()
    def after_train(self): self.clock.mark()

def launches(learn, steps):
    "Of a step: kernels, and milliseconds in which the device is busy"
    learn.dls.train.n_iters = steps
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*(DEVICE=='cuda')
    class Profile(Callback): # the training steps only
        order = -300
        def before_train(self): self.p = profile(activities=kinds); self.p.__enter__()
        def after_train(self):
            if DEVICE=='cuda': torch.cuda.synchronize()
            self.p.__exit__(None, None, None)
    learn.fit(1, 1e-4, cbs=(prof:=Profile()))
    kernels = [e for e in prof.p.events() if e.device_type==torch.autograd.DeviceType.CUDA and 'Mem' not in e.name[:3]]
    busy = sum(e.device_time_total if hasattr(e, 'device_time_total') else e.cuda_time_total for e in kernels)/1000/steps
    top = collections.Counter()
    for e in kernels: top[e.name[:70]] += e.device_time_total/1000/steps
    return len(kernels)/steps, busy, top.most_common(12)

def host(learn, steps):
    "Where the host's time goes"
    learn.dls.train.n_iters = steps
    learn.fit(1, 1e-4)
    prof = cProfile.Profile()
    prof.enable()
    learn.fit(1, 1e-4)
    prof.disable()
    for by in ('tottime','cumulative'):
        s = io.StringIO()
        pstats.Stats(prof, stream=s).sort_stats(by).print_stats(30)
        print('\n'.join(l[:150] for l in s.getvalue().splitlines() if l.strip()))

def main():
    steps,rounds = (2,1) if DRY else (25,2)
    for how in PRECISIONS:
        learners,times,memory = {},collections.defaultdict(list),{}
        for k,make in METHODS.items():
            try:
                learn = learner(make(), how, 8 if not DRY else 2)
                learn.fit(1, 1e-4)
                if DEVICE=='cuda': torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
                learn.fit(1, 1e-4)
                memory[k] = torch.cuda.max_memory_allocated()/2**20 if DEVICE=='cuda' else 0
                learners[k] = learn
            except Exception as e:
                traceback.print_exc()
                add('step', table='Failures', precision=how, method=k, error=f'{type(e).__name__}: {e}'[:300])
        for _ in range(rounds):
            for k,learn in learners.items():
                learn.dls.train.n_iters = steps
                learn.fit(1, 1e-4, cbs=(mark:=Mark()))
                times[k] += mark.clock.gaps()[min(5, steps-1):-1] or mark.clock.gaps()
        ms = {k:median(t) for k,t in times.items()}
        for k,learn in learners.items():
            n,busy,top = launches(learn, 2 if DRY else 5)
            row = dict(precision=how, method=k, ms=round(ms[k], 3), relative=round(ms[k]/ms['labels only'], 2), launches=round(n), busy_ms=round(busy, 3), peak_mb=round(memory[k]))
            add('step', table='Steps', **row)
            print(row, flush=True)
            if how==PRECISIONS[0] and k in ('labels only','all terms, with a teacher'):
                for name,t in top: print(f'    {t:.3f} ms {name}')
        if {'all terms of the paper','consistency'}<=ms.keys():
            share = (ms['all terms of the paper']-ms['consistency'])/ms['all terms of the paper']
            add('step', table='Of these', precision=how, what='share of a step of all terms that mutual information takes', value=round(share, 3))
            if 'all terms, textbook losses' in ms: add('step', table='Of these', precision=how, what='textbook losses, times as long', value=round(ms['all terms, textbook losses']/ms['all terms of the paper'], 2))
    print('-- the host, all terms with a teacher', PRECISIONS[0])
    host(learner(METHODS['all terms, with a teacher'](), PRECISIONS[0], steps), steps)

if __name__=='__main__': main()

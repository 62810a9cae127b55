"""Milliseconds, launches and memory of a step of each method at the paper's size, in fp32, TF32 and
bf16 (a part of `gpu.sh`).

The step is fastai's whole loop on batches that lie on the device: 4 labelled and 10 unlabelled images
of 224×224, of which 24 go through the U-Net of width 16. The time from one step's beginning to the
next one's, by CUDA events; medians. With the argument `compile`: blocks of the U-Net by torch.compile.
"""
import collections, sys, time, traceback
from functools import cache
from statistics import median
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from fastai.basics import Callback, CancelValidException, noop, set_seed
from fastmiseg.callback.baselines import ConsistencyCallback, EntropyMinCallback
from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.data import SemiSupDataBlock
from fastmiseg.learner import miseg_learner
from fastmiseg.transforms import RandomFlips
from fastai.data.block import TransformBlock
from fastai.vision.core import TensorImage, TensorMask
from gpu import DEVICE, DRY, Clock, add

SIZE,WIDTH,LABELED,UNLABELED = (32,4,2,3) if DRY else (224,16,4,10)
METHODS = {
    'labels only':                       lambda: [],
    'entropy minimisation':              lambda: [EntropyMinCallback()],
    'consistency':                       lambda: [ConsistencyCallback(T=RandomFlips())],
    'Mean Teacher':                      lambda: [EMATeacherCallback(T=RandomFlips())],
    'all terms of the paper':            lambda: [MIRegCallback.paper()],
    'all terms, with a teacher':         lambda: [MIRegCallback.paper(), EMATeacherCallback()],
    'recommended (T warps, two passes)': lambda: [MIRegCallback()],
}
try:
    from step import TextbookMIReg
    METHODS['all terms, textbook losses'] = lambda: [TextbookMIReg.paper()]
except ImportError as e: print(f'no textbook losses: {e}')
if DRY:
    METHODS = {k:o for k,o in METHODS.items()
               if k in ('labels only','consistency') or 'all terms' in k or 'recommended' in k}
PRECISIONS = ['fp32'] if DEVICE=='cpu' else ['bf16','tf32','fp32']

def set_precision(how):
    torch.set_float32_matmul_precision('high' if how=='tf32' else 'highest')
    torch.backends.cudnn.allow_tf32 = how=='tf32'

def loaders(n_iters):
    gen = lambda i: torch.Generator().manual_seed(i)
    image = TransformBlock(type_tfms=lambda i: TensorImage(torch.rand(1,SIZE,SIZE,generator=gen(i))))
    mask = TransformBlock(type_tfms=lambda i: TensorMask(torch.randint(4,(SIZE,SIZE),generator=gen(i))))
    block = SemiSupDataBlock(blocks=[image,mask],
                             splitter=lambda items: (range(20), range(20,21), range(21,60)))
    dls = block.dataloaders(list(range(60)), bs=LABELED, unlabeled_bs=UNLABELED, n_iters=n_iters,
                            device=DEVICE)
    dls.c = 4
    return dls

def repeat(dl):
    "Replace what the paired loader reads by batches that lie on the device"
    kept,cls = _batches(),type(dl)
    def __iter__(self):
        for i in range(self.n_iters): yield kept[i%len(kept)]
    dl.__class__ = type('Repeated', (cls,), dict(__iter__=__iter__))

@cache
def _batches(): return [b for _,b in zip(range(4), loaders(4).train)]

def learner(cbs, how, n_iters, dls=None):
    set_seed(0)
    set_precision(how)
    if dls: dls = dls(n_iters)
    else: repeat((dls:=loaders(n_iters)).train)
    learn = miseg_learner(dls, width=WIDTH, cbs=cbs)
    # one pass through the network in the paper, two in the recommended method
    learn.paired_batch.passes = 2 if any(getattr(cb, 'balance', None) for cb in cbs) else 1
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
        def before_train(self):
            self.p = profile(activities=kinds)
            self.p.__enter__()
        def after_train(self):
            if DEVICE=='cuda': torch.cuda.synchronize()
            self.p.__exit__(None, None, None)
    learn.fit(1, 1e-4, cbs=(prof:=Profile()))
    kernels = [e for e in prof.p.events()
               if e.device_type==torch.autograd.DeviceType.CUDA and 'Mem' not in e.name[:3]]
    busy = sum(e.device_time_total if hasattr(e, 'device_time_total') else e.cuda_time_total
               for e in kernels)/1000/steps
    top = collections.Counter()
    for e in kernels: top[e.name[:70]] += e.device_time_total/1000/steps
    return len(kernels)/steps, busy, top.most_common(12)

class NoValidation(Callback):
    def before_validate(self): raise CancelValidException()

def compile_blocks(learn):
    "Each block of the U-Net by `torch.compile`; the stages, whose maps the methods take, stay as they are"
    torch._dynamo.config.recompile_limit = 64 # all blocks have the same code
    learn.add_cb(NoValidation()) # whose other sizes would have to be compiled too
    for m in learn.model.modules():
        if isinstance(m, nn.Sequential):
            m.forward = torch.compile(m.forward, dynamic=False, backend='eager' if DRY else 'inductor')

def measure(how, k, learn, steps, rounds):
    "A row: milliseconds, launches, memory of a step"
    learn.fit(1, 1e-4)
    if DEVICE=='cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        learn.dls.train.n_iters = steps
        learn.fit(1, 1e-4, cbs=(mark:=Mark()))
        gaps = mark.clock.gaps()
        times += gaps[min(3, steps-1):-1] or gaps
    row = dict(precision=how, method=k, ms=round(median(times), 3))
    if DEVICE=='cuda': row['peak_mb'] = round(torch.cuda.max_memory_allocated()/2**20)
    try:
        if how==PRECISIONS[0]:
            n,busy,_ = launches(learn, 2)
            row.update(launches=round(n), busy_ms=round(busy, 3))
    except Exception: traceback.print_exc()
    return row

def attempt(how, k, make, steps, rounds, into='Steps', prepare=None, dls=None):
    begun = time.perf_counter()
    try:
        learn = learner(make(), how, 4 if not DRY else 2, dls)
        if prepare: prepare(learn)
        row = measure(how, k, learn, steps, rounds)
        add('step', table=into, **row, seconds=round(time.perf_counter()-begun, 1))
        print(row, f'in {time.perf_counter()-begun:.1f} s', flush=True)
        return row
    except Exception as e:
        traceback.print_exc(limit=4)
        add('step', table='Failures', precision=how, method=k, error=f'{type(e).__name__}: {e}'[:300])

def sliced(n_iters):
    "Loaders that read: random slices of 384×384, cropped to 224 and augmented as the recipe for ACDC says"
    from gpu_slices import Noise, loaders
    return loaders(Noise(48 if DRY else 384, 32 if DRY else 224), ('labeled','valid',('unlabeled',)),
                   bs=LABELED, unlabeled_bs=UNLABELED, n_iters=n_iters, device=DEVICE)

def compiled():
    "The same with compiled blocks, and what compiling takes"
    for k in ['labels only'] if DRY else ['all terms of the paper','labels only']:
        for prepare in (None, compile_blocks):
            attempt(PRECISIONS[0], k+(', blocks compiled' if prepare else ''), METHODS[k],
                    2 if DRY else 15, 2, 'torch.compile', prepare)
            if prepare: torch._dynamo.reset()

def main():
    steps,rounds = (2,1) if DRY else (13,2)
    for how in PRECISIONS:
        ms = {}
        for k,make in METHODS.items():
            if how!=PRECISIONS[0] and k not in ('labels only','consistency','all terms of the paper',
                                                'all terms, textbook losses'):
                continue
            slow = 'textbook' in k
            row = attempt(how, k, make, min(steps, 8) if slow else steps, 1 if slow else rounds)
            if row: ms[k] = row['ms']
        if how==PRECISIONS[0]:
            for k in ('labels only','all terms of the paper'):
                attempt(how, f'{k}, with reading and augmentation', METHODS[k], steps, rounds, dls=sliced)
        of = lambda what,value: add('step', table='Of these', precision=how, what=what, value=round(value, 3))
        for k in ms:
            if k!='labels only' and 'labels only' in ms:
                of(f'{k}, times labels only', ms[k]/ms['labels only'])
        if {'all terms of the paper','consistency'}<=ms.keys():
            of('share of a step of all terms that mutual information takes',
               1-ms['consistency']/ms['all terms of the paper'])
        if {'all terms of the paper','all terms, textbook losses'}<=ms.keys():
            of('textbook losses, times as long',
               ms['all terms, textbook losses']/ms['all terms of the paper'])

if __name__=='__main__': compiled() if 'compile' in sys.argv else main()

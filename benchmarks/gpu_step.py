"""Milliseconds, launches and memory of a step of each method at the paper's size, in fp32, TF32 and
bf16 (a part of `gpu.sh`).

The step is fastai's whole loop on batches that lie on the device: 4 labelled and 10 unlabelled images
of 224×224, of which 24 go through the U-Net of width 16. The time from one step's beginning to the
next one's, by CUDA events; medians. With the argument `turns`: ways to the same step, which take turns;
with `compile`: the network by torch.compile.
"""
import sys, time, traceback
from functools import cache, partial
from statistics import median
import torch
from torch.profiler import ProfilerActivity, profile
from fastai.basics import Adam, Callback, CancelValidException, noop, set_seed
from fastmiseg import pair_kernels
from fastmiseg.callback.baselines import ConsistencyCallback, EntropyMinCallback
from fastmiseg.callback.copypaste import CopyPasteCallback
from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.pseudo import PseudoLabelCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.data import SemiSupDataBlock
from fastmiseg.learner import miseg_learner
from fastmiseg.losses import CrossEntropyDiceLoss
from fastmiseg.optimizer import ForeachAdam
from fastmiseg.transforms import RandomFlips
from fastai.data.block import TransformBlock
from fastai.vision.core import TensorImage, TensorMask
from gpu import DEVICE, DRY, Clock, add, missing

SIZE,WIDTH,LABELED,UNLABELED = (32,4,2,3) if DRY else (224,16,4,10)
METHODS = {
    'labels only':                       lambda: [],
    'recommended':                       lambda: [MIRegCallback()],
    'all terms of the paper':            lambda: [MIRegCallback.paper()],
    'Mean Teacher':                      lambda: [EMATeacherCallback(T=RandomFlips())],
    'pseudo-labels + teacher':           lambda: [PseudoLabelCallback(), EMATeacherCallback(.99)],
    'copy-paste + teacher':              lambda: [CopyPasteCallback(), EMATeacherCallback(.99)],
    'consistency':                       lambda: [ConsistencyCallback(T=RandomFlips())],
    'entropy minimisation':              lambda: [EntropyMinCallback()],
    'all terms, with a teacher':         lambda: [MIRegCallback.paper(), EMATeacherCallback()],
}
# with Dice beside cross-entropy, and labelled images in a pass of their own
OURS = 'recommended','pseudo-labels + teacher','copy-paste + teacher'
TEXTBOOK = 'all terms, textbook losses'
try:
    from step import TextbookMIReg
    METHODS[TEXTBOOK] = lambda: [TextbookMIReg.paper()]
except ImportError as e: print(f'no textbook losses: {e}')
if DRY:
    METHODS = {k:METHODS[k] for k in ('labels only','consistency','all terms of the paper',*OURS,TEXTBOOK)}
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

def learner(k, how, n_iters, dls=None, **kw):
    "For the method `k`"
    set_seed(0)
    set_precision(how)
    if dls: dls = dls(n_iters)
    else: repeat((dls:=loaders(n_iters)).train)
    learn = miseg_learner(dls, width=WIDTH, cbs=METHODS[k](),
                          loss_func=CrossEntropyDiceLoss() if k in OURS else None, **kw)
    learn.paired_batch.passes = 2 if k in OURS else 1
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
    busy = sum(e.device_time_total for e in kernels)/1000/steps
    return len(kernels)/steps, busy

class NoValidation(Callback):
    def before_validate(self): raise CancelValidException()

def compile_network(learn):
    "The whole network by `torch.compile`; the methods take their maps from inside it"
    learn.add_cb(NoValidation()) # whose other sizes would have to be compiled too
    learn.model.compile(dynamic=False, fullgraph=True, backend='eager' if DRY else 'inductor')

def times_of(learn, steps):
    "Milliseconds of each step of an epoch, the first ones and the last left out"
    learn.dls.train.n_iters = steps
    learn.fit(1, 1e-4, cbs=(mark:=Mark()))
    gaps = mark.clock.gaps()
    return gaps[min(3, steps-1):-1] or gaps

def measure(how, k, learn, steps, rounds):
    "A row: milliseconds, launches, memory of a step"
    learn.fit(1, 1e-4)
    if DEVICE=='cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = [t for _ in range(rounds) for t in times_of(learn, steps)]
    row = dict(precision=how, method=k, ms=round(median(times), 3))
    if DEVICE=='cuda': row['peak_mb'] = round(torch.cuda.max_memory_allocated()/2**20)
    try:
        if how==PRECISIONS[0]:
            n,busy = launches(learn, 2)
            row.update(launches=round(n), busy_ms=round(busy, 3))
    except Exception: traceback.print_exc()
    return row

def attempt(how, k, steps, rounds, into='Steps', prepare=None, dls=None, called=None):
    "The row of a method, unless it is there"
    called,begun = called or k,time.perf_counter()
    if not missing('step', table=into, precision=how, method=called): return
    try:
        learn = learner(k, how, 4 if not DRY else 2, dls)
        if prepare: prepare(learn)
        row = measure(how, called, learn, steps, rounds)
        add('step', table=into, **row, seconds=round(time.perf_counter()-begun, 1))
        print(row, f'in {time.perf_counter()-begun:.1f} s', flush=True)
    except Exception as e:
        traceback.print_exc(limit=4)
        add('step', table='Failures', precision=how, method=called, error=f'{type(e).__name__}: {e}'[:300])

def sliced(n_iters, resident=None):
    "Loaders that read: random slices of 384×384, cropped to 224 and augmented as the recipe for ACDC says"
    from gpu_slices import Noise, loaders
    return loaders(Noise(48 if DRY else 384, 32 if DRY else 224), ('labeled','valid',('unlabeled',)),
                   bs=LABELED, unlabeled_bs=UNLABELED, n_iters=n_iters, device=DEVICE, resident=resident)

def compiled():
    "The same with a compiled network, and what compiling takes"
    for k in ['labels only'] if DRY else ['labels only','all terms of the paper']:
        for prepare in (None, compile_network):
            attempt(PRECISIONS[0], k, 2 if DRY else 15, 2, 'torch.compile', prepare,
                    called=k+(', network compiled' if prepare else ''))
            if prepare: torch._dynamo.reset()

def ways():
    "What was made faster: name -> (method, name -> what is set before its steps, and its learner's arguments)"
    sums = lambda how: lambda: setattr(pair_kernels, 'implementation', how)
    one_by_one = lambda *args, **kw: Adam(*args, eps=1e-8, **kw) # `miseg_learner` takes no notice of what it is
    yield 'the sums over pairs (all terms of the paper)', 'all terms of the paper', {
        'Triton kernels': (sums('triton'), {}), 'batched products': (sums('torch'), {}),
        'the code for CPUs': (sums('loop'), {})}
    yield 'the optimiser (labels only)', 'labels only', {
        'all parameters at once': (noop, dict(opt_func=partial(ForeachAdam, eps=1e-8))),
        'one by one': (noop, dict(opt_func=one_by_one))}
    yield 'slices, augmented (labels only)', 'labels only', {
        'on the device': (noop, dict(dls=partial(sliced, resident=True))),
        'read': (noop, dict(dls=partial(sliced, resident=False)))}

def turns():
    "Steps of different ways to the same thing, which take turns in one process"
    how,(steps,rounds) = PRECISIONS[0],(2,1) if DRY else (13,3)
    for what,k,choices in ways():
        if not missing('turns', what=what, precision=how): continue
        try:
            learners = {way: learner(k, how, steps, **kw) for way,(_,kw) in choices.items()}
            times = {way:[] for way in choices}
            for i in range(1+rounds): # the first compiles
                for way,(prepare,_) in choices.items():
                    prepare()
                    found = times_of(learners[way], steps)
                    if i: times[way] += found
            for way,t in times.items():
                add('turns', what=what, precision=how, way=way, ms=round(median(t), 3), steps=len(t))
                print(what, way, round(median(t), 3), flush=True)
        except Exception as e:
            traceback.print_exc(limit=4)
            add('turns', table='Failures', what=what, error=f'{type(e).__name__}: {e}'[:300])
        finally: pair_kernels.implementation = AS_IT_WAS

AS_IT_WAS = pair_kernels.implementation

def ratios(how):
    from gpu import OUT, rows
    ms = {o['method']:o['ms'] for o in rows(OUT, 'step') if o['table']=='Steps' and o['precision']==how}
    def of(what, value): add('step', table='Of these', precision=how, what=what, value=round(value, 3))
    for k in ms:
        if k not in ('labels only',TEXTBOOK) and 'labels only' in ms:
            of(f'{k}, times labels only', ms[k]/ms['labels only'])
    if {'all terms of the paper','consistency'}<=ms.keys():
        of('share of a step of all terms that mutual information takes',
           1-ms['consistency']/ms['all terms of the paper'])

def main():
    steps,rounds = (2,1) if DRY else (13,2)
    first,*others = PRECISIONS
    for k in METHODS:
        if k!=TEXTBOOK: attempt(first, k, steps, rounds)
    for k in ['labels only'] if DRY else ['labels only','all terms of the paper']:
        attempt(first, k, steps, rounds, dls=sliced, called=f'{k}, with reading and augmentation')
    ratios(first)
    for how in others:
        for k in ('labels only','all terms of the paper','recommended','consistency'): attempt(how, k, steps, rounds)
        ratios(how)
    # eight tenths of a second a step, so last, and once
    if TEXTBOOK in METHODS: attempt(first, TEXTBOOK, min(steps, 6), 1)

if __name__=='__main__': dict(compile=compiled, turns=turns).get(sys.argv[-1], main)()

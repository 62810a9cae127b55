"""Cost of a training step: each method against partial supervision, the paper's against its textbook form.

    OMP_NUM_THREADS=1 python benchmarks/step.py   # the paper's step, 224×224: step.md (some minutes)
    OMP_NUM_THREADS=1 python benchmarks/step.py --size 64 --width 4 --repeats 3   # a look

Processor time (`time.process_time`) from the first callback of a batch to the last, reading excluded;
the methods take turns; medians. Ratios are what to compare.
"""
import argparse, os, platform, time
from pathlib import Path
from statistics import median
import numpy as np, torch
from torch import nn
from fastai.basics import Callback, Learner, TransformBlock, noop, set_seed
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.core import TensorImage, TensorMask
from fastmiseg.callback.baselines import ConsistencyCallback, EntropyMinCallback
from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.data import SemiSupDataBlock
from fastmiseg.learner import reuse_memory
from fastmiseg.models import create_unet
from fastmiseg.mutual_info import consistency_loss, global_mi_loss
from fastmiseg.transforms import RandomFlips
from mutual_info import textbook

class TextbookMIReg(MIRegCallback):
    "The same losses with separate heads and one convolution for each"
    def make_projectors(self, found):
        make = lambda n,c: (nn.Linear(c, self.n_clusters[n]) if n in self.global_layers else
                            nn.Conv2d(c, self.n_clusters[n], 1))
        return nn.ModuleDict({n: nn.ModuleList(make(n, s.channels) for _ in range(self.n_heads))
                              for n,s in found.items()})

    def penalty(self, step):
        f,g = ({n: o.float() for n,o in maps.items()} for maps in (step.feats['tx'], step.target_feats))
        one = lambda head,x: head(x.amax((2,3))).softmax(1)[:,None]
        glob = [global_mi_loss(one(h, f[n]), one(h, g[n]))
                for n in self.global_layers for h in self.projectors[n]]
        local = [textbook(self.projectors[n], f[n], step.T(g[n]), self.neighborhood[n])
                 for n in self.local_layers]
        return dict(global_mi=sum(glob)/len(glob), local_mi=sum(local)/len(local),
                    consistency=consistency_loss(step.probs('tx'), step.T(step.target)))

METHODS = {
    'partial supervision':               lambda: [],
    'entropy minimisation':              lambda: [EntropyMinCallback()],
    'consistency':                       lambda: [ConsistencyCallback(T=RandomFlips())],
    'Mean Teacher':                      lambda: [EMATeacherCallback(T=RandomFlips())],
    'all terms of the paper':            lambda: [MIRegCallback.paper()],
    'all terms, with a teacher':         lambda: [MIRegCallback.paper(), EMATeacherCallback()],
    'all terms, textbook losses':        lambda: [TextbookMIReg.paper()],
    'recommended (T warps, two passes)': lambda: [MIRegCallback()],
}

def passes_of(cbs):
    "The paper has one pass through the network, the recommended method two"
    return 2 if any(getattr(cb, 'balance', None) for cb in cbs) else 1

class _From(Callback):
    order = -100
    def before_batch(self): self.learn.begun = time.process_time()

class _To(Callback):
    order = 100
    def before_fit(self): self.learn.took = []
    def after_batch(self):
        if self.training: self.learn.took.append(time.process_time()-self.learn.begun)

class _Then(Callback):
    "A step of `loop` after each step of the learner"
    order = _To.order+1
    def __init__(self, loop): self.loop,self.took = loop,[]
    def after_batch(self):
        if not self.training: return
        begun = time.process_time()
        self.loop()
        self.took.append(time.process_time()-begun)

def loaders(o, n_iters):
    gen = lambda i: torch.Generator().manual_seed(i)
    blocks = [
        TransformBlock(type_tfms=lambda i: TensorImage(torch.rand(1,o.size,o.size,generator=gen(i)))),
        TransformBlock(type_tfms=lambda i: TensorMask(torch.randint(4,(o.size,o.size),generator=gen(i)))),
    ]
    block = SemiSupDataBlock(blocks=blocks, splitter=lambda items: (range(20), range(20,21), range(21,60)))
    return block.dataloaders(list(range(60)), bs=o.labeled, unlabeled_bs=o.unlabeled, n_iters=n_iters,
                             device='cpu')

def learner(o, cbs):
    set_seed(0)
    learn = Learner(loaders(o, 2), create_unet(n_in=1, n_out=4, width=o.width),
                    loss_func=CrossEntropyLossFlat(axis=1), wd=1e-5, cbs=[*cbs, _From(), _To()])
    learn.paired_batch.passes = passes_of(cbs)
    learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__=='ProgressCallback'])
    learn.logger = noop
    return learn

def bare(o, cb):
    """The step of all terms written out, with nothing of fastai or of the callbacks but the losses and
    the optimiser"""
    learn = learner(o, [])
    learn.create_opt()
    net,opt,flips = learn.model,learn.opt,RandomFlips()
    opt.param_lists[-1].extend(cb.projectors.parameters())
    maps = {}
    where = dict(Conv5=net.Conv5, Upconv3=net.Upconv3, Upconv2=net.Upconv2)
    for n,m in where.items(): m.register_forward_hook(lambda m,i,out,n=n: maps.__setitem__(n, out))
    x_l,x_u,y = learn.dls.one_batch()
    x_l,x_u,y = (t.as_subclass(torch.Tensor) for t in (x_l,x_u,y))
    net.train()
    def step():
        T = flips.draw(len(x_u))
        pred = net(torch.cat([x_l, x_u, T(x_u)]))
        sizes = [len(x_l), len(x_u), len(x_u)]
        l,x,tx = pred.split(sizes)
        feats = {n: m.split(sizes) for n,m in maps.items()}
        proj,f,g = cb.projectors,{n: m[2] for n,m in feats.items()},{n: m[1] for n,m in feats.items()}
        loss = nn.functional.cross_entropy(l, y) + .1*proj['Conv5'].loss(f['Conv5'], g['Conv5'])
        loss = loss + .1*sum(proj[n].loss(f[n], T(g[n]), w) for n,w in (('Upconv3',3), ('Upconv2',7)))/2
        loss = loss + 5*consistency_loss(tx.softmax(1), T(x.softmax(1)))
        loss.backward()
        opt.step()
        opt.zero_grad()
    return step

def measure(o):
    learners = {k: learner(o, make()) for k,make in METHODS.items()}
    for learn in learners.values(): learn.fit(1, 1e-4)
    times = {k: [] for k in learners}
    for _ in range(o.repeats):
        for k,learn in learners.items():
            learn.fit(1, 1e-4)
            times[k] += learn.took
    return {k: median(t) for k,t in times.items()}

def overhead(o):
    """What the learner's steps take beyond those of the bare loop, step by step in turn: median seconds
    of both, median of the differences and its standard error"""
    learn = learner(o, [cb:=MIRegCallback.paper()])
    learn.fit(1, 1e-4)
    then = _Then(bare(o, cb))
    learn.dls = loaders(o, o.pairs+5)
    learn.fit(1, 1e-4, cbs=then)
    ours,theirs = np.array(learn.took[5:]),np.array(then.took[5:])
    draws = np.random.default_rng(0).integers(len(ours), size=(2000, len(ours)))
    return (np.median(ours), np.median(theirs), np.median(ours-theirs),
            np.median((ours-theirs)[draws], axis=1).std())

def report(o, t, extra):
    ours,book = t['all terms of the paper'],t['all terms, textbook losses']
    rows = [f'| {k} | {t[k]/t["partial supervision"]:.2f} | {t[k]:.2f} |' for k in METHODS]
    return '\n'.join([
        (f'A step of {o.labeled} labelled and {o.unlabeled} unlabelled images of {o.size}×{o.size}, '
         f'U-Net of width {o.width}, one thread, Adam.'), '',
        '| method | step, partial supervision = 1 | seconds |', '|---|---|---|', *rows, '',
        ('- all terms against the same with textbook losses and separate heads: '
         f'{ours/book:.2f} of the time'),
        ('- share of the step that mutual information takes (beyond a step of consistency alone, '
         'which sends the same images through the network): '
         f'{100*(ours-t["consistency"])/ours:.1f} %'), '',
        ("What callbacks and fastai's loop add to the same step of all terms written out by hand; "
         'a step of each in turn, median of the differences (its standard error by bootstrap):'), '',
        '| images | U-Net | step by hand | added | pairs of steps |', '|---|---|---|---|---|',
        *(f'| {e.size}×{e.size} | width {e.width} | {1000*b:.0f} ms '
          f'| {1000*d:.1f} ({1000*se:.1f}) ms, {100*d/b:.1f} ({100*se/b:.1f}) % | {e.pairs} |'
          for e,(a,b,d,se) in extra), '',
        ('All with channels-last weights and `reuse_memory`, as `miseg_learner` has them on a CPU '
         '(what these give: [network.md](network.md)). '
         f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), '
         f'torch {torch.__version__}, processor time, median of {2*o.repeats} steps. '
         'Made by `OMP_NUM_THREADS=1 python benchmarks/step.py`.'), ''])

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--width', type=int, default=16)
    parser.add_argument('--labeled', type=int, default=4)
    parser.add_argument('--unlabeled', type=int, default=10)
    parser.add_argument('--repeats', type=int, default=3, help='rounds of two steps of each method')
    parser.add_argument('--pairs', type=int, default=25, help='steps with and without callbacks, in turn')
    o = parser.parse_args()
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    reuse_memory()
    small = argparse.Namespace(**{**vars(o), 'size':64, 'width':8, 'pairs':8*o.pairs})
    text = report(o, measure(o), [(e, overhead(e)) for e in (small, o)])
    print(text)
    if (o.size, o.width, o.labeled, o.unlabeled)==(224,16,4,10):
        (Path(__file__).parent/'step.md').write_text(text)

if __name__=='__main__': main()

"""One of several gloo processes on the CPU (or the only one, with the batch of all): trains, and writes what it has in
the end"""
import os, sys, warnings; warnings.filterwarnings('ignore')
from contextlib import nullcontext
import torch, torch.distributed as dist
from torch import nn
from fastai.basics import Callback, Datasets, L, set_seed
from fastai.distributed import *
from fastai.vision.core import TensorImage, TensorMask
from fastmiseg.callback.copypaste import CopyPasteCallback
from fastmiseg.callback.pseudo import PseudoLabelCallback
from fastmiseg.callback.resume import ResumeCallback
from fastmiseg.callback.state import checkpoints, load_state, save_state
from fastmiseg.lock import only_one
from fastmiseg.callback.method import SemiSupCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.metrics import VolumeDice
from own_methods import METHODS
from toy import UNet, balanced_mireg, disc, learner, loaders, quiet, small_mireg

class GroupNormed(UNet):
    "Without batch norm, whose statistics would be those of a process"
    def __init__(self):
        super().__init__(1, 2, width=4)
        for m in list(self.modules()):
            for k,o in list(m._modules.items()):
                if isinstance(o, nn.BatchNorm2d): m._modules[k] = nn.GroupNorm(2, o.num_features)
        nn.init.constant_(self.head.bias[1:], 1.) # so that there is something to score

class Seen(Callback):
    "What this process saw of the unlabelled images and of T, and the terms of each step"
    order = SemiSupCallback.order+1
    def __init__(self): super().__init__(); self.x,self.T,self.terms,self.seen = [],[],[],[]
    def after_pred(self):
        if self.training and (step:=self.learn.paired_batch.step):
            self.x.append(step.x_u.sum((1,2,3)).tolist())
            self.T.append(step.T.do.tolist())
    def after_loss(self):
        if self.training: self.terms.append({k:float(o) for r in self._mine() for k,o in r.terms.items()})
        else: self.seen.append(len(self.x_of()))
    def x_of(self): return self.learn.xb[0]
    def _mine(self): return [cb for cb in self.learn.cbs if isinstance(cb, SemiSupCallback)]

def plain_loaders(bs):
    ds = Datasets(list(range(13)), tfms=[[lambda i: TensorImage(disc(i)[0])], [lambda i: TensorMask(disc(i)[1])]],
                  splits=[range(8),range(8,13)])
    return ds.dataloaders(bs=bs, num_workers=0, shuffle=False, device='cpu')

def run(kind, path, world):
    n = 1 if world>1 else 2
    norm = kind=='norm'
    cbs = [mi:=small_mireg(unlabeled=list(range(13,21)) if kind=='files' else None),
           teacher:=EMATeacherCallback(decay=.5), seen:=Seen()]
    learn = quiet(learner(path, net=None if norm else GroupNormed,
                          dls=plain_loaders(2*n) if kind=='files' else loaders(bs=2*n, unlabeled_bs=4*n, n_iters=4),
                          metrics=VolumeDice()))
    if world>1:
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit_one_cycle(2, 1e-2, cbs=cbs)
    else: learn.fit_one_cycle(2, 1e-2, cbs=cbs)
    return dict(model=dict(learn.model.state_dict()), heads=mi.projectors.state_dict(), teacher=teacher.average.tensors,
                x=seen.x, T=[list(map(list,t)) for t in seen.T], terms=seen.terms,
                names=list(learn.recorder.metric_names)[1:-1], values=list(learn.recorder.values[-1]),
                hooks=sum(len(m._forward_hooks) for m in learn.model.modules()))

def pseudo_labels(): return [PseudoLabelCallback(threshold=.5, dropped=.5)]
def all_together():
    return [PseudoLabelCallback(threshold=.5, moved=True), CopyPasteCallback(start=.3), balanced_mireg()]

def own(method, path, world):
    "The network after a training with a method, or several, and a teacher"
    n = 1 if world>1 else 2
    learn = quiet(learner(path, net=GroupNormed, dls=loaders(bs=2*n, unlabeled_bs=4*n, n_iters=4)))
    cbs = [*L(method()), EMATeacherCallback(decay=.5)]
    if world>1:
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit_one_cycle(1, 1e-2, cbs=cbs)
    else: learn.fit_one_cycle(1, 1e-2, cbs=cbs)
    return dict(learn.model.state_dict())

class Noisy(GroupNormed):
    def forward(self, x): return super().forward(x+.05*torch.randn_like(x) if self.training else x)

class Stop(Callback):
    order = 95
    def __init__(self, at): super().__init__(); self.at = at
    def after_batch(self):
        if self.training and self.train_iter==self.at: raise KeyboardInterrupt

def resume(kind, path, rank, stops):
    """Each process has random numbers of its own, and other ones at each attempt; interrupted in the middle of an epoch
    and at its end"""
    for k,stop in enumerate([*stops, None]):
        set_seed(10*k+rank)
        dls = plain_loaders(2) if kind=='files' else loaders(bs=2, unlabeled_bs=4, n_iters=4)
        learn = quiet(learner(path, net=Noisy, seed=10*k+rank, dls=dls))
        cbs = [mi:=balanced_mireg(unlabeled=list(range(13,21)) if kind=='files' else None),
               teacher:=EMATeacherCallback(decay=.5), ResumeCallback(f'{path}/{kind}{len(stops)}', every=1), Stop(stop)]
        try:
            with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit_one_cycle(2, 1e-2, cbs=cbs)
        except KeyboardInterrupt: assert stop
        else: assert not stop
    return dict(model=dict(learn.model.state_dict()), heads=mi.projectors.state_dict(),
                balance=mi.balance.state_dict()['sizes'], teacher=teacher.average.tensors,
                random=dict(torch=torch.get_rng_state()),
                log=dict(values=torch.tensor(list(learn.recorder.values[-1]))))

def refused(path, rank):
    """A folder that is not shared, one written by another number of processes, one where another training is, other
    settings"""
    res = []
    def fit(folder, lr=None):
        learn = quiet(learner(path, net=Noisy, dls=loaders(bs=2, unlabeled_bs=4, n_iters=4)))
        with learn.distrib_ctx(sync_bn=False, cpu=True):
            learn.fit_one_cycle(2, lr or 1e-2,
                                cbs=[small_mireg(), EMATeacherCallback(decay=.5), ResumeCallback(folder)])
    for folder in (f'{path}/paired0' if rank else f'{path}/empty', f'{path}/alone'):
        if folder.endswith('alone') and not rank:
            os.makedirs(folder)
            o = load_state(last:=checkpoints(f'{path}/paired0')[-1])
            save_state({**o, 'ranks':o['ranks'][:1]}, f'{folder}/{last.name}')
        dist.barrier()
        try: fit(folder)
        except ValueError as e: res.append(str(e))
    # held by the process that would write, in another open file
    with only_one(f'{path}/paired0') if not rank else nullcontext():
        dist.barrier()
        try: fit(f'{path}/paired0')
        except ValueError as e: res.append(str(e))
        dist.barrier()
    try: fit(f'{path}/paired0', 1e-3)
    except ValueError as e: res.append(str(e))
    return res

if __name__=='__main__':
    path,world,rank = sys.argv[1],int(os.environ.get('WORLD_SIZE', 1)),int(os.environ.get('RANK', 0))
    torch.set_num_threads(1)
    res = {k: run(k, path, world) for k in ('paired','norm','files')}
    res['own'] = {m.__name__: own(m, path, world)
                  for m in [*METHODS, pseudo_labels, CopyPasteCallback, balanced_mireg, all_together]}
    if world>1:
        for k in ('paired','files'):
            res[f'resumed {k}'] = [resume(k, path, rank, stops) for stops in ((), (1,2,3) if k=='files' else (3,4,6))]
        res['refused'] = refused(path, rank)
    torch.save(res, f'{path}/{world}-{rank}.pt')
    if dist.is_initialized(): dist.destroy_process_group()

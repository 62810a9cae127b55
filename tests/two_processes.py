"One of several gloo processes on the CPU (or the only one, with the batch of all): trains, and writes what it has in the end"
import os, sys, warnings; warnings.filterwarnings('ignore')
import torch, torch.distributed as dist
from torch import nn
from fastai.basics import Callback, Datasets, defaults
from fastai.distributed import *
from fastai.vision.core import TensorImage, TensorMask
from fastmiseg.callback.baselines import ConsistencyCallback
from fastmiseg.callback.semisup import SemiSupCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.data import processes
from fastmiseg.metrics import VolumeDice
from toy import MIRegCallback, UNet, disc, learner, loaders, quiet, small_mireg

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
        if self.training and (v:=self.learn.paired_batch._v): self.x.append(v.x.sum((1,2,3)).tolist()); self.T.append(v.T.axes)
    def after_loss(self):
        if self.training: self.terms.append({k:float(o) for r in self._mine() for k,o in r._terms.items()})
        else: self.seen.append(len(self.x_of()))
    def x_of(self): return self.learn.xb[0]
    def _mine(self): return [cb for cb in self.learn.cbs if isinstance(cb, SemiSupCallback)]

def plain_loaders(bs):
    ds = Datasets(list(range(13)), tfms=[[lambda i: TensorImage(disc(i)[0])], [lambda i: TensorMask(disc(i)[1])]], splits=[range(8),range(8,13)])
    return ds.dataloaders(bs=bs, num_workers=0, shuffle=False, device='cpu')

def run(kind, path, world):
    n = 1 if world>1 else 2
    norm = kind=='norm'
    cbs = [mi:=small_mireg(unlabeled=list(range(13,21)) if kind=='files' else None), teacher:=EMATeacherCallback(decay=.5), seen:=Seen()]
    learn = quiet(learner(path, net=None if norm else GroupNormed, dls=plain_loaders(2*n) if kind=='files' else loaders(bs=2*n, unlabeled_bs=4*n, n_iters=4), metrics=VolumeDice()))
    if world>1:
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit_one_cycle(2, 1e-2, cbs=cbs)
    else: learn.fit_one_cycle(2, 1e-2, cbs=cbs)
    return dict(model=dict(learn.model.state_dict()), heads=mi.projectors.state_dict(), teacher=teacher.average, x=seen.x, T=[list(map(list,t)) for t in seen.T],
                terms=seen.terms, names=list(learn.recorder.metric_names)[1:-1], values=list(learn.recorder.values[-1]), hooks=sum(len(m._forward_hooks) for m in learn.model.modules()))

if __name__=='__main__':
    path,world,rank = sys.argv[1],int(os.environ.get('WORLD_SIZE', 1)),int(os.environ.get('RANK', 0))
    torch.set_num_threads(1)
    torch.save({k: run(k, path, world) for k in ('paired','norm','files')}, f'{path}/{world}-{rank}.pt')
    if dist.is_initialized(): dist.destroy_process_group()

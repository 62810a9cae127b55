"""One of several gloo processes that share a device (or the only one, with the batch of all): trains, and writes what
it has in the end"""
import sys, warnings; warnings.filterwarnings('ignore')
import torch, torch.distributed as dist
from fastai.basics import Callback, SGD
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastmiseg.callback.baselines import ConsistencyCallback
from toy import UNet, learner, loaders, quiet

class GroupNormed(UNet):
    "Without batch norm, whose statistics would be those of a process"
    def __init__(self):
        super().__init__(1, 2, width=4)
        for m in list(self.modules()):
            for n,o in list(m.named_children()):
                if isinstance(o, nn.BatchNorm2d): setattr(m, n, nn.GroupNorm(1, o.num_features))

class Keep(Callback):
    def before_fit(self): self.losses = []
    def after_backward(self): self.losses.append(self.learn.loss_grad.detach())

if __name__=='__main__':
    path,device,rank,world = sys.argv[1],sys.argv[2],int(sys.argv[3]),int(sys.argv[4])
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    if world>1: dist.init_process_group('gloo', init_method=f'file://{path}/meet', rank=rank, world_size=world)
    dls = loaders(bs=4//world, unlabeled_bs=4//world, device=device)
    learn = quiet(learner(path, net=GroupNormed, dls=dls, opt_func=SGD))
    learn.model.to(device)
    if world>1: learn.model = DistributedDataParallel(learn.model)
    learn.fit(2, 1e-2, cbs=[ConsistencyCallback(), keep:=Keep()])
    model = learn.model.module if world>1 else learn.model
    torch.save(dict(model={k:o.cpu() for k,o in model.state_dict().items()}, steps=[float(o) for o in keep.losses]),
               f'{path}/{world}-{rank}.pt')
    if world>1: dist.destroy_process_group()

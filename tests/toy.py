"Discs on noise: a data set that fits in a test"
import tracemalloc

import torch
from fastai.basics import L, Learner, TransformBlock, noop, set_seed
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.core import TensorImage, TensorMask
from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.method import SemiSupCallback
from fastmiseg.data import SemiSupDataBlock
from fastmiseg.models import UNet

def disc(i, size=16, channels=1):
    g = torch.Generator().manual_seed(i)
    c,r = torch.randint(size//4, 3*size//4, (2,), generator=g),torch.randint(2, size//3, (1,), generator=g)
    yy,xx = torch.meshgrid(torch.arange(size)-c[0], torch.arange(size)-c[1], indexing='ij')
    y = (yy**2+xx**2<r**2).long()
    return (.3*y+.3+.2*torch.randn(size,size,generator=g))[None].repeat(channels,1,1), y

def loaders(bs=2, unlabeled_bs=3, n_iters=4, seed=0, n=20, size=16, channels=1, **kw):
    image,mask = (TransformBlock(type_tfms=f) for f in (lambda i: TensorImage(disc(i,size,channels)[0]),
                                                        lambda i: TensorMask(disc(i,size)[1])))
    block = SemiSupDataBlock(blocks=[image,mask], splitter=lambda items: (range(4), range(4,9), range(9,n)))
    return block.dataloaders(list(range(n)), bs=bs, unlabeled_bs=unlabeled_bs, n_iters=n_iters, seed=seed, **kw)

def learner(path, net=None, seed=0, dls=None, loss_func=None, width=2, **kw):
    set_seed(seed)
    learn = Learner(dls or loaders(), net() if isinstance(net, type) else net or UNet(1,2,width=width),
                    loss_func=loss_func or CrossEntropyLossFlat(axis=1), path=path, **kw)
    learn.paired_batch.passes = 1 # where a test says nothing
    return learn

def small_mireg(**kw): return MIRegCallback.paper(**{**dict(n_clusters=3, n_heads=2, local_layers='Upconv3'), **kw})

def balanced_mireg(**kw):
    "All that remembers something of the steps before"
    return small_mireg(**{**dict(memory=.9, marginal=1.5, balance=True), **kw})

def quiet(learn):
    learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__=='ProgressCallback'])
    learn.logger = noop
    return learn

def hooks(model):
    return sum(len(m._forward_hooks)+len(m._forward_pre_hooks)+len(m._backward_hooks) for m in model.modules())

def peak_of(f):
    "Bytes that NumPy's arrays take at most while a function runs"
    tracemalloc.start()
    try:
        f()
        return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()

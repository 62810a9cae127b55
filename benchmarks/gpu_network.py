"""What makes the network's part of the step fast: precision, memory format, the optimiser's way of
stepping, CUDA graphs, torch.compile; and what reading costs (a part of `gpu.sh`).

A step by hand: forward on 24 images of 224×224, cross-entropy, backward, Adam. Each variant is run
whatever happens to the others.
"""
import sys, time, traceback
from contextlib import nullcontext
from functools import partial
import torch
from torch import nn
from fastai.basics import Adam
from fastmiseg.models import create_unet
from gpu import DEVICE, DRY, add, missing, take_turns

SIZE,WIDTH,IMAGES = (32,4,3) if DRY else (224,16,24)

def network(last=True, seed=0):
    torch.manual_seed(seed)
    net = create_unet('unet', n_in=1, n_out=4, width=WIDTH).to(DEVICE)
    return net if last else net.to(memory_format=torch.contiguous_format)

def batch(last=True):
    g = torch.Generator().manual_seed(0)
    x,y = (torch.rand(IMAGES,1,SIZE,SIZE, generator=g),
           torch.randint(4, (IMAGES,SIZE,SIZE), generator=g))
    return (x.to(DEVICE, memory_format=torch.channels_last if last else torch.contiguous_format),
            y.to(DEVICE))

def cast(how): return torch.autocast(DEVICE, dtype=torch.bfloat16) if how=='bf16' else nullcontext()

def precision(how):
    torch.set_float32_matmul_precision('high' if how=='tf32' else 'highest')
    torch.backends.cudnn.allow_tf32 = how=='tf32'

def optimiser(kind, net):
    if kind=='none': return None
    if kind=='fastai': return Adam(net.parameters(), lr=1e-4, eps=1e-8, wd=1e-5)
    if kind=='miseg':
        from fastmiseg.optimizer import ForeachAdam
        return ForeachAdam(net.parameters(), lr=1e-4, eps=1e-8, wd=1e-5)
    return torch.optim.Adam(net.parameters(), lr=1e-4, **{kind: True})

def step(how, last=True, opt='foreach', run=lambda net: net):
    net,(x,y) = network(last),batch(last)
    o,f = optimiser(opt, net),run(net)
    def go():
        precision(how)
        with cast(how): pred = f(x)
        loss = nn.functional.cross_entropy(pred.float(), y)
        loss.backward()
        if o is not None:
            o.step()
            o.zero_grad()
        else:
            for p in net.parameters(): p.grad = None
        return loss
    return go

def forward(how):
    net,(x,_) = network(),batch()
    def go():
        precision(how)
        with torch.no_grad(), cast(how): return net(x)
    return go

def graphed(how):
    "Forward, loss and backward as one CUDA graph"
    precision(how)
    net,(x,y) = network(),batch()
    def go():
        with (torch.autocast(DEVICE, dtype=torch.bfloat16, cache_enabled=False) if how=='bf16'
              else nullcontext()):
            loss = nn.functional.cross_entropy(net(x).float(), y)
        loss.backward()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            for p in net.parameters(): p.grad = None
            go()
    torch.cuda.current_stream().wait_stream(stream)
    for p in net.parameters(): p.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): go()
    return graph.replay

def variants():
    for how in ('fp32','tf32','bf16') if DEVICE=='cuda' else ('fp32',):
        yield f'{how}, torch foreach Adam', partial(step, how)
        yield f'{how}, contiguous', partial(step, how, last=False)
    how = 'bf16' if DEVICE=='cuda' else 'fp32'
    for opt in ('none','fastai','miseg',*(['fused'] if DEVICE=='cuda' else [])):
        yield f'{how}, {opt} optimiser', partial(step, how, opt=opt)
    yield f'{how}, forward only', partial(forward, how)
    if DEVICE=='cuda':
        for o in ('fp32','bf16'):
            yield f'{o}, CUDA graph of forward and backward', partial(graphed, o)
        yield ('bf16, torch.compile, no optimiser',
               partial(step, 'bf16', opt='none', run=torch.compile))
        yield ('bf16, torch.compile reduce-overhead, no optimiser',
               partial(step, 'bf16', opt='none', run=partial(torch.compile, mode='reduce-overhead')))

def network_rows():
    for name,make in variants():
        if not missing('network', variant=name): continue
        begun = time.perf_counter()
        try:
            f = make()
            f()
            if DEVICE=='cuda': torch.cuda.synchronize()
            row = dict(variant=name, first_s=round(time.perf_counter()-begun, 1),
                       ms=round(take_turns({name:f}, 1, 2 if DRY else 30)[name], 3))
        except Exception as e:
            traceback.print_exc(limit=3)
            row = dict(variant=name, error=f'{type(e).__name__}: {e}'[:200])
        add('network', table='The network by hand', **row)
        print(row, flush=True)

def loading_rows():
    """Batches of the paired loader: 4 and 10 random slices of 384×384, cropped to 224 and augmented as
    the recipe for ACDC says; one by one, and from the device"""
    from gpu_slices import Noise, loaders
    n,store = (4,Noise(48, 32)) if DRY else (40,Noise(384, 224))
    for resident in (False,True):
        for augment in (False,True):
            name = f"{'from the device' if resident else 'one by one'}{', augmented' if augment else ''}"
            try:
                dl = loaders(store, ('labeled','valid',('unlabeled',)), augment=augment, n_iters=n,
                             device=DEVICE, resident=resident).train
                for _ in range(2):
                    if DEVICE=='cuda': torch.cuda.synchronize()
                    begun = time.perf_counter()
                    for b in dl: pass
                    host = time.perf_counter()-begun
                    if DEVICE=='cuda': torch.cuda.synchronize()
                    whole = time.perf_counter()-begun
                row = dict(loader=name, host_ms=round(1000*host/n, 2), ms=round(1000*whole/n, 2))
            except Exception as e:
                traceback.print_exc(limit=3)
                row = dict(loader=name, error=f'{type(e).__name__}: {e}'[:200])
            add('network', table='Reading a batch', **row)
            print(row, flush=True)

if __name__=='__main__': loading_rows() if 'loading' in sys.argv else network_rows()

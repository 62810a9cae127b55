"Several processes, each with a part of the batch, have the loss and the gradients of the whole batch."
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastmiseg.mutual_info import global_mi_loss, local_mi_loss
from fastmiseg.projectors import GlobalProjector, LocalProjector

def everything(f, g, n_in):
    "Losses, gradients of the inputs, and gradients of the heads, in one list"
    torch.manual_seed(1)
    local, glob = [P(n_in, n_clusters=4, n_heads=2).double() for P in (LocalProjector, GlobalProjector)]
    f, g = f.clone().requires_grad_(), g.clone().requires_grad_()
    losses = [local.loss(f, g, (3, 5), subtract_min=True), glob.loss(f, g, prior=[.4, .3, .2, .1]),
              local_mi_loss(local(f), local(g), 3, symmetric=False), global_mi_loss(glob(f), glob(g), symmetric=False)]
    sum((i + 1)*l for i, l in enumerate(losses)).backward()
    return [l.detach() for l in losses], [f.grad, g.grad], [p.grad for p in (*local.parameters(), *glob.parameters())]

def worker(rank, splits, f, g, expected, init):
    dist.init_process_group('gloo', init_method=init, rank=rank, world_size=2)
    for parts in splits:
        mine = slice(sum(parts[:rank]), sum(parts[:rank + 1]))
        losses, inputs, heads = everything(f[mine], g[mine], f.shape[1])
        for h in heads: dist.all_reduce(h)
        for a, b in zip(losses + inputs + heads, expected[0] + [o[mine] for o in expected[1]] + expected[2]):
            assert (a - b).abs().max() < 1e-10 and b.abs().max() > 1e-8, (rank, parts, tuple(a.shape))
    dist.destroy_process_group()

def test_two_processes_equal_the_whole_batch(tmp_path):
    "Equal halves, and one image against three"
    torch.manual_seed(0)
    f, g = torch.randn(2, 4, 5, 9, 8, dtype=torch.float64)
    mp.spawn(worker, (((2, 2), (1, 3)), f, g, everything(f, g, 5), f'file://{tmp_path}/meet'), nprocs=2)

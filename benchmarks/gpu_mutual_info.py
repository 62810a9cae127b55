"""The local information loss on a CUDA device: what does each way to it cost, is it right, which launches are best.

    python benchmarks/gpu_mutual_info.py                        # half a minute; --sweep: a minute (a part of `gpu.sh`)
    python benchmarks/gpu_mutual_info.py --device cpu --tiny    # a trial of the script itself

Prints a line for each thing as it is found, and puts what is worth a table into OUT/results.jsonl. Times are of
CUDA events, the median of repeats in alternation.
"""
import argparse, os, subprocess, sys, time
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import product
from statistics import median
from gpu import ENDS, add, missing

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument('--device', default=os.environ.get('FASTMISEG_DEVICE', 'cuda'))
parser.add_argument('--tiny', action='store_true', default=bool(os.environ.get('DRY')),
                    help='small maps, few repeats')
parser.add_argument('--processes', type=int, default=12, help='compile kernels in this many at once')
parser.add_argument('--compile', type=int, help=argparse.SUPPRESS)
parser.add_argument('--seconds', type=float, default=min(ENDS-time.time(), 60),
                    help='the search for the best launches ends then')
parser.add_argument('--sweep', action='store_true', help='search for the best launches')
args = parser.parse_args()
STOP = time.time() + args.seconds
if args.device == 'cpu': os.environ['TRITON_INTERPRET'] = '1' # before triton is imported

import torch
import torch.nn.functional as F
from fastmiseg import mutual_info, pair_kernels, pair_products, pair_sums
from fastmiseg.projectors import LocalProjector

DEVICE, CUDA = args.device, args.device == 'cuda'
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
STAGES = {'224×224, 7×7': dict(n_in=16, shape=(224, 224), size=7),
          '112×112, 3×3': dict(n_in=32, shape=(112, 112), size=3)}
if args.tiny:
    STAGES = {'6×8, 5×5': dict(n_in=16, shape=(6, 8), size=5),
              '5×5, 3×3': dict(n_in=32, shape=(5, 5), size=3)}
BATCH, S, K = (2, 1, 4) if args.tiny else (10, 5, 10)
named = {f32: 'float32', bf16: 'bfloat16', f16: 'float16'}

def say(text=''): print(text, flush=True)

def row(table, **kw):
    add('mutual_info', table=table, **kw)
    say(', '.join(f'{k} {v}' for k, v in kw.items()))

# Ways to the sums: (forward, backward) with the arguments of pair_sums.sums and sums_backward

def spectra(x, weight, bias, padded):
    p = x if weight is None else (torch.einsum('skc,nc...->nsk...', weight, x.float())
                                  + bias[:, :, None, None]).softmax(2)
    c = p.mean((0, 3, 4), keepdim=True)
    return p, c, torch.fft.rfft2(p - c, s=padded)

def padded_size(shape, w):
    return [next(m for m in range(n + o//2, 2*n + 64) if smooth(m)) for n, o in zip(shape, w)]

def smooth(n):
    for o in (2, 3, 5, 7):
        while n % o == 0: n //= o
    return n == 1

def fft_sums(x, y, weight, bias, w):
    "Products in the frequency domain (of the centred parts; without the sums for the centres: cost only)"
    shape = padded_size(x.shape[-2:], w)
    (_, _, P), (_, _, Q) = [spectra(o, weight, bias, shape) for o in (x, y)]
    R = torch.einsum('nskuv,nsluv->skluv', P.conj(), Q)
    R = torch.fft.irfft2(R, s=shape).roll([o//2 for o in w], (-2, -1))[..., :w[0], :w[1]]
    return R.movedim((1, 2), (3, 4)).double()

def fft_gradient(G, x, y, weight, bias, w, needs):
    shape = padded_size(x.shape[-2:], w)
    (p, _, P), (q, _, Q) = [spectra(o, weight, bias, shape) for o in (x, y)]
    kernel = F.pad(G.movedim((3, 4), (1, 2)).float(), (0, shape[1] - w[1], 0, shape[0] - w[0]))
    kernel = torch.fft.rfft2(kernel.roll([-(o//2) for o in w], (-2, -1)))
    out = []
    for eq, o, f in (('skluv,nsluv->nskuv', Q, kernel.conj()), ('skluv,nskuv->nsluv', P, kernel)):
        out.append(torch.fft.irfft2(torch.einsum(eq, f, o), s=shape)[..., :x.shape[-2], :x.shape[-1]])
    z = [torch._softmax_backward_data(o, r, 2, f32) for o, r in zip(out, (p, q))]
    gw = sum(torch.einsum('nskhw,nchw->skc', a, o.float()) for a, o in zip(z, (x, y)))
    return (*[torch.einsum('nskhw,skc->nchw', a, weight).to(x.dtype) for a in z],
            gw, sum(a.sum((0, 3, 4)) for a in z))

WAYS = {'kernels': (pair_kernels.cuda_pair_sums, pair_kernels.cuda_pair_sums_backward),
        'one half': (pair_kernels.cuda_pair_sums, pair_kernels.cuda_pair_sums_backward),
        'products': (pair_products.sums, pair_products.sums_backward),
        'loop': (pair_sums.sums, pair_sums.sums_backward),
        'fft (cost only)': (fft_sums, fft_gradient)}

class Sums(torch.autograd.Function):
    way = 'kernels'
    @staticmethod
    def forward(ctx, x, y, weight, bias, w):
        ctx.save_for_backward(x, y, weight, bias)
        ctx.w, ctx.way = w, Sums.way
        with pair_sums._plain_float32(x):
            return WAYS[ctx.way][0](x, y, weight, bias, w).flatten(1, 2)
    @staticmethod
    def backward(ctx, G):
        G = G.view(len(G), *ctx.w, *G.shape[2:])
        with pair_sums._plain_float32(G):
            grads = WAYS[ctx.way][1](G, *ctx.saved_tensors, ctx.w, ctx.needs_input_grad[:4])
        return *[g if g is None else g.to(o.dtype) for g, o in zip(grads, ctx.saved_tensors)], None

def textbook(head, f, g, size):
    "One convolution for each head: batch as channels, the other map as kernel"
    loss, log = 0, lambda x: x.clamp_min(1e-16).log()
    for w, b in zip(head.weight.view(S, K, -1), head.bias.view(S, K)):
        p, q = [F.conv2d(o, w[:, :, None, None].to(o.dtype), b.to(o.dtype)).softmax(1) for o in (f, g)]
        P = F.conv2d(p.transpose(0, 1), q.transpose(0, 1), padding=size//2).flatten(2).movedim(-1, 0)
        P = P/P.sum((1, 2), keepdim=True)
        P = (P + P.mT)/2
        loss = loss - (P*(log(P) - log(P.sum(1, keepdim=True))
                          - log(P.sum(2, keepdim=True)))).sum((1, 2)).mean()
    return loss/S

def case(n_in, shape, size, dtype=f32, batch=BATCH, scale=1., seed=0):
    torch.manual_seed(seed)
    f = torch.randn(batch, n_in, *shape)
    g = f + .5*torch.randn(batch, n_in, *shape)
    proj = LocalProjector(n_in, K, S)
    with torch.no_grad():
        for p in proj.parameters(): p *= scale
    layout = torch.contiguous_format if dtype == f32 else torch.channels_last # as a network in 16 bits has it
    f, g = [o.to(DEVICE, dtype, memory_format=layout).requires_grad_() for o in (f, g)]
    return proj.to(DEVICE), f, g, size

def loss_of(name, proj, f, g, size):
    if name == 'textbook': return textbook(proj.head, f, g, size)
    if name == 'projector': return proj.loss(f, g, size)
    from fastmiseg.mutual_info import _mi_loss
    # the backward pass follows before the next call
    Sums.way, pair_kernels.split_16_bit = name, name != 'one half'
    return _mi_loss(
        Sums.apply(f, g, proj.head.weight.view(S, K, -1), proj.head.bias.view(S, K), (size, size)),
        True, None)

def gradients(name, proj, f, g, size):
    loss = loss_of(name, proj, f, g, size)
    gf, gg, gw, gb = torch.autograd.grad(loss, [f, g, proj.head.weight, proj.head.bias])
    return [loss.detach(), gf, gg, torch.cat([gw, gb[:, None]], 1)]

def far(a, b): return ((a.double().cpu() - b).norm()/b.norm()).item()

# (a) right?

@contextmanager
def tf32(allowed):
    flags = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [o.fp32_precision for o in flags]
    for o in flags: o.fp32_precision = 'tf32' if allowed else 'ieee'
    try: yield
    finally:
        for o, was in zip(flags, before): o.fp32_precision = was

def errors():
    say('Relative errors against float64 on the CPU: '
        'loss (absolute), gradients of both features and of the head')
    names, worst = ['kernels', 'products', 'loop', 'textbook', 'projector'], {}
    shapes = [dict(o, shape=tuple(n//4 + 3 for n in o['shape'])) if not args.tiny else o
              for o in STAGES.values()]
    for o, scale in product(shapes, (1,) if args.tiny else (.003, .1, 1, 30)):
        for dtype, mode in ((f32, ''), (f32, 'TF32 allowed'), (f16, 'autocast'), (bf16, 'autocast')):
            if not CUDA and (dtype != f32 or mode): continue
            proj, f, g, size = case(**o, dtype=dtype, batch=2, scale=scale)
            twin = deepcopy(proj).double().cpu()
            ref = gradients('loop', twin, *[x.detach().double().cpu().requires_grad_() for x in (f, g)], size)
            for name in (names if not mode else
                         names[-1:] if mode.startswith('TF32') else
                         ('kernels', 'one half', 'products', 'projector')):
                with (tf32(mode == 'TF32 allowed'),
                      torch.autocast(DEVICE, dtype) if mode == 'autocast' else nullcontext()):
                    out = gradients(name, proj, f, g, size)
                e = [abs(out[0].item() - ref[0].item()), *map(far, out[1:], ref[1:])]
                say(f"  {o['shape']}, {size}×{size}, scale {scale}, {str(dtype)[6:]} {mode}: {name:9}"
                    + ' '.join(f'{v:.1e}' for v in e))
                if name != 'textbook': # far off near uniform clusters
                    of = named[dtype], mode or 'plain', name
                    worst[of] = max(worst.get(of, 0), *e[1:])
    for (features, what, way), e in worst.items():
        row('Worst error of a gradient against float64', features=features, what=what, way=way, error_up_to=f'{e:.1e}')
    if (e := worst['float32', 'plain', 'kernels']) > 1e-4:
        raise AssertionError(f'kernels in float32: an error of {e:.1e}, expected up to 1e-4')
    if not CUDA: return
    torch.cuda.synchronize()
    proj, f, g, size = case(**shapes[0])
    first = gradients('kernels', proj, f, g, size)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try: again = gradients('kernels', proj, f, g, size)
    finally: torch.cuda.set_sync_debug_mode('default')
    say(f'No synchronisation; the same bits again: {all(map(torch.equal, first, again))}')

# (b) fast?

def events(f, repeats):
    if not CUDA:
        out = []
        for _ in range(repeats):
            start = time.perf_counter()
            f()
            out.append(1e3*(time.perf_counter() - start))
        return out
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for m in marks[1:]: f(), m.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]

def sweep_list():
    "(stage, exact, options of one kernel)"
    out = []
    for stage, exact in product(STAGES, (True,)):
        for BX, warps, stages in ((32, 4, 2), (32, 4, 1), (16, 4, 3), (16, 4, 1),
                                  (32, 8, 2), (64, 4, 2), (64, 8, 2)):
            out.append((stage, exact, 'sums', dict(BX=BX, num_warps=warps, num_stages=stages)))
        for T in (1024, 4096): out.append((stage, exact, 'sums', dict(T=T)))
        for BX, warps, stages, rows, piece in (
                (128, 4, 2, 3, 16), (128, 4, 3, 3, 16), (64, 4, 2, 3, 16), (64, 2, 2, 3, 16),
                (128, 8, 2, 3, 16), (256, 8, 2, 3, 16), (256, 4, 2, 3, 16), (128, 4, 1, 3, 16),
                (128, 4, 2, 6, 16), (64, 4, 2, 6, 16), (128, 4, 2, 3, 32)):
            out.append((stage, exact, 'gradient',
                        dict(BX=BX, num_warps=warps, num_stages=stages, ROWS=rows,
                             MP=32 if rows == 3 else 64, PIECE=piece)))
        out += [(stage, exact, 'head', dict(BP=BP, num_warps=w))
                for BP, w in ((128, 4), (64, 4), (32, 4), (32, 1), (64, 2), (32, 2), (16, 1))]
        out += [(stage, exact, 'line', dict(BP=BP, num_warps=w))
                for BP, w in ((128, 4), (64, 4), (256, 4), (256, 8), (128, 2), (64, 2))]
    return out[:3] + out[-3:] if args.tiny else out

def one_kernel(stage, exact, kernel, opts, repeats):
    "Milliseconds of one kernel with these options"
    o = STAGES[stage]
    before = dict(pair_kernels.launch_options[kernel])
    pair_kernels.launch_options[kernel].update(opts)
    try:
        proj, f, g, size = case(**o, dtype=bf16 if CUDA else f32)
        with torch.no_grad():
            head = proj.head.weight.view(S, K, -1).float(), proj.head.bias.view(S, K).float()
            (x, y), head, shape, _ = pair_kernels._prepared(f, g, *head, (size, size))
            pair = pair_kernels._Pair(x, y, *head, shape, exact)
            G = torch.randn(S, *shape.w, K, K, device=DEVICE, dtype=f64)
            largest = G.abs().amax()
            factors = pair.factors(G, largest)
            run = dict(sums=pair.sums, gradient=lambda: pair.gradient(0, factors, largest),
                       line=lambda: pair_kernels._Pair(x, y, *head, shape, exact))
            if kernel == 'head':
                y, gx, (parts,) = pair.gradient(0, factors, largest), torch.empty_like(x), pair.head_parts(1)
                run['head'] = lambda: pair.head_gradient(0, y, gx, parts)
            run[kernel]()
            return median(events(run[kernel], repeats))
    except Exception as e: return f'{type(e).__name__}: {str(e)[:60]}'
    finally:
        pair_kernels.launch_options[kernel].clear()
        pair_kernels.launch_options[kernel].update(before)

def sweep():
    jobs = sweep_list()
    if time.time() > STOP - 15: return say('No time for a search of the best launches')
    if CUDA:
        start = time.time()
        procs = [subprocess.Popen([sys.executable, __file__, '--compile', str(i),
                                   '--processes', str(args.processes)])
                 for i in range(args.processes)]
        for p in procs:
            try: p.wait(max(1, STOP - 10 - time.time()))
            except subprocess.TimeoutExpired: p.kill()
        print(f'compiled in {time.time() - start:.0f} s', flush=True)
    say('Milliseconds of one kernel (with what little is launched beside it)')
    for stage, exact, kernel, opts in jobs:
        if time.time() > STOP: break
        t = one_kernel(stage, exact, kernel, opts, 3 if not CUDA else 15)
        say(f"  {stage} {'both halves' if exact else 'one half'} {kernel:8} "
            + ' '.join(f'{k}={v}' for k, v in opts.items())
            + (f': {t:.3f}' if isinstance(t, float) else f': {t}'))

def tables():
    "The information in tables of joints, from their sums: by the kernel, by the formula, and by autograd"
    @contextmanager
    def by(how):
        before, pair_kernels.implementation = pair_kernels.implementation, how
        try: yield
        finally: pair_kernels.implementation = before
    def closed(how, R):
        with by(how): return mutual_info._MILoss.apply(R, True, None, 1.)
    ways = {'kernel': lambda R: closed('triton', R), 'formula': lambda R: closed('torch', R),
            'autograd': lambda R: -mutual_info._information(R, True, None, 1.)[0].mean()}
    for name, D in {'global': 1, '3×3': 9, '7×7': 49}.items():
        R = torch.rand(S, D, K, K, device=DEVICE, dtype=f64).requires_grad_()
        steps = {k: (lambda way=way: torch.autograd.grad(way(R), R)[0]) for k, way in ways.items()}
        off = {k: far(step(), steps['autograd']().cpu()) for k, step in steps.items()}
        times = {k: [] for k in steps}
        for _ in range(3 if CUDA else 1):
            for k, step in steps.items(): times[k] += events(step, 20 if CUDA else 2)[CUDA:]
        for k, step in steps.items():
            row('Tables of joints, forward and backward', what=name, way=k, ms=round(median(times[k]), 3),
                launches=launches(step)[0], off_from_autograd=f'{off[k]:.0e}')

def launches(step):
    if not CUDA: return 0, 0, []
    from torch.profiler import profile, ProfilerActivity
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        step()
        torch.cuda.synchronize()
    found = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA
             and not e.name.startswith(('Memset', 'Memcpy'))]
    top = sorted(prof.key_averages(), key=lambda e: -e.device_time_total)[:14]
    return (len(found), sum(e.device_time_total for e in found)/1e3,
            [f'{e.device_time_total/1e3:.3f} ms ×{e.count} {e.key[:70]}' for e in top])

def extra_memory(step, clear):
    if not CUDA: return ''
    clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return f'{(torch.cuda.max_memory_allocated() - before)/2**20:.0f}'

class Measured:
    "A stage with features of a type: milliseconds of ways to its loss, forward and backward"
    table = 'Forward and backward'
    def __init__(self, stage, dtype):
        self.of = dict(stage=stage, features=named[dtype])
        self.case, self.dtype, self.fns, self.times = case(**STAGES[stage], dtype=dtype), dtype, {}, {}

    def clear(self):
        proj, f, g, _ = self.case
        for x in (f, g, *proj.parameters()): x.grad = None

    def step(self, name):
        self.clear()
        with torch.autocast(DEVICE, self.dtype) if self.dtype != f32 else nullcontext():
            loss = loss_of(name, *self.case)
        loss.backward()

    def prepare(self, names):
        self.fns, self.times = {}, {}
        for name in names:
            if not missing('mutual_info', table=self.table, way=name, **self.of): continue
            try:
                for _ in range(1 + CUDA): self.step(name)
                self.fns[name], self.times[name] = (lambda name=name: self.step(name)), []
            except Exception as e: self.failed(name, e)

    def failed(self, name, e): row('Failures', **self.of, way=name, error=f'{type(e).__name__}: {str(e)[:80]}')

    def turn(self, repeats):
        for name, fn in self.fns.items(): self.times[name] += events(fn, repeats)[CUDA:]

    def rows(self):
        for name, fn in self.fns.items():
            n, busy, top = launches(fn)
            row(self.table, **self.of, way=name, ms=round(median(self.times[name]), 2), busy_ms=round(busy, 2),
                launches=n, extra_mb=extra_memory(fn, self.clear))
            if name in ('kernels', 'products'):
                for t in top: say(f'  {t}')

    def graph(self):
        if not missing('mutual_info', table=self.table, way='kernels, as a CUDA graph', **self.of): return
        try:
            graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3): self.step('kernels')
            torch.cuda.current_stream().wait_stream(side)
            self.clear()
            with torch.cuda.graph(graph): self.step('kernels')
            row(self.table, **self.of, way='kernels, as a CUDA graph', ms=round(median(events(graph.replay, 20)), 2))
        except Exception as e: self.failed('kernels, as a CUDA graph', e)

def steps():
    say(f'{torch.cuda.get_device_name() if CUDA else "CPU"}, torch {torch.__version__}, '
        f'triton {pair_kernels.triton.__version__}; batch {BATCH}, {S} heads, K={K}; '
        f'launches: {pair_kernels.launch_options}')
    cases = [Measured(stage, dtype) for dtype, stage in product((f32, bf16) if CUDA else (f32,), STAGES)]
    def measure(some, names, rounds, repeats):
        "All ways of all cases take turns"
        for o in some: o.prepare(names)
        for _ in range(rounds):
            for o in some: o.turn(repeats)
        for o in some: o.rows()
    measure(cases, ('kernels', 'products', 'projector'), *((4, 5) if CUDA else (1, 1)))
    measure(cases, ('loop', 'fft (cost only)'), *((2, 3) if CUDA else (1, 1)))
    if CUDA: measure([o for o in cases if o.dtype == bf16], ('one half',), 2, 5)
    # seven tenths of a second each
    measure([o for o in cases if o.dtype == f32], ('textbook',), 1, 1 + CUDA)

def graphs():
    "After all else, which a capture that fails could disturb"
    if not CUDA: return
    for dtype, stage in product((f32, bf16), STAGES): Measured(stage, dtype).graph()

if args.compile is not None:
    for job in sweep_list()[args.compile::args.processes]: one_kernel(*job, 1)
    sys.exit()
failed = False
for part in [steps, tables, errors, graphs, *([sweep] if args.sweep else [])]:
    start = time.time()
    try: part()
    except Exception as e: # the other parts are worth having
        import traceback
        traceback.print_exc()
        add('mutual_info', table='Failures', what=part.__name__, error=f'{type(e).__name__}: {str(e)[:300]}')
        failed = True
    print(f'{part.__name__}: {time.time() - start:.0f} s', flush=True)
sys.exit(failed)

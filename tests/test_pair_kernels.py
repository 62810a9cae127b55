"The Triton kernels against a double loop in float64: on a GPU as they are, elsewhere in Triton's interpreter"
import os, subprocess, sys
from itertools import product
from pathlib import Path
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.cuda.is_available()

triton = pytest.importorskip('triton')
from fastmiseg import pair_kernels
from fastmiseg.pair_kernels import cuda_pair_sums, cuda_pair_sums_backward

device = 'cuda' if CUDA else 'cpu'
f32, f64 = torch.float32, torch.float64
pytestmark = [pytest.mark.skipif(not CUDA and os.environ.get('TRITON_INTERPRET') != '1',
                                 reason='needs a GPU or the interpreter')]
needs_gpu = pytest.mark.skipif(not CUDA, reason='needs a CUDA device')

def loop(p, q, w):
    "Sums of p(x) q(x+δ)ᵀ: (S,*w,K,K), by slices that overlap"
    shape, out = p.shape[3:], []
    for d in product(*[range(-(o//2), o//2 + 1) for o in w]):
        here = [slice(max(0, -e), max(0, n - max(0, e))) for e, n in zip(d, shape)]
        there = [slice(max(0, e), max(0, n + min(0, e))) for e, n in zip(d, shape)]
        out.append(torch.einsum('nskx,nslx->skl', p[(..., *here)].flatten(3), q[(..., *there)].flatten(3)))
    return torch.stack(out, 1).unflatten(1, w)

def reference(x, y, weight, bias, w, G):
    "Sums and gradients in float64"
    xs = [o if o is None else o.detach().double().cpu().requires_grad_() for o in (x, y, weight, bias)]
    p, q = xs[:2]
    if weight is not None:
        p, q = [(torch.einsum('skc,nc...->nsk...', xs[2], o) + xs[3].reshape(1, *bias.shape, *[1]*len(w))).softmax(2)
                for o in (p, q)]
    R = loop(p, q, w)
    return R.detach(), *torch.autograd.grad(R, [o for o in xs if o is not None], G.cpu())

def problem(shape, C, S, K, scale=1., dtype=f32, seed=0, related=False):
    "Features and a head, or with C = 0 probabilities"
    torch.manual_seed(seed)
    N, *map_ = shape
    if C:
        x, y = torch.randn(2, N, C, *map_)
        if related: y = x + .3*y
        head = scale*torch.randn(S, K, C)/C**.5, scale*torch.randn(S, K)
    else:
        (x, y), head = [o.softmax(2) for o in scale*torch.randn(2, N, S, K, *map_)], (None, None)
    return [o if o is None else o.to(device, dtype) for o in (x, y)] + [o if o is None else o.to(device) for o in head]

def far(a, b): return ((a.double().cpu() - b).norm()/b.norm().clamp_min(1e-30)).item()

def check(inputs, w, limit, limit_grad):
    x, y, weight, bias = inputs
    S, K = weight.shape[:2] if weight is not None else x.shape[1:3]
    G = torch.randn(S, *w, K, K, dtype=f64)
    G -= G.mean((-2, -1), keepdim=True)
    R, *grads = reference(*inputs, w, G)
    ours = cuda_pair_sums(*inputs, w)
    assert ours.dtype == f64 and ours.shape == R.shape
    assert far(ours, R) < limit
    needed = (True, True, weight is not None, weight is not None)
    back = [o for o in cuda_pair_sums_backward(G.to(device), *inputs, w, needed) if o is not None]
    assert len(back) == len(grads)
    for a, b in zip(back, grads): assert far(a, b) < limit_grad
    return ours, back

CASES = [((2, 9, 7), 3, 2, 4, (3, 3)), ((1, 6, 11), 16, 2, 10, (7, 7)), ((3, 5, 8), 5, 1, 3, (1, 5)),
         ((1, 13, 4), 8, 2, 10, (5, 1)), ((2, 4, 6, 5), 3, 2, 4, (3, 3, 3)), ((1, 3, 5, 4), 4, 1, 10, (1, 7, 3)),
         ((2, 9, 7), 0, 2, 4, (3, 3)), ((1, 4, 5, 6), 0, 2, 3, (5, 3, 1)), ((1, 2, 2), 3, 1, 2, (7, 7)),
         ((1, 5, 6), 20, 1, 20, (3, 5)), ((2, 4, 4), 2, 1, 1, (3, 3))]

@pytest.mark.parametrize('shape,C,S,K,w', CASES)
def test_sums_and_gradients_equal_a_double_loop(shape, C, S, K, w):
    check(problem(shape, C, S, K), w, 1e-6, 2e-6)

@pytest.mark.parametrize('scale', [.003, .03, .3, 3, 30])
def test_precision_from_uniform_to_one_hot(scale):
    "Loss and gradients of the whole path: the gradient of the loss is what makes near uniform distributions hard"
    from fastmiseg.mutual_info import _mi_loss
    w, inputs = (3, 3), problem((2, 24, 20), 4, 1, 5, scale, related=True)
    x, y, weight, bias = inputs
    bias.zero_()
    def gradient(R):
        R = R.requires_grad_()
        loss = _mi_loss(R.flatten(1, 2), True, None)
        return loss.detach(), torch.autograd.grad(loss, R)[0]
    R = reference(*inputs, w, torch.zeros(1, 3, 3, 5, 5, dtype=f64))[0]
    loss, G = gradient(R)
    grads = reference(*inputs, w, G)[1:]
    ours, G_ = gradient(cuda_pair_sums(*inputs, w))
    assert (ours.cpu() - loss).abs() < 1e-6
    def whole(x, y, weight, bias): # alone, the biases' is a sum that cancels
        return x, y, torch.cat([weight, bias[..., None]], -1)
    ours = whole(*cuda_pair_sums_backward(G_, *inputs, w, (True,)*4))
    for a, b in zip(ours, whole(*grads)): assert far(a, b) < 1e-4

def test_one_half_of_16_bits(monkeypatch):
    "The fast way for features of 16 bits: as precise as these"
    monkeypatch.setattr(pair_kernels, 'split_16_bit', False)
    check(problem((2, 9, 7), 3, 2, 4, dtype=torch.bfloat16), (3, 3), 2e-3, 2e-2)
    monkeypatch.undo()
    check(problem((2, 9, 7), 3, 2, 4, dtype=torch.bfloat16), (3, 3), 1e-6, 5e-3) # gradients come in 16 bits

def test_what_is_not_wanted_is_not_made():
    x, y, weight, bias = problem((2, 9, 7), 3, 2, 4)
    G = torch.randn(2, 3, 3, 4, 4, dtype=f64, device=device)
    whole = cuda_pair_sums_backward(G, x, y, weight, bias, (3, 3), (True,)*4)
    for needs in product((True, False), repeat=4):
        for a, b, need in zip(cuda_pair_sums_backward(G, x, y, weight, bias, (3, 3), needs), whole, needs):
            assert (a is not None) == need and (a is None or torch.equal(a, b))

class Operations(TorchDispatchMode):
    "Counts what PyTorch would launch on a device"
    def __init__(self):
        super().__init__()
        self.count = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        res = f(*args, **(kwargs or {}))
        self.count += not (f.is_view or 'empty' in f.overloadpacket.__name__)
        return res

def test_launches_are_few(monkeypatch):
    "Forward and backward of a stage: 16 kernels and 7 operations of PyTorch"
    kernels,launched = [o for o in vars(pair_kernels) if o.endswith('_kernel')],[]
    class Launched(dict):
        def __missing__(self, grid): return lambda *args,**kwargs: launched.append(1)
    for o in kernels: monkeypatch.setattr(pair_kernels, o, Launched())
    inputs, G = problem((2, 9, 7), 3, 2, 4), torch.ones(2, 3, 3, 4, 4, dtype=f64, device=device)
    with Operations() as seen:
        cuda_pair_sums(*inputs, (3, 3))
        cuda_pair_sums_backward(G, *inputs, (3, 3), (True,)*4)
    assert (len(launched), seen.count) == (16, 7)

@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('K,prior', [(1, None), (3, None), (10, None), (20, None), (3, [.2,.3,.5]),
                                     (3, [[.2,.3,.5], [1,2,1]])])
def test_tables_are_those_of_the_formula(symmetric, K, prior):
    from fastmiseg.mutual_info import _information, _prior_logs
    torch.manual_seed(0)
    R = torch.rand(2, 5, K, K, dtype=f64, device=device)**4
    R[0, 0], R[1, 1, 0] = 0, 0 # no pairs of pixels; a cluster that is empty
    if prior is not None: prior = _prior_logs(torch.tensor(prior), 2, K, device)
    for marginal in (1., 1.1):
        for a, b in zip(pair_kernels.cuda_information(R, symmetric, prior, marginal),
                        _information(R, symmetric, prior, marginal)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize('capability', [80, 90])
def test_kernels_compile_for_a_gpu_that_is_not_here(capability, tmp_path):
    "The interpreter takes what a compiler refuses"
    env = {**os.environ, 'TRITON_INTERPRET':'0', 'TRITON_CACHE_DIR':str(tmp_path)}
    script = Path(__file__).parent/'compile_kernels.py'
    run = subprocess.run([sys.executable, script, str(capability)], env=env, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr

def test_unknown_implementation(monkeypatch):
    monkeypatch.setattr(pair_kernels, 'implementation', 'fast')
    x = torch.ones(1, 1, 3, 4, 4)
    with pytest.raises(ValueError, match="FASTMISEG_PAIR_SUMS: expected 'triton', 'torch' or 'loop', got 'fast'"):
        pair_kernels.on_cuda(x, x, None, (3, 3))
    with pytest.raises(ValueError, match='FASTMISEG_PAIR_SUMS'): pair_kernels.information_on_cuda(x)

@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize('how', ['triton', 'torch', 'loop'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, f32])
@pytest.mark.parametrize('size', [3, 7])
def test_loss_on_the_device(how, dtype, size, monkeypatch):
    "Value and gradients against float64 on the CPU, TF32 allowed all around, and without waiting for the device"
    from fastmiseg.projectors import LocalProjector
    monkeypatch.setattr(pair_kernels, 'implementation', how)
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', True)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    torch.manual_seed(0)
    proj = LocalProjector(16)
    f, g = [o.to(dtype).contiguous(memory_format=torch.channels_last) for o in torch.randn(2, 3, 16, 40, 37)]
    def run(device, dtype):
        net = proj.to(device, dtype)
        xs = [o.to(device, dtype if device == 'cpu' else o.dtype).requires_grad_() for o in (f, g)]
        waiting = torch.cuda.get_sync_debug_mode()
        if device == 'cuda': net.loss(*xs, size).backward() # libraries load here
        for o in (*xs, *net.parameters()): o.grad = None
        if device == 'cuda': torch.cuda.set_sync_debug_mode('error')
        try: (loss := net.loss(*xs, size)).backward()
        finally: torch.cuda.set_sync_debug_mode(waiting)
        return [loss.detach(), *[o.grad.clone() for o in (*xs, *net.parameters())]]
    got, want = run('cuda', f32), run('cpu', f64)
    assert far(got[0], want[0]) < 1e-5
    for a, b in zip(got[1:3], want[1:3]): assert a.dtype == dtype and far(a, b) < (2e-5 if dtype == f32 else 5e-3)
    for a, b in zip(got[3:], want[3:]): assert far(a, b) < 1e-4

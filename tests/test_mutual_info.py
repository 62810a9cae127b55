"Exactness of joints and losses, whatever shape, dtype, layout and mode they are called in."
from itertools import product
from types import SimpleNamespace
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from fastmiseg.mutual_info import *
from fastmiseg.mutual_info import _mi_loss
from fastmiseg.pair_sums import PairSums, pair_sums
from fastmiseg.projectors import GlobalProjector, LocalProjector

f32, f64 = torch.float32, torch.float64

def loop_joint(p, q, size):
    "Double loop over displacements and pixels: (S,D,K,K)"
    N, S, K, *shape = p.shape
    out = []
    for d in product(*[range(-(o//2), o//2 + 1) for o in size]):
        P, n = torch.zeros(S, K, K, dtype=f64), 0
        for i in product(*map(range, shape)):
            j = tuple(a + b for a, b in zip(i, d))
            if all(0 <= a < b for a, b in zip(j, shape)):
                P, n = P + torch.einsum('nsk,nsl->skl', p[(..., *i)].double(), q[(..., *j)].double()), n + N
        out.append(P/max(n, 1))
    return torch.stack(out, 1)

def naive_mi(P):
    log = lambda x: torch.where(x > 0, x, 1).log()
    return (P*(log(P) - log(P.sum(-1, keepdim=True)) - log(P.sum(-2, keepdim=True)))).sum((-2, -1))

def soft(*shape, scale=1., dtype=f64): return (scale*torch.randn(*shape, dtype=dtype)).softmax(2)

def gradients(fn, *xs):
    xs = [x.detach().clone().requires_grad_() for x in xs]
    loss = fn(*xs)
    return loss.detach(), *torch.autograd.grad(loss, xs)

shapes = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 5), *[st.integers(1, 6)]*2) \
    | st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), *[st.integers(1, 4)]*3)

@settings(max_examples=60, deadline=None)
@given(shapes, st.data())
def test_any_shape_and_window_equals_the_double_loop(shape, data):
    size = data.draw(st.tuples(*[st.sampled_from([1, 3, 5, 7])]*(len(shape) - 3)))
    symmetric, seed = data.draw(st.booleans()), data.draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    x, y = torch.randn(2, *shape, dtype=f64)
    p, q = x.softmax(2), y.softmax(2)
    P = loop_joint(p, q, size)
    assert (local_joint(p, q, size) - P).abs().max() < 1e-12
    def loop(x, y):
        P = loop_joint(x.softmax(2), y.softmax(2), size)
        return -naive_mi((P + P.mT)/2 if symmetric else P).mean()
    def ours(x, y): return local_mi_loss(x.softmax(2), y.softmax(2), size, symmetric=symmetric)
    for a, b in zip(gradients(ours, x, y), gradients(loop, x, y)): assert (a - b).abs().max() < 1e-9

@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from([torch.float16, torch.bfloat16, f32]), st.floats(.01, 10), st.integers(0, 1000))
def test_lower_precision_is_computed_in_float32(shape, dtype, scale, seed):
    torch.manual_seed(seed)
    p, q = [soft(*shape, scale=scale).to(dtype) for _ in range(2)]
    loss, gp, gq = gradients(lambda p, q: local_mi_loss(p, q, 3), p, q)
    ref, rp, rq = gradients(lambda p, q: local_mi_loss(p, q, 3), p.double(), q.double())
    assert loss.dtype == f32 and gp.dtype == gq.dtype == dtype
    assert (loss - ref).abs() < 2e-5
    assert global_mi_loss(p[..., *[0]*(p.ndim - 3)], q[..., *[0]*(p.ndim - 3)]).dtype == f32

@pytest.mark.parametrize('size', [3, 7])
@pytest.mark.parametrize('related', [True, False])
@pytest.mark.parametrize('scale', [.003, .03, .3, 1, 3, 10, 30])
def test_float32_gradients_from_uniform_to_one_hot(scale, related, size):
    torch.manual_seed(0)
    x, y = scale*torch.randn(2, 4, 1, 10, 72, 64)
    if related: y = x + .3*y
    def loss(x, y): return local_mi_loss(x.softmax(2), y.softmax(2), size)
    single, double = gradients(loss, x, y), gradients(loss, x.double(), y.double())
    assert (single[0] - double[0]).abs() < 2e-5
    for a, b in zip(single[1:], double[1:]): assert (a - b).norm() < 1e-4*b.norm()
    p, q = x.softmax(2), y.softmax(2)
    single, double = [gradients(lambda p, q: local_mi_loss(p, q, size), p.to(t), q.to(t)) for t in (f32, f64)]
    for a, b in zip(single[1:], double[1:]): assert (a - b).norm() < 1e-4*b.norm()

def test_one_outlier_among_nearly_uniform_pixels():
    torch.manual_seed(0)
    x, y = .03*torch.randn(2, 2, 1, 6, 32, 32)
    x[0, 0, 2, 3, 3] = 30
    def loss(x, y): return local_mi_loss(x.softmax(2), y.softmax(2), 3)
    single, double = gradients(loss, x, y), gradients(loss, x.double(), y.double())
    for a, b in zip(single[1:], double[1:]): assert (a - b).norm() < 1e-4*b.norm()

def test_thousands_of_near_one_hot_maps_stay_finite():
    torch.manual_seed(0)
    for i in range(40):
        z = 10**torch.empty(1, 100, 1, 1, 1).uniform_(-3, 4)*torch.randn(2, 100, 5, 6, 6)
        y = z.roll(1, -1) if i % 4 else z
        loss, g = gradients(lambda z: local_mi_loss(z.softmax(2), y.softmax(2), 3, subtract_min=i % 2 == 0), z)
        assert loss.isfinite() and loss < 1e-6 and g.isfinite().all()
        assert (mutual_info(local_joint(z.softmax(2), y.softmax(2), 3)) > -1e-6).all()

@pytest.mark.parametrize('K', [1, 4])
@pytest.mark.parametrize('dtype', [f32, f64])
def test_all_mass_in_one_cluster(K, dtype):
    z = torch.zeros(2, 2, K, 5, 5, dtype=dtype)
    z[:, :, 0] = 200
    for kw in ({}, dict(subtract_min=True), dict(symmetric=False), dict(prior=[1.]*K)):
        loss, gx = gradients(lambda z: local_mi_loss(z.softmax(2), z.softmax(2), 3, **kw), z)
        assert loss.abs() < 1e-6 and gx.isfinite().all()
    p = torch.zeros(2, 2, K, 5, 5, dtype=dtype); p[:, :, 0] = 1
    assert all(o.isfinite().all() for o in gradients(lambda p: local_mi_loss(p, p, 3), p))
    assert all(o.isfinite().all() for o in gradients(lambda p: global_mi_loss(p, p), p[..., 0, 0]))

def test_displacements_that_leave_the_map_say_nothing():
    p = soft(2, 1, 3, 2, 2)
    P = local_joint(p, p, 7).view(7, 7, 3, 3)
    assert (P.sum((-2, -1)) > 0).sum() == 9 and local_mi_loss(p, p, 7).isfinite()

def test_gradcheck():
    torch.manual_seed(0)
    x, y = [soft(2, 1, 2, 3, 4).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda x, y: pair_sums(x, y, (3, 5)), (x, y))
    assert torch.autograd.gradcheck(lambda x, y: local_mi_loss(x, y, 3), (x, y))
    f, g = [torch.randn(2, 2, 2, 3, 2, dtype=f64, requires_grad=True) for _ in range(2)]
    w, b = torch.randn(2, 3, 2, dtype=f64, requires_grad=True), torch.randn(2, 3, dtype=f64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: PairSums.apply(*a, (3, 1, 3)), (f, g, w, b))
    P = torch.rand(2, 4, 4, dtype=f64, requires_grad=True)
    assert torch.autograd.gradcheck(mutual_info, P) and torch.autograd.gradgradcheck(mutual_info, P)

@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('marginal', [1., 1.5])
@pytest.mark.parametrize('prior', [None, torch.tensor([1., 2, 3]), torch.tensor([[1., 2, 3], [1, 1, 5]])])
def test_gradient_that_falls_out_of_the_loss(symmetric, marginal, prior):
    "is that of the same loss left to autograd, and so is the second derivative"
    torch.manual_seed(0)
    R = (50*torch.rand(2, 4, 3, 3, dtype=f64)).requires_grad_()
    def loss(R): return _mi_loss(R, symmetric, prior, marginal)
    def plain(R):
        P = R/R.sum((-2, -1), keepdim=True)
        if symmetric: P = (P + P.mT)/2
        sizes = P.sum(-1), P.sum(-2)
        res = mutual_info(P) - (marginal - 1)*sum((o*o.log()).sum(-1) for o in sizes)
        if prior is not None:
            wanted = prior.double().view(-1, 1, 3)
            res = res + (sum(sizes)/2*(3*wanted/wanted.sum(-1, keepdim=True)).log()).sum(-1)
        return -res.mean()
    assert torch.allclose(loss(R), plain(R), rtol=1e-14)
    a, b = (torch.autograd.grad(f(R), R)[0] for f in (loss, plain))
    assert (a - b).abs().max() < 1e-15
    assert torch.autograd.gradgradcheck(loss, R)

@pytest.mark.parametrize('K', [1, 7, 16, 20])
@pytest.mark.parametrize('S', [1, 20])
def test_many_clusters_and_heads_equal_the_double_loop(S, K):
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, S, K, 4, 5, dtype=f64)
    p, q = x.softmax(2), y.softmax(2)
    assert (local_joint(p, q, (3, 5)) - loop_joint(p, q, (3, 5))).abs().max() < 1e-12
    def loop(x, y): return -naive_mi(loop_joint(x.softmax(2), y.softmax(2), (3, 5))).mean()
    def ours(x, y): return local_mi_loss(x.softmax(2), y.softmax(2), (3, 5), symmetric=False)
    for a, b in zip(gradients(ours, x, y), gradients(loop, x, y)): assert (a - b).abs().max() < 1e-9

@pytest.mark.parametrize('map_,w', [((5, 6), (3, 5)), ((3, 4, 5), (3, 1, 3))])
def test_each_subset_of_gradients_equals_that_of_all(map_, w):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=f64) for shape in ((3, 4, *map_), (3, 4, *map_), (2, 3, 4), (2, 3))]
    all_ = gradients(lambda *a: (pair_sums(a[0], a[1], w, *a[2:])**2).sum(), *inputs)[1:]
    for wanted in product([False, True], repeat=4):
        if not any(wanted): continue
        xs = [x.clone().requires_grad_(o) for x, o in zip(inputs, wanted)]
        (pair_sums(xs[0], xs[1], w, *xs[2:])**2).sum().backward()
        for x, ref, o in zip(xs, all_, wanted):
            assert torch.allclose(x.grad, ref, rtol=1e-12) if o else x.grad is None

def test_second_derivatives_are_refused():
    p = soft(1, 1, 2, 3, 3).requires_grad_()
    g, = torch.autograd.grad(local_mi_loss(p, p, 3), p, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()

def test_blocks_and_chunks_do_not_show(monkeypatch):
    p, q = soft(5, 2, 3, 16, 18), soft(5, 2, 3, 16, 18)
    ref = gradients(lambda p, q: local_mi_loss(p, q, (5, 3)), p, q)
    for block, chunk in ((1, 8), (600, 64), (1000, 1 << 20)):
        monkeypatch.setattr('fastmiseg.pair_sums._BLOCK', block)
        monkeypatch.setattr('fastmiseg.pair_sums._CHUNK', chunk)
        for a, b in zip(gradients(lambda p, q: local_mi_loss(p, q, (5, 3)), p, q), ref):
            assert (a - b).abs().max() < 1e-14

# how it may be called

def modes():
    "name -> function that calls the loss of two maps in that way"
    def no_grad(p, q):
        with torch.no_grad(): return local_mi_loss(p, q, 3)
    def inference(p, q):
        with torch.inference_mode(): return local_mi_loss(p, q, 3)
    def autocast(p, q):
        with torch.autocast('cpu', dtype=torch.bfloat16): return local_mi_loss(p, q, 3)
    def strided(p, q): return local_mi_loss(p.mT.contiguous().mT, torch.stack([q, q], -1)[..., 0], 3)
    def channels_last(p, q): return local_mi_loss(*[o.movedim(2, -1).contiguous().movedim(-1, 2) for o in (p, q)], 3)
    def expanded(p, q): return local_mi_loss(p.repeat(2, 1, 1, 1, 1), q[None].expand(2, *q.shape).flatten(0, 1), 3)
    return {k: v for k, v in locals().items()}

@pytest.mark.parametrize('mode', modes())
def test_modes_do_not_change_the_value(mode):
    torch.manual_seed(0)
    p, q = soft(2, 2, 4, 9, 7, dtype=f32), soft(2, 2, 4, 9, 7, dtype=f32)
    a, b = modes()[mode](p, q), local_mi_loss(p, q, 3)
    assert a.dtype == f32 and abs(a - b) < 1e-7
    if mode not in ('no_grad', 'inference'):
        for a, b in zip(gradients(modes()[mode], p, q), gradients(lambda p, q: local_mi_loss(p, q, 3), p, q)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)

def test_features_in_any_memory_format_and_precision():
    torch.manual_seed(0)
    proj = LocalProjector(8, n_clusters=4, n_heads=2)
    f, g = torch.randn(2, 3, 8, 12, 10)
    ref = gradients(lambda f, g: proj.loss(f, g, 3), f, g)
    last = gradients(lambda f, g: proj.loss(f.to(memory_format=torch.channels_last),
                                            g.to(memory_format=torch.channels_last), 3), f, g)
    for a, b in zip(last, ref): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)
    x = f.to(memory_format=torch.channels_last).requires_grad_().clone() # not a leaf: its gradient comes as it was made
    gx, = torch.autograd.grad(proj.loss(x, g, 3), x)
    assert gx.is_contiguous(memory_format=torch.channels_last) and torch.allclose(gx, ref[1], rtol=1e-4, atol=1e-9)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for a, b in zip(gradients(lambda f, g: proj.loss(f, g, 3), f, g), ref):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)
        assert proj(f).dtype == f32 and GlobalProjector(8)(f.bfloat16()).dtype == f32
        half = gradients(lambda f, g: proj.loss(f, g, 3), f.bfloat16(), g.bfloat16())
    assert half[0].dtype == f32 and half[1].dtype == torch.bfloat16
    full = gradients(lambda f, g: proj.loss(f, g, 3), f.bfloat16().float(), g.bfloat16().float())
    assert (half[0] - full[0]).abs() < 1e-7 and (half[1] - full[1]).norm() < 4e-3*full[1].norm()

def test_the_same_map_twice():
    torch.manual_seed(0)
    p = soft(2, 2, 3, 6, 5)
    loss, g = gradients(lambda p: local_mi_loss(p, p, 3), p)
    two = gradients(lambda p, q: local_mi_loss(p, q, 3), p, p)
    assert loss == two[0] and (g - two[1] - two[2]).abs().max() < 1e-15
    used_twice = gradients(lambda p: local_mi_loss(p, p, 3) + 2*local_mi_loss(p, p, 3), p)
    assert (used_twice[1] - 3*g).abs().max() < 1e-15
    p = p.requires_grad_()
    loss = local_mi_loss(p, p, 3)
    a, b = [torch.autograd.grad(loss, p, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(a, b)

def test_inputs_are_left_alone():
    p, q = soft(2, 1, 3, 6, 5), soft(2, 1, 3, 6, 5)
    before = p.clone(), q.clone()
    gradients(lambda p, q: local_mi_loss(p, q, 3), p, q)
    assert torch.equal(p, before[0]) and torch.equal(q, before[1])

@pytest.mark.filterwarnings('ignore')
def test_compiled_code_gives_the_same():
    proj = LocalProjector(4, n_clusters=3, n_heads=2)
    f, g = torch.randn(2, 2, 4, 8, 8)
    def step(f, g):
        return (proj.loss(f*2, g, 3) + local_mi_loss(proj(f), proj(g), 3)
                + global_mi_loss(proj(f)[..., 0, 0], proj(g)[..., 0, 0]))
    compiled = torch.compile(step, backend='aot_eager')
    for a, b in zip(gradients(compiled, f, g), gradients(step, f, g)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)

@pytest.mark.parametrize('shape,size', [((2, 8, 16, 16), 7), ((2, 8, 6, 7, 8), 3)])
def test_nothing_waits_for_the_device(shape, size):
    """A fake CUDA tensor has no values: whatever asks for one raises. Autograd's engine needs a real device, so
    backward is called by hand."""
    flags = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device('cuda'):
        local, glob = LocalProjector(8), GlobalProjector(8)
        f, g = torch.empty(2, *shape)
        p = local(f)
        for loss in (local.loss(f, g, size, subtract_min=True, prior=[.1]*10), local_mi_loss(p, p, size),
                     glob.loss(f, g), consistency_loss(p[:, 0], p[:, 0]), entropy_loss(p[:, 0])):
            assert loss.device.type == 'cuda' and loss.shape == ()
        w = (size,)*len(shape[2:])
        for saved in ((f, g, torch.empty(5, 10, 8), torch.empty(5, 10)), (p, p, None, None)):
            heads = saved[2] is not None
            ctx = SimpleNamespace(saved_tensors=saved, w=w, needs_input_grad=(True, True, heads, heads, False))
            with torch.no_grad():
                grads = PairSums.backward.__wrapped__(ctx, torch.empty(5, size**len(w), 10, 10, dtype=f64))
            for x, gx in zip(saved, grads):
                assert x is None and gx is None or gx.shape == x.shape and gx.device.type == 'cuda'
    assert flags == (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)

def test_without_onednn(monkeypatch):
    p, q = [soft(2, 1, 3, 4, 5, 6, dtype=f32) for _ in range(2)]
    ref = gradients(lambda p, q: local_mi_loss(p, q, 3), p, q)
    monkeypatch.setattr('torch.backends.mkldnn.is_available', lambda: False)
    for a, b in zip(gradients(lambda p, q: local_mi_loss(p, q, 3), p, q), ref):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)

def test_an_empty_batch():
    loss, g = gradients(lambda p: local_mi_loss(p, p, 3), torch.ones(0, 2, 3, 4, 4))
    assert loss == 0 and g.shape == (0, 2, 3, 4, 4)

# the definition's options

def test_subtract_min_is_the_published_code():
    torch.manual_seed(0)
    p, q = soft(3, 1, 4, 8, 9), soft(3, 1, 4, 8, 9)
    P = torch.nn.functional.conv2d(p[:, 0].transpose(0, 1), q[:, 0].transpose(0, 1), padding=1).permute(2, 3, 0, 1)
    P = P.flip(0, 1).mT.flip(0, 1).mT # displacement of q against p, row-major
    P = P - P.min()
    P = P/P.sum((-2, -1), keepdim=True)
    P = (P + P.mT)/2
    assert abs(local_mi_loss(p, q, 3, subtract_min=True) + naive_mi(P).mean()) < 1e-10

def test_a_prior_per_head_and_a_uniform_one():
    p, q = soft(2, 2, 3, 5, 5), soft(2, 2, 3, 5, 5)
    plain = local_mi_loss(p, q, 3)
    assert abs(local_mi_loss(p, q, 3, prior=[5, 5, 5]) - plain) < 1e-7
    rows = torch.tensor([[.5, .3, .2], [1, 1, 8]])
    both = [local_mi_loss(p[:, [s]], q[:, [s]], 3, prior=rows[s]) for s in range(2)]
    assert abs(local_mi_loss(p, q, 3, prior=rows) - sum(both)/2) < 1e-12

def test_heads_do_not_mix():
    p, q = soft(2, 3, 4, 5, 6), soft(2, 3, 4, 5, 6)
    for s in range(3):
        assert torch.allclose(local_joint(p, q, 3)[s], local_joint(p[:, [s]], q[:, [s]], 3)[0], atol=1e-15)

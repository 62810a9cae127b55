"The matrix products over windows against a double loop and against the code for every device, on the CPU"
from itertools import product
import pytest, torch
from fastmiseg import pair_products, pair_sums
from fastmiseg.mutual_info import _mi_loss

f32, f64 = torch.float32, torch.float64
CASES = [((2, 9, 7), 3, 2, 4, (3, 3)), ((1, 6, 11), 16, 2, 10, (7, 7)), ((3, 5, 8), 5, 1, 3, (1, 5)),
         ((1, 13, 4), 8, 2, 10, (5, 1)), ((2, 4, 6, 5), 3, 2, 4, (3, 3, 3)), ((1, 3, 5, 4), 4, 1, 10, (1, 7, 3)),
         ((2, 9, 7), 0, 2, 4, (3, 3)), ((1, 4, 5, 6), 0, 2, 3, (5, 3, 1)), ((1, 2, 2), 3, 1, 2, (7, 7)),
         ((1, 5, 6), 20, 1, 20, (3, 5)), ((2, 4, 4), 2, 1, 1, (3, 3)), ((1, 1, 1), 2, 1, 3, (3, 3)),
         ((2, 4, 5), 3, 2, 3, (1, 1))]

def problem(shape, C, S, K, scale=1., dtype=f64, related=False):
    "Features and a head, or with C = 0 probabilities"
    torch.manual_seed(0)
    N, *map_ = shape
    if not C: return [*[o.softmax(2) for o in scale*torch.randn(2, N, S, K, *map_, dtype=dtype)], None, None]
    x, y = torch.randn(2, N, C, *map_, dtype=dtype)
    return [x, x + .3*y if related else y,
            scale*torch.randn(S, K, C, dtype=dtype)/C**.5, scale*torch.randn(S, K, dtype=dtype)]

def loop(p, q, w):
    out = []
    for d in product(*[range(-(o//2), o//2 + 1) for o in w]):
        here = [slice(max(0, -e), max(0, n - max(0, e))) for e, n in zip(d, p.shape[3:])]
        there = [slice(max(0, e), max(0, n + min(0, e))) for e, n in zip(d, p.shape[3:])]
        out.append(torch.einsum('nskx,nslx->skl', p[(..., *here)].flatten(3), q[(..., *there)].flatten(3)))
    return torch.stack(out, 1).unflatten(1, w)

def reference(inputs, w, G):
    "Sums and gradients in float64"
    xs = [o if o is None else o.detach().double().requires_grad_() for o in inputs]
    p, q, weight, bias = xs
    if weight is not None:
        p, q = [(torch.einsum('skc,nc...->nsk...', weight, o) + bias.reshape(1, *bias.shape, *[1]*len(w))).softmax(2)
                for o in (p, q)]
    R = loop(p, q, w)
    return R.detach(), *torch.autograd.grad(R, [o for o in xs if o is not None], G)

def far(a, b): return float((a.double() - b).norm()/b.norm().clamp_min(1e-300))

@pytest.mark.parametrize('most', [None, 1])
@pytest.mark.parametrize('shape,C,S,K,w', CASES)
def test_a_double_loop(shape, C, S, K, w, most, monkeypatch):
    "Also with one image of one head in a block, and sums of few pixels"
    if most: monkeypatch.setattr(pair_products, '_MOST', most); monkeypatch.setattr(pair_products, '_CHUNK', 16)
    inputs = problem(shape, C, S, K)
    G = torch.randn(S, *w, K, K, dtype=f64)
    R, *grads = reference(inputs, w, G)
    torch.testing.assert_close(pair_products.sums(*inputs, w), R, rtol=1e-12, atol=1e-12)
    ours = [o for o in pair_products.sums_backward(G, *inputs, w, (True, True, C > 0, C > 0)) if o is not None]
    assert len(ours) == len(grads)
    for a, b in zip(ours, grads): torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)

@pytest.mark.parametrize('scale', [.003, .03, .3, 3, 30])
@pytest.mark.parametrize('of', [pair_products, pair_sums], ids=['products', 'every device'])
def test_float32_from_uniform_to_one_hot(scale, of):
    "The gradient of the loss is what makes near uniform distributions hard"
    w, inputs = (3, 3), problem((2, 24, 20), 4, 1, 5, scale, f32, related=True)
    inputs[3].zero_()
    def gradient(R):
        loss = _mi_loss(R.requires_grad_().flatten(1, 2), True, None)
        return loss.detach(), torch.autograd.grad(loss, R)[0]
    loss, G = gradient(reference(inputs, w, torch.zeros(1, 3, 3, 5, 5, dtype=f64))[0])
    grads = reference(inputs, w, G)[1:]
    ours, G = gradient(of.sums(*inputs, w))
    assert (ours - loss).abs() < 1e-6
    ours = of.sums_backward(G, *inputs, w, (True,)*4)
    for a, b in zip(ours[:2], grads): assert far(a, b) < 1e-4
    assert far(*[torch.cat([o.flatten() for o in x[2:]]) for x in (ours, grads)]) < 1e-4

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_and_layouts(dtype):
    "Computed in float32; gradients have the layout of the features"
    x, y, weight, bias = problem((2, 9, 7), 3, 2, 4, dtype=f32)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    y = y.to(dtype).transpose(2, 3).contiguous().transpose(2, 3)
    G = torch.randn(2, 3, 3, 4, 4, dtype=f64)
    R, *grads = reference((x, y, weight, bias), (3, 3), G)
    assert far(pair_products.sums(x, y, weight, bias, (3, 3)), R) < 1e-6
    ours = pair_products.sums_backward(G, x, y, weight, bias, (3, 3), (True,)*4)
    for a, b in zip(ours, grads): assert far(a, b) < 2e-6
    assert ours[0].stride() == x.stride()

def test_what_is_not_wanted_is_not_made():
    for C in (0, 3):
        inputs = problem((2, 9, 7), C, 2, 4)
        G = torch.randn(2, 3, 3, 4, 4, dtype=f64)
        whole = pair_products.sums_backward(G, *inputs, (3, 3), (True, True, C > 0, C > 0))
        for needs in product((True, False), repeat=4 if C else 2):
            needs = (*needs, *(() if C else (False, False)))
            if not any(needs): continue
            for a, b, need in zip(pair_products.sums_backward(G, *inputs, (3, 3), needs), whole, needs):
                assert not need or torch.equal(a, b)

"Exactness of the joints and losses against double loops."
from itertools import product
import math, numpy as np, pytest, torch
from fastmiseg.mutual_info import *

def soft(*shape, scale=1., dtype=torch.float64): return (scale*torch.randn(*shape, dtype=dtype)).softmax(2)

def loop_joint(p, q, size):
    "Double loop over pixels and displacements."
    N, S, K, *m = p.shape
    out = []
    for d in product(*[range(-(o//2), o//2 + 1) for o in size]):
        P, n = torch.zeros(S, K, K, dtype=torch.float64), 0
        for i in product(*map(range, m)):
            j = tuple(a + b for a, b in zip(i, d))
            if any(not 0 <= a < b for a, b in zip(j, m)): continue
            P += torch.einsum('nsk,nsl->skl', p[(..., *i)], q[(..., *j)]); n += N
        out.append(P/max(n, 1))
    return torch.stack(out, 1)

@pytest.mark.parametrize('shape,size', [((2, 2, 3, 5, 6), (3, 5)), ((1, 1, 4, 4, 4), (3, 3)), ((2, 1, 3, 3, 4, 5), (3, 1, 3)), ((1, 2, 2, 2, 9), (5, 3))])
def test_joint_equals_double_loop(shape, size):
    p, q = soft(*shape), soft(*shape)
    assert (local_joint(p, q, size) - loop_joint(p, q, size)).abs().max() < 1e-12

"""Compile every kernel of the local loss for a GPU that need not be there, given its compute capability.

`python tests/compile_kernels.py 90`: ten clusters, 16 channels, the windows of the usual stages.
"""
import inspect, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastmiseg import kernels
from fastmiseg.pair_kernels import _power_of_2, _tiles, dot_precision, launch_options

f32, f64, i32, f16, bf16 = [f'*{o}' for o in ('fp32', 'fp64', 'i32', 'fp16', 'bf16')]

def build(kernel, pointers, num_warps=4, num_stages=2, **constants):
    "A kernel whose other arguments are whole numbers"
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {k: v for k, v in constants.items() if k in names}
    types = {n: 'constexpr' if n in constants else pointers.get(n, 'i32') for n in names}
    source = ASTSource(kernel, types, constexprs={(names.index(k),): v for k, v in constants.items()})
    options = dict(num_warps=num_warps, num_stages=num_stages)
    return triton.compile(source, target=GPUTarget('cuda', int(sys.argv[1]), 32), options=options)

K = 10
sizes = dict(K=K, KP=_power_of_2(K + 1), C=16, CP=16, DOT=dot_precision)
for x in (f32, bf16):
    for exact in (True, False):
        line = dict(x=x, weight=f32, bias=f32, centre=f64, line=i32 if exact else f16)
        build(kernels.line_kernel, line, **sizes, HEAD=True, EXACT=exact, **launch_options['line'])
    build(kernels.means_kernel, dict(x=x, weight=f32, bias=f32, out=f32), **sizes, HEAD=True, **launch_options['means'])
    head = dict(x=x, weight=f32, bias=f32, g=f32, gx=x, parts=f32)
    build(kernels.head_kernel, head, **sizes, NEED_X=True, NEED_HEAD=True, **launch_options['head'])
build(kernels.means_kernel, dict(x=f32, weight=f32, bias=f32, out=f32), **sizes, HEAD=False, **launch_options['means'])
build(kernels.centres_kernel, dict(sums=f32, centres=f64), **sizes, **launch_options['centres'])
for side in (3, 7):
    window = dict(WZ=1, WY=side, WX=side)
    build(kernels.factors_kernel, dict(G=f64, largest=f64, centres=f64, out=f32), **sizes, **window)
    M1, M2 = _tiles(side*(K + 1))
    for stored, exact in ((i32, True), (f16, False)):
        build(kernels.sums_kernel, dict(p=stored, q=stored, out=f32), **sizes, **window, M1=M1, M2=M2, N1=M1, N2=M2,
              EXACT=exact, **launch_options['sums'])
        build(kernels.gradient_kernel, dict(q=stored, G=f32, largest=f64, out=f32), **sizes, **window, EXACT=exact,
              **launch_options['gradient'])
for prior in (False, True):
    table = build(kernels.information_kernel, dict(R=f64, prior=f64, out=f64, gradient=f64), **sizes, SYMMETRIC=True,
                  PRIOR=prior, MARGINAL=1.1)
    assert 'FF199999999999A' in table.asm['ptx'] # 1.1 (or -1.1) in float64

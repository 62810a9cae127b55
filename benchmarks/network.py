"""What helps the paper's U-Net on a CPU: one step on the 24 images of the paper's batch, one thread.

    python benchmarks/network.py             # network.md (about five minutes)
    python benchmarks/network.py --size 64 --width 4 --repeats 2   # a look

A step is forward, cross-entropy, backward and Adam. Each variant runs in a process of its own, for an
allocator's settings cannot be taken back. Processor time; ratios are what to compare.
"""
import argparse, json, os, platform, resource, subprocess, sys, time
from pathlib import Path
from statistics import median

VARIANTS = {
    'plain': '',
    'channels last': 'c',
    'memory reused': 'm',
    'channels last, memory reused': 'cm',
    'channels last, memory reused, bf16': 'cmb',
    'torch.compile': 'o',
    'torch.compile, channels last, memory reused': 'ocm',
    'transparent huge pages': 't',
}
KEPT = {
    'channels last': '`create_unet`',
    'memory reused': '`reuse_memory`, called by `miseg_learner` on a CPU',
    'channels last, memory reused': 'both',
    'channels last, memory reused, bf16': "`miseg_learner(..., precision='bf16')`",
}

def step(o):
    import torch
    from torch import nn
    from fastmiseg.learner import reuse_memory
    from fastmiseg.models import UNet
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if 'm' in o.variant: reuse_memory()
    net = UNet(1, 4, o.width)
    x,y = torch.rand(o.images,1,o.size,o.size),torch.randint(4, (o.images,o.size,o.size))
    if 'c' in o.variant: net = net.to(memory_format=torch.channels_last)
    opt,run,times = torch.optim.Adam(net.parameters()),torch.compile(net) if 'o' in o.variant else net,[]
    for _ in range(o.repeats+2):
        begun = time.process_time()
        with torch.autocast('cpu', torch.bfloat16, enabled='b' in o.variant): out = run(x)
        loss = nn.functional.cross_entropy(out.float(), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        times.append(time.process_time()-begun)
    print(json.dumps(dict(seconds=median(times[2:]), loss=float(loss),
                          peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10)))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--width', type=int, default=16)
    parser.add_argument('--images', type=int, default=24)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--variant', help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.variant is not None: return step(o)
    rows,first = [],None
    for name,v in VARIANTS.items():
        env = {**os.environ, 'OMP_NUM_THREADS':'1',
               **({'GLIBC_TUNABLES':'glibc.malloc.hugetlb=1'} if v=='t' else {})}
        done = subprocess.run([sys.executable, '-W', 'ignore', __file__,
                               *(f'--{k}={getattr(o, k)}' for k in ('size','width','images','repeats')),
                               f'--variant={v}'], env=env, capture_output=True, text=True)
        if done.returncode:
            rows.append(f'| {name} | did not run: {done.stderr.strip().splitlines()[-1][:80]} | | | |')
            continue
        r = json.loads(done.stdout.splitlines()[-1])
        first = first or r
        rows.append(f"| {name} | {r['seconds']/first['seconds']:.2f} | {r['seconds']:.2f} | "
                    f"{r['peak']:.0f} | {abs(r['loss']-first['loss']):.0e} | {KEPT.get(name, '')} |")
        print(rows[-1], file=sys.stderr, flush=True)
    import torch
    text = '\n'.join([
        (f'A step of the U-Net of width {o.width} on {o.images} images of {o.size}×{o.size}: '
         'forward, cross-entropy, backward, Adam.'), '',
        ('| variant | time, plain = 1 | seconds | peak memory (MB) '
         '| difference in the loss of the last step | kept in |'),
        '|---|---|---|---|---|---|', *rows, '',
        (f'{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}, '
         f'processor time, median of {o.repeats} steps after two. '
         'Made by `python benchmarks/network.py`.'), ''])
    print(text)
    if (o.size, o.width, o.images)==(224,16,24):
        (Path(__file__).parent/'network.md').write_text(text)

if __name__=='__main__': main()

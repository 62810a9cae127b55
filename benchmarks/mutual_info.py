"""Cost of the local information loss against the textbook convolution, features to heads to loss to gradients.

Two ways are measured: `LocalProjector.loss`, straight from the features, which is what a training step
calls, and `local_mi_loss` on the probabilities that the projector makes.

    OMP_NUM_THREADS=1 python benchmarks/mutual_info.py   # the table in mutual_info.md (about two minutes)
    OMP_NUM_THREADS=1 python benchmarks/mutual_info.py --scaling   # how the cost grows: mutual_info_scaling.md and .png

Processor time of this process (`time.process_time`), one thread, in alternation; the median of the
repeats. Ratios are what to compare.
"""
import argparse, os, platform, subprocess, sys, time
from pathlib import Path
from statistics import median
from threading import Event, Thread
import torch, torch.nn.functional as F
from fastmiseg.mutual_info import local_mi_loss
from fastmiseg.projectors import LocalProjector

here = Path(__file__).parent
CASES = {'224×224, 7×7': dict(n_in=16, shape=(224, 224), size=7),
         '112×112, 3×3': dict(n_in=32, shape=(112, 112), size=3),
         '48×48×48, 3×3×3': dict(n_in=16, shape=(48, 48, 48), size=3, batch=2)}
OURS = {'projector': '`LocalProjector.loss`', 'probabilities': '`local_mi_loss`'}

def textbook(heads, f, g, size):
    "One separate head and one convolution each: batch as channels, the other map as kernel"
    conv, loss = F.conv2d if f.ndim == 4 else F.conv3d, 0
    for head in heads:
        p, q = head(f).softmax(1), head(g).softmax(1)
        P = conv(p.transpose(0, 1), q.transpose(0, 1), padding=size//2).flatten(2).movedim(-1, 0)
        P = P/P.sum((1, 2), keepdim=True)
        P = (P + P.mT)/2
        log = lambda x: x.clamp_min(1e-16).log()
        loss = loss - (P*(log(P) - log(P.sum(1, keepdim=True))
                          - log(P.sum(2, keepdim=True)))).sum((1, 2)).mean()
    return loss/len(heads)

def setup(shape, size, n_in=16, batch=10, n_heads=5, n_clusters=10):
    "Features, and a function of no arguments for each implementation that makes loss and gradients"
    torch.manual_seed(0)
    f, g = [torch.randn(batch, n_in, *shape).requires_grad_() for _ in range(2)]
    proj = LocalProjector(n_in, n_clusters, n_heads)
    conv = torch.nn.Conv2d if len(shape) == 2 else torch.nn.Conv3d
    heads = [conv(n_in, n_clusters, 1) for _ in range(n_heads)]
    def projector(): proj.loss(f, g, size).backward()
    def probabilities(): local_mi_loss(proj(f), proj(g), size).backward()
    def usual(): textbook(heads, f, g, size).backward()
    def clear():
        for x in (f, g, *proj.parameters(), *(p for h in heads for p in h.parameters())): x.grad = None
    return {'textbook': usual, 'projector': projector, 'probabilities': probabilities}, clear

def cpu(fn, clear):
    clear()
    start = time.process_time()
    fn()
    return time.process_time() - start

def compare(case, repeats):
    "Median processor time of each implementation, called in turn"
    fns, clear = setup(**case)
    times = {name: [] for name in fns}
    for i in range(repeats + 1):
        for name, fn in fns.items():
            for _ in range(3 if name in OURS and i else 1): times[name].append(cpu(fn, clear))
    return {name: median(t[1:]) for name, t in times.items()}

def ours(repeats=5, **case):
    fns, clear = setup(**case)
    return median([cpu(fns['projector'], clear) for _ in range(repeats + 1)][1:])

def matmul_gflops(n=2048):
    a = torch.randn(n, n)
    return max(2*n**3/cpu(lambda: a @ a, lambda: None)/1e9 for _ in range(5))

def useful_gflop(shape, size, batch=10, n_heads=5, n_clusters=10, **_):
    "Products of the joint and of its two gradients, without the heads"
    px = batch
    for o in shape: px *= o
    return 3*2*n_heads*n_clusters**2*size**len(shape)*px/1e9

def peak_mb(name, impl):
    "Peak memory that one step of `impl` adds, gradients of the features included; in a process of its own"
    command = [sys.executable, __file__, '--peak', name, impl]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

def peak(name, impl):
    case = CASES[name]
    fns, clear = setup(**case)
    setup(**{**case, 'shape': (16,)*len(case['shape'])})[0][impl]() # libraries load here
    def rss(): return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGESIZE')/2**20
    before, top, done = rss(), [0], Event()
    def watch():
        while not done.wait(.001): top[0] = max(top[0], rss())
    t = Thread(target=watch)
    t.start()
    fns[impl]()
    top[0] = max(top[0], rss())
    done.set()
    t.join()
    print(top[0] - before)

def scaling():
    "Our cost along each axis; writes the list and the picture"
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    base = dict(shape=(112, 112), size=5, batch=4, n_in=16)
    axes = {'window': ('size', (1, 3, 5, 7, 9, 11)),
            'clusters K': ('n_clusters', (2, 5, 10, 16, 20, 32, 40)),
            'heads': ('n_heads', (1, 2, 5, 10)),
            'batch': ('batch', (1, 2, 4, 8, 16)),
            'side of the map': ('shape', (28, 56, 112, 224, 336)),
            'side of a 3D map, 3×3×3': ('shape', (8, 16, 24, 32, 48))}
    lines = ['# How the cost of the local loss grows', '',
             f'{machine()}.',
             ('Processor time of one step in ms, median of 5. '
              'What is not named is 112×112, 5×5, batch 4, 5 heads, K=10, 16 channels.'),
             'Made by `OMP_NUM_THREADS=1 python benchmarks/mutual_info.py --scaling`.', '',
             '![growth](mutual_info_scaling.png)', '']
    fig, axs = plt.subplots(1, len(axes), figsize=(15, 2.6))
    for (label, (key, values)), ax in zip(axes.items(), axs):
        ndim = 3 if '3D' in label else 2
        ms = [1e3*ours(**{**base, **(dict(size=3) if ndim == 3 else {}),
                          key: (v,)*ndim if key == 'shape' else v}) for v in values]
        ax.plot(values, ms, 'o-')
        ax.set(xlabel=label, ylim=(0, None))
        lines.append(f'- {label}: ' + ', '.join(f'{v}: {t:.0f}' for v, t in zip(values, ms)))
        print(lines[-1], flush=True)
    axs[0].set_ylabel('ms')
    fig.tight_layout()
    fig.savefig(here/'mutual_info_scaling.png', dpi=60)
    (here/'mutual_info_scaling.md').write_text('\n'.join(lines) + '\n')

def machine():
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        name = next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines()
                     if l.startswith('model name')), name)
    return (f'{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread used; '
            f'torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}')

head = """# Local mutual information: cost of features → heads → loss → gradients

Float32, 5 heads, K=10, batch 10 (2 in 3D). Processor time, median of rounds in alternation. The matmul limit is the
time of the products alone at the rate of a large matrix product.

Made by `OMP_NUM_THREADS=1 python benchmarks/mutual_info.py`, on each of these machines; how the cost grows is in
[mutual_info_scaling.md](mutual_info_scaling.md).
"""

def write_section(text):
    "Into the page, beside those of other machines"
    page, name = here/'mutual_info.md', text.splitlines()[0]
    others = page.read_text().split('\n## ')[1:] if page.exists() else []
    sections = [o.strip() for o in others if o.splitlines()[0] != name] + [text]
    page.write_text('\n## '.join([head, *(o + '\n' for o in sections)]))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--scaling', action='store_true', help='measure how the cost grows instead')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--peak', nargs=2, metavar=('CASE', 'IMPL'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak: return peak(*args.peak)
    if args.scaling: return scaling()
    limit = matmul_gflops()
    lines = [machine(), '',
             f'A 2048×2048 matrix product runs at {limit:.0f} GFLOP/s here.', '',
             '| case | | time | times less | of the matmul limit | extra peak memory |',
             '|---|---|---|---|---|---|']
    for case, settings in CASES.items():
        t = compare(settings, args.repeats)
        for impl, seconds in t.items():
            less = f"{t['textbook']/seconds:.1f}" if impl in OURS else ''
            share, name = f'{useful_gflop(**settings)/limit/seconds:.0%}', OURS.get(impl, impl)
            lines.append(f'| {case} | {name} | {seconds:.2f} s | {less} | {share} | '
                         f'{peak_mb(case, impl):.0f} MB |')
            print(lines[-1], flush=True)
    write_section('\n'.join(lines))

if __name__ == '__main__': main()

"""What the parts of `gpu.sh` share: rows of results in OUT/results.jsonl, the clock of the device,
and the page that is made of the rows.

    python benchmarks/gpu.py report OUT   # the page, to stdout
    python benchmarks/gpu.py curves OUT   # the figure of the trainings, from OUT/curves.jsonl

OUT is where the parts work, or results.tar.gz unpacked. What else there is, `gpu.sh` calls.
"""
import collections, importlib.metadata, json, os, platform, sys, tarfile, time, traceback
from pathlib import Path
from statistics import median

DEVICE = os.environ.get('FASTMISEG_DEVICE', 'cuda')
DRY = bool(os.environ.get('DRY'))
OUT = Path(os.environ.get('OUT', '.'))
ENDS = float(os.environ.get('ENDS', 'inf')) # when this part is stopped, in seconds since 1970
RUN = int(os.environ.get('RUN', 0)) # which call this is

def add(part, **row):
    "A row of results, at once"
    row = dict(part=part, run=RUN, **row)
    with open(OUT/'results.jsonl', 'a') as f: f.write(json.dumps(row)+'\n')

def rows(out, part=None):
    file = Path(out)/'results.jsonl'
    found = [json.loads(o) for o in file.read_text().splitlines() if o.strip()] if file.exists() else []
    return [o for o in found if part is None or o['part']==part]

def missing(part, **row):
    "Whether there is no such row yet; also where the part was asked for by its name"
    there = [o for o in rows(OUT, part) if row.items()<=o.items() and 'error' not in o]
    return not there or bool(os.environ.get('AGAIN'))

def table(head, lines):
    "Markdown"
    return '\n'.join(['| '+' | '.join(head)+' |',
                      '|---'*len(head)+'|',
                      *('| '+' | '.join(map(str, o))+' |' for o in lines)])

class Clock:
    "Marks in the device's stream, and the milliseconds between them"
    def __init__(self): self.marks = []
    def mark(self):
        if DEVICE=='cuda':
            import torch
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else: self.marks.append(time.perf_counter())
    def gaps(self):
        if DEVICE=='cuda':
            import torch
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a,b in zip(self.marks, self.marks[1:])]
        return [1000*(b-a) for a,b in zip(self.marks, self.marks[1:])]

def take_turns(things, rounds, steps, warm=3):
    "Median milliseconds of one call of each of `things`, which take turns"
    for f in things.values():
        for _ in range(warm): f()
    times = {k:[] for k in things}
    for _ in range(rounds):
        for k,f in things.items():
            clock = Clock()
            clock.mark()
            for _ in range(steps):
                f()
                clock.mark()
            times[k] += clock.gaps()
    return {k:median(t) for k,t in times.items()}

def smoke():
    "A loss at each of the paper's stages, forward and backward: whether its kernels compile here"
    import torch
    from fastmiseg.projectors import LocalProjector
    begun = time.perf_counter()
    for c,n,size in ((32,112,3),(16,224,7)):
        f,g = (torch.randn(2, c, *[n//8 if DRY else n]*2, device=DEVICE, requires_grad=True) for _ in range(2))
        loss = LocalProjector(c).to(DEVICE).loss(f, g, size)
        loss.backward()
        if not all(o.isfinite().all() for o in (loss, f.grad, g.grad)):
            raise FloatingPointError(f'local loss, {c} channels of {n}×{n}: expected finite numbers, got {loss}')
    return round(time.perf_counter()-begun, 1)

def about():
    import torch
    if DEVICE=='cuda' and not torch.cuda.is_available():
        sys.exit('gpu.sh: PyTorch finds no CUDA device; DRY=1 runs everything on the CPU')
    names = ('fastmiseg','fastai','fastcore','torch','triton','numpy','timm','SimpleITK')
    def version(n):
        try: return importlib.metadata.version(n)
        except importlib.metadata.PackageNotFoundError: return None
    row = dict(device=platform.processor() or platform.machine(), python=platform.python_version(),
               cores=os.cpu_count(), versions={n:v for n in names if (v:=version(n))})
    if DEVICE=='cuda':
        p = torch.cuda.get_device_properties(0)
        row.update(device=p.name, memory_gb=round(p.total_memory/2**30, 1),
                   multiprocessors=p.multi_processor_count, cuda=torch.version.cuda,
                   cudnn=torch.backends.cudnn.version(), driver=driver())
    import fastmiseg.all # noqa: F401  its bytecode is written before many processes ask for it
    try: row['first_losses_s'] = smoke()
    except Exception as e: # the methods without it are worth having
        traceback.print_exc()
        row['error'] = f'the local loss: {type(e).__name__}: {e}'[:300]
    print(row)
    add('about', **row)

def driver():
    import subprocess
    try:
        return subprocess.run(['nvidia-smi','--query-gpu=driver_version','--format=csv,noheader'],
                              capture_output=True, text=True).stdout.strip()
    except OSError: return None

ABSENT = 'belongs to a package that is not on this machine'
_stand_in = '''\
"""Stands where a package would be that is not here: it can be imported, and says so when it is used."""
import sys
class Absent(type):
    def __getattr__(cls, name):
        if name.startswith('__'): raise AttributeError(name)
        return Absent(name, (), {})
    def __call__(cls, *args, **kwargs):
        raise ImportError(f'{cls.__name__} ABSENT')
class LoggerBase:
    def __getattr__(self, name): return lambda *args: None
def __getattr__(name):
    if name.startswith('__'): raise AttributeError(name)
    return Absent(name, (Exception,), {}) if name.endswith('Error') else Absent(name, (), {})
'''.replace('ABSENT', ABSENT)

def stand_ins(folder, names):
    "Modules that can be imported but not used, for those of `names` that are not installed"
    import importlib.util
    parts = dict(pydicom=('datadict','encaps','errors','pixels'), nibabel=('spatialimages','orientations'))
    for name in names:
        if importlib.util.find_spec(name): continue
        (Path(folder)/name).mkdir(parents=True, exist_ok=True)
        for part in ('__init__', *parts.get(name, ())):
            (Path(folder)/name/f'{part}.py').write_text(_stand_in)
        print(f'{name} is not installed: a stand-in')

def install(carried, site):
    "Those of the wheels in `carried` whose package is not here"
    import subprocess
    def here(name):
        try: return bool(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError: return False
    wheels = [str(o) for o in sorted(Path(carried).glob('*.whl')) if not here(o.name.split('-')[0])]
    if not wheels: return
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--target', str(site),
                    '--upgrade', *wheels], check=True)
    print(f"installed from {carried}: {', '.join(Path(o).name.split('-')[0] for o in wheels)}")

def bring(work, out, checkpoints=False):
    "What came of it, as few files as can be sent home"
    work,out = Path(work),Path(out)
    (out/'gpu.md').write_text(report(work))
    with tarfile.open(work/'results.part', 'w:gz') as tar:
        for f in sorted(work.iterdir()):
            if f.suffix in ('.jsonl','.txt','.csv'): tar.add(f, f.name)
    (work/'results.part').replace(out/'results.tar.gz')
    if not checkpoints: return
    newest = {f.parent:f for f in sorted(work.glob('trainings/*/run/*.pt'))}.values()
    room = PIECES*PIECE-20480 # what ends a tar
    with tarfile.open(work/'checkpoints.part', 'w') as tar:
        for f in sorted(newest, key=lambda f: -int(f.stem)): # the furthest first
            if f.stat().st_size+2048<=room-tar.offset: tar.add(f, f.relative_to(work))
            else: print(f'{f}: no room left in {PIECES} pieces of {PIECE>>20} MiB')
    for f in out.glob('checkpoints.*'): f.unlink()
    with open(work/'checkpoints.part', 'rb') as f:
        for i in range(PIECES):
            if piece:=f.read(PIECE): (out/f'checkpoints.{i}').write_bytes(piece)
    (work/'checkpoints.part').unlink()

PIECE,PIECES = 15<<20,4

def begin(earlier, work):
    "With what an earlier call has left"
    earlier,work = Path(earlier),Path(work)
    if (work/'results.jsonl').exists(): return print(f'{work}: there are results already, {earlier} is not looked at')
    if not (earlier/'results.tar.gz').exists():
        sys.exit(f'FROM={earlier}: expected results.tar.gz there, which an earlier call left in its OUT')
    with tarfile.open(earlier/'results.tar.gz') as tar: tar.extractall(work, filter='data')
    pieces = sorted(earlier.glob('checkpoints.*'))
    if not pieces: return
    with open(work/'checkpoints.part', 'wb') as f:
        for o in pieces: f.write(o.read_bytes())
    with tarfile.open(work/'checkpoints.part') as tar: tar.extractall(work, filter='data')
    (work/'checkpoints.part').unlink()

def _latest(found, *keys):
    "The last row for each value of `keys`"
    return list({tuple(str(o.get(k)) for k in keys): o for o in found}.values())

_SUBJECT = 'precision','method','seed','variant','loader','what','stage','features','way'

def _of_the_last_run(found):
    "For each subject the rows of the last run that has some: failures of before are forgotten"
    of = lambda o: tuple(o.get(k) for k in _SUBJECT)
    last = {of(o): o['run'] for o in found}
    return [o for o in found if o['run']==last[of(o)]]

def _said_of_tests(found):
    found = _latest(found, 'test')
    n = collections.Counter(o['outcome'] for o in found)
    return ['## Tests', '', ', '.join(f'{v} {k}' for k,v in sorted(n.items()))+'.', '',
            *(f"- {o['test']} failed" for o in found if o['outcome']=='failed'), '']

def report(out):
    made = rows(out, 'about')
    devices = {o['run']:o['device'] for o in made}
    several = len(set(devices.values()))>1
    text = ['# On a CUDA device', '', 'Made by `bash benchmarks/gpu.sh OUT`.', '']
    for o in _latest(made, 'device'):
        text += [f"{o['device']}"
                 + (f", {o['memory_gb']} GB, driver {o['driver']}, CUDA {o['cuda']}, cuDNN {o['cudnn']}"
                    if 'driver' in o else '')
                 + f"; {o['cores']} cores, Python {o['python']}, "
                 + ', '.join(f'{k} {v}' for k,v in o['versions'].items()) + '.'
                 + (f" Failed: {o['error']}." if 'error' in o else ''), '']
    notes = _latest(rows(out, 'note'), 'of')
    if notes:
        lines = [(o['of'], _OUTCOMES.get(o['status'], f"failed ({o['status']})"), o['seconds'])
                 for o in notes]
        text += ['## Parts', '', table(['part','outcome','seconds'], lines), '']
    if found := rows(out, 'test'): text += _said_of_tests(found)
    for part,head in _SECTIONS.items():
        mine = _of_the_last_run(rows(out, part))
        if not mine: continue
        text += [f'## {head}', '']
        for name in dict.fromkeys(o.get('table','') for o in mine):
            some = [{**({'device':devices.get(o['run'])} if several else {}),
                     **{k:v for k,v in o.items() if k not in ('part','run','table')}}
                    for o in mine if o.get('table','')==name]
            keys = list(dict.fromkeys(k for o in some for k in o))
            if name: text += [f'{name}:', '']
            text += [table(keys, [[_said(o.get(k, '')) for k in keys] for o in some]), '']
    return '\n'.join(text)

def curves(file):
    "Validation Dice over the steps of each training, beside the file"
    import matplotlib.pyplot as plt, pandas as pd
    d = pd.read_json(file, lines=True)
    ax = d.pivot_table(index='step', columns='method', values='dice', sort=False).plot(figsize=(7,4), lw=2)
    ax.set(xlabel='steps', ylabel='Dice of the validation scans', ylim=(0,1))
    ax.legend(title=None, frameon=False, loc='lower right')
    ax.spines[['top','right']].set_visible(False)
    plt.tight_layout()
    plt.savefig(Path(file).with_suffix('.png'), dpi=120)

UNFINISHED = 75
_OUTCOMES = {0: 'done', 5: 'done', UNFINISHED: 'not finished', # by exit status; 5: no test was left
             124: 'stopped at its limit', 137: 'stopped at its limit'}
_SECTIONS = dict(
    waiting='Without waiting',
    step='Milliseconds to a step',
    turns='Before and after',
    mutual_info='The local information loss',
    loading='Reading',
    network='What makes the step fast',
    train="At the paper's size",
)

def _said(v):
    return (f'{v:.3g}' if isinstance(v, float) and abs(v)<100 else
            f'{v:.0f}' if isinstance(v, float) else
            str(v).replace('|', '\\|'))

if __name__=='__main__':
    what,out,*more = sys.argv[1:]
    OUT = Path(out)
    if what=='about': about()
    elif what=='stand_ins': stand_ins(out, more)
    elif what=='report': print(report(out))
    elif what=='curves': curves(Path(out)/'curves.jsonl')
    elif what=='note': add('note', of=more[0], status=int(more[1]), seconds=int(more[2]))
    elif what=='done': sys.exit(not any(o['of']==more[0] and o['status'] in (0,5) for o in rows(out, 'note')))
    elif what=='install': install(out, more[0])
    elif what=='begin': begin(out, more[0])
    elif what=='bring': bring(out, *more)

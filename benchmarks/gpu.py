"""What the parts of `gpu.sh` share: rows of results in OUT/results.jsonl, the clock of the device,
and the page that is made of the rows.

    python benchmarks/gpu.py about OUT    # the machine
    python benchmarks/gpu.py report OUT   # the page, to stdout
    python benchmarks/gpu.py curves OUT   # the figure of the trainings, from OUT/curves.jsonl
"""
import importlib.metadata, json, os, platform, sys, time
from pathlib import Path
from statistics import median

DEVICE = os.environ.get('FASTMISEG_DEVICE', 'cuda')
DRY = bool(os.environ.get('DRY'))
OUT = Path(os.environ.get('OUT', '.'))

def add(part, **row):
    "A row of results, at once"
    row = dict(part=part, **row)
    with open(OUT/'results.jsonl', 'a') as f: f.write(json.dumps(row)+'\n')

def rows(out, part=None):
    file = Path(out)/'results.jsonl'
    found = [json.loads(o) for o in file.read_text().splitlines() if o.strip()] if file.exists() else []
    return [o for o in found if part is None or o['part']==part]

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

def about():
    import torch
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
    print(row)
    add('about', **row)

def driver():
    import subprocess
    try:
        return subprocess.run(['nvidia-smi','--query-gpu=driver_version','--format=csv,noheader'],
                              capture_output=True, text=True).stdout.strip()
    except OSError: return None

_stand_in = '''\
"""Stands where a package would be that is not here: it can be imported, and says so when it is used."""
import sys
class Absent(type):
    def __getattr__(cls, name):
        if name.startswith('__'): raise AttributeError(name)
        return Absent(name, (), {})
    def __call__(cls, *args, **kwargs):
        raise ImportError(f'{cls.__name__} belongs to a package that is not on this machine')
class LoggerBase:
    def __getattr__(self, name): return lambda *args: None
def __getattr__(name):
    if name.startswith('__'): raise AttributeError(name)
    return Absent(name, (Exception,), {}) if name.endswith('Error') else Absent(name, (), {})
'''

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

def _latest(found, *keys):
    "The last row for each value of `keys`"
    return list({tuple(str(o.get(k)) for k in keys): o for o in found}.values())

def report(out):
    made = _latest(rows(out, 'about'), 'part')
    text = ['# On a CUDA device', '',
            'Made by `bash benchmarks/gpu.sh OUT` and `python benchmarks/gpu.py report OUT`.', '']
    for o in made[-1:]:
        text += [f"{o['device']}"
                 + (f", {o['memory_gb']} GB, driver {o['driver']}, CUDA {o['cuda']}, cuDNN {o['cudnn']}"
                    if 'driver' in o else '')
                 + f"; {o['cores']} cores, Python {o['python']}, "
                 + ', '.join(f'{k} {v}' for k,v in o['versions'].items()) + '.', '']
    notes = _latest(rows(out, 'note'), 'of')
    if notes:
        lines = [(o['of'], _OUTCOMES.get(o['status'], f"failed ({o['status']})"), o['seconds'])
                 for o in notes]
        text += ['## Parts', '', table(['part','outcome','seconds'], lines), '']
    found = rows(out)
    for part,head in _SECTIONS.items():
        mine = [o for o in found if o['part']==part]
        if not mine: continue
        text += [f'## {head}', '']
        for name in dict.fromkeys(o.get('table','') for o in mine):
            some = [{k:v for k,v in o.items() if k not in ('part','table')}
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

_OUTCOMES = {0: 'done', 124: 'stopped at its limit', 137: 'stopped at its limit'} # by exit status
_SECTIONS = dict(
    waiting='Without waiting',
    step='Milliseconds to a step',
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
    elif what=='done': sys.exit(not any(o['of']==more[0] and o['status']==0 for o in rows(out, 'note')))

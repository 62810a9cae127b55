"""Trainings at the paper's size, each in a process of its own on the one device; curves and scores as
they go (a part of `gpu.sh`).

Slices from FASTMISEG_SLICES (see gpu_slices.py). Half a minute before ENDS (never, without) a training
that is not done stops, and is scored as it is; it goes on from its last epoch in another call with the
same OUT, and so does one that was lost with its machine. STEPS: how many each makes (else what an
earlier call has planned, or what there is time for by the milliseconds that `gpu_step.py` has measured, at
most 6000); METHODS (names, separated by commas; all), SEED (0).
"""
import json, os, shutil, subprocess, sys, time, traceback
from contextlib import suppress
from types import SimpleNamespace
import pandas as pd, torch
from fastai.basics import Callback, set_seed
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin, combine_scheds
from fastmiseg.callback.method import sigmoid_rampup
from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.pseudo import PseudoLabelCallback
from fastmiseg.callback.resume import ResumeCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.learner import miseg_learner
from fastmiseg.losses import CrossEntropyDiceLoss
from fastmiseg.metrics import VolumeDice
from fastmiseg.surface import VolumeHD95
from gpu import DEVICE, DRY, ENDS, OUT, UNFINISHED, add, rows
from gpu_slices import Discs, Packed, loaders

STEPS = int(os.environ.get('STEPS', 0))
SEED = int(os.environ.get('SEED', 0))
TO_START,TO_SCORE = 15,30 # seconds
UNTIL = ENDS-TO_SCORE # seconds since 1970
EPOCH = 4 if DRY else min(STEPS or 300, 300)
WIDTH = 4 if DRY else 16

# as in the benchmark: Dice beside cross-entropy and labelled images in a pass of their own,
# but for the paper
METHODS = {
    'labels only':             lambda: [],
    'Mean Teacher':            lambda: [EMATeacherCallback(.99, sigmoid_rampup(15., .8))],
    'the paper':               lambda: [MIRegCallback.paper()],
    'recommended':             lambda: [MIRegCallback()],
    'pseudo-labels + teacher': lambda: [PseudoLabelCallback(sigmoid_rampup(1., .8)), EMATeacherCallback(.99)],
}
if DRY: METHODS = {k:METHODS[k] for k in ('pseudo-labels + teacher',)}
AS_MEASURED = {'the paper': 'all terms of the paper'} # names in gpu_step.py, where they are others

def schedule(lr, div=400., warm=.1):
    "Linear warm-up and a cosine, as in the paper"
    return ParamScheduler({'lr': combine_scheds([warm, 1-warm], [SchedLin(lr/div, lr), SchedCos(lr, 0.)])})

class Log(Callback):
    "A line of the curve after each epoch"
    order = ResumeCallback.order+1
    def __init__(self, method): self.method,self.of_this_call = method,SimpleNamespace(begun=time.perf_counter())
    def after_epoch(self):
        row = dict(zip(self.recorder.metric_names[1:], self.recorder.values[-1]))
        row = dict(method=self.method, seed=SEED, step=(self.epoch+1)*EPOCH,
                   seconds=round(time.perf_counter()-self.of_this_call.begun, 1),
                   **{k:round(float(v), 5) for k,v in row.items() if k!='time'})
        with open(OUT/'curves.jsonl', 'a') as f: f.write(json.dumps(row)+'\n')

class TimeIsUp(Exception): "For `ResumeCallback` a training that was interrupted, not one that is finished"

class Deadline(Callback):
    "Stops when the time is over"
    order = ResumeCallback.order-1
    # plain attributes `ResumeCallback` would bring back from the call before
    def __init__(self): self.of_this_call = SimpleNamespace(first=None)
    def before_batch(self):
        if self.training and self.of_this_call.first is None: self.of_this_call.first = self.train_iter
    def after_batch(self):
        if self.training and time.time()>UNTIL: raise TimeIsUp('UNTIL')

def learner(name, work, store):
    make = METHODS[name]
    torch.set_float32_matmul_precision('high')
    parts = ('labeled','valid',('unlabeled',)) if make() else ('labeled','valid')
    dls = loaders(store, parts, n_iters=EPOCH, seed=SEED, device=DEVICE,
                  **(dict(bs=2, unlabeled_bs=3) if DRY else {}))
    set_seed(SEED)
    loss = None if name=='the paper' else CrossEntropyDiceLoss()
    learn = miseg_learner(dls, width=WIDTH, loss_func=loss, metrics=VolumeDice(), path=work)
    if DEVICE=='cuda': learn.to_bf16()
    cbs = make()
    learn.paired_batch.passes = 1 if name=='the paper' else 2
    return learn,cbs

def open_store():
    folder = os.environ.get('FASTMISEG_SLICES')
    return (Packed(folder),'on the recipe’s grid') if folder else (Discs(),'of discs')

def train(name):
    store,what = open_store()
    work = OUT/'trainings'/f"{name.replace(' ', '_')}-{SEED}-{STEPS}"
    work.mkdir(parents=True, exist_ok=True)
    learn,cbs = learner(name, work, store)
    begun = time.perf_counter()
    with learn.no_bar(), learn.no_logging(), suppress(TimeIsUp):
        learn.fit(STEPS//EPOCH, 1e-3 if not DRY else 1e-2,
                  cbs=[schedule(1e-3), *cbs, ResumeCallback(work/'run', every=10**6), Log(name),
                       until:=Deadline()])
    if DEVICE=='cuda': torch.cuda.synchronize()
    seconds = time.perf_counter()-begun
    steps = learn.train_iter # also where an earlier call has made them all
    here = steps-(steps if (first:=until.of_this_call.first) is None else first)
    print(f'{name}: {steps} of {STEPS} steps, {here} of them in {seconds:.0f} s', flush=True)
    score(learn, cbs, store, what, dict(method=name, seed=SEED, steps=steps, planned=STEPS),
          dict(seconds=round(seconds, 1), steps_a_second=round(here/seconds, 1)))
    if steps==STEPS: shutil.rmtree(work)

def score(learn, cbs, store, what, of, took):
    "Dice and HD95 of the test scans, by the student and by its teacher"
    test = loaders(store, ('labeled','test'), augment=False, device=DEVICE).valid
    teacher,scores = next((o for o in cbs if isinstance(o, EMATeacherCallback)), None),[]
    for who in ['student']+['teacher']*(teacher is not None):
        if who=='teacher': teacher.to_model(learn.model)
        row = {'method':of['method'], 'who':who, **of}
        found = []
        for metric in (VolumeDice(), VolumeHD95()):
            try:
                learn.metrics = [metric]
                with learn.no_bar(), learn.no_logging(): learn.validate(dl=test)
                found.append(metric.to_frame())
                mean = found[-1].groupby('class')[metric.base].mean()
                add('train', table=f"{metric.base} of the test scans, {what}", **row,
                    mean=round(float(metric.value), 4),
                    **{k:round(float(v), 4) for k,v in mean.items()}, **took)
                print({**row, metric.base:float(metric.value)}, flush=True)
            except Exception as e:
                traceback.print_exc(limit=3)
                add('train', table='Failures', method=of['method'], seed=SEED, who=who,
                    error=f'{metric.base}: {type(e).__name__}: {e}'[:300])
        if found:
            distances = {found[1].columns[-1]: found[1].iloc[:,-1]} if len(found)>1 else {}
            scores.append(found[0].assign(**distances, **row))
    file = OUT/'scores.csv'
    if scores: pd.concat(scores).to_csv(file, mode='a', header=not file.exists(), index=False)

def steps_for(seconds, names):
    """How many steps all methods can make together, by the milliseconds of their steps: the device is
    shared, the host is not"""
    ms = {o['method']:o for o in rows(OUT, 'step') if o.get('table')=='Steps' and 'busy_ms' in o}
    paces = [ms.get(AS_MEASURED.get(k, k)) for k in names]
    if None in paces: return 2*EPOCH if DRY else 2100
    one = max(1.15*sum(o['busy_ms'] for o in paces), 1.4*max(o['ms'] for o in paces))/1000
    return max(EPOCH, min(2*EPOCH if DRY else 6000, int(seconds/one)//EPOCH*EPOCH))

def planned(names):
    "How many steps each training makes: as asked, as in an earlier call, or as the time allows"
    if STEPS: return STEPS//EPOCH*EPOCH
    if plans:=[o for o in rows(OUT, 'train') if o.get('table')=='Plan']: return plans[-1]['steps']
    steps = steps_for(min(UNTIL-time.time(), 10**5)-TO_START, names)
    add('train', table='Plan', steps=steps)
    return steps

def done(name, steps):
    file = OUT/'scores.csv'
    if not file.exists(): return False
    d = pd.read_csv(file)
    return bool(((d.method==name) & (d.seed==SEED) & (d.steps==steps)).any())

def main():
    if not DRY and 'FASTMISEG_SLICES' not in os.environ:
        sys.exit('gpu_train.py: there are no slices to train on; `make gpu-carry` makes a folder gpu-carry with '
                 'them, or FASTMISEG_SLICES names the folder that gpu_slices.py has written')
    names = os.environ['METHODS'].split(',') if 'METHODS' in os.environ else list(METHODS)
    if UNTIL-time.time()<TO_START:
        print('too little time to train and score')
        sys.exit(UNFINISHED)
    steps = planned(names)
    env = {**os.environ, 'STEPS':str(steps)}
    running = {k: subprocess.Popen([sys.executable, __file__, k], env=env) for k in names if not done(k, steps)}
    print(f'{steps} steps of {", ".join(running)}', flush=True)
    failed = {k:p.returncode for k,p in running.items() if p.wait()}
    for k,status in failed.items():
        add('train', table='Failures', method=k, seed=SEED, error=f'exit {status}, see log-train.txt')
    sys.exit(1 if failed else 0 if all(done(k, steps) for k in names) else UNFINISHED)

if __name__=='__main__': train(sys.argv[1]) if len(sys.argv)>1 else main()

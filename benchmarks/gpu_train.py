"""Trainings at the paper's size, several in processes of their own on the one device; curves and scores
as they go (a part of `gpu.sh`).

Slices from FASTMISEG_SLICES (see gpu_slices.py), else discs on noise. SECONDS_TO_TRAIN (none): a short
run of each method says how many steps are made in that time, the same for all; a training that is
still not done then stops, and is scored as it is. It goes on from its last epoch in another call with
the same OUT and STEPS, and so does one that was lost with its machine.
STEPS (6000, or what SECONDS_TO_TRAIN allows), METHODS (names, separated by commas; all),
PROCESSES (4), SEED (0).
"""
import json, os, subprocess, sys, time, traceback
from contextlib import suppress
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
from gpu import DEVICE, DRY, OUT, add
from gpu_slices import Discs, Packed, loaders

STEPS = int(os.environ.get('STEPS', 8 if DRY else 6000))
SEED = int(os.environ.get('SEED', 0))
PROCESSES = int(os.environ.get('PROCESSES', 1 if DRY else 4))
LIMIT = float(os.environ.get('SECONDS_TO_TRAIN', 0))
SHARE = float(os.environ.get('SHARE', 1)) # of the device that is theirs
UNTIL = float(os.environ.get('UNTIL', 'inf')) # seconds since 1970
EPOCH = min(STEPS, 4 if DRY else 300)
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

def schedule(lr, div=400., warm=.1):
    "Linear warm-up and a cosine, as in the paper"
    return ParamScheduler({'lr': combine_scheds([warm, 1-warm], [SchedLin(lr/div, lr), SchedCos(lr, 0.)])})

class Log(Callback):
    "A line of the curve after each epoch"
    order = ResumeCallback.order+1
    def __init__(self, method): self.method,self.begun = method,time.perf_counter()
    def after_epoch(self):
        row = dict(zip(self.recorder.metric_names[1:], self.recorder.values[-1]))
        row = dict(method=self.method, seed=SEED, step=(self.epoch+1)*EPOCH,
                   seconds=round(time.perf_counter()-self.begun, 1),
                   **{k:round(float(v), 5) for k,v in row.items() if k!='time'})
        with open(OUT/'curves.jsonl', 'a') as f: f.write(json.dumps(row)+'\n')

class TimeIsUp(Exception): "For `ResumeCallback` a training that was interrupted, not one that is finished"

class Deadline(Callback):
    "Stops when the time is over"
    order = ResumeCallback.order-1
    steps = 0
    def after_batch(self):
        if not self.training: return
        self.steps = self.train_iter
        if time.time()>UNTIL: raise TimeIsUp('UNTIL')

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
    work = OUT/'work'/f"{name.replace(' ', '_')}-{SEED}-{STEPS}"
    work.mkdir(parents=True, exist_ok=True)
    learn,cbs = learner(name, work, store)
    begun = time.perf_counter()
    with learn.no_bar(), learn.no_logging(), suppress(TimeIsUp):
        learn.fit(STEPS//EPOCH, 1e-3 if not DRY else 1e-2,
                  cbs=[schedule(1e-3), *cbs, ResumeCallback(work/'run', every=10**6), Log(name),
                       until:=Deadline()])
    if DEVICE=='cuda': torch.cuda.synchronize()
    seconds = time.perf_counter()-begun
    print(f'{name}: {until.steps} of {STEPS} steps in {seconds:.0f} s', flush=True)
    test = loaders(store, ('labeled','test'), augment=False, device=DEVICE).valid
    teacher,scores = next((o for o in cbs if isinstance(o, EMATeacherCallback)), None),[]
    for who in ['student']+['teacher']*(teacher is not None):
        if who=='teacher': teacher.to_model(learn.model)
        row = dict(method=name, who=who, seed=SEED, steps=until.steps, planned=STEPS)
        found = []
        for metric in (VolumeDice(), VolumeHD95()):
            try:
                learn.metrics = [metric]
                with learn.no_bar(), learn.no_logging(): learn.validate(dl=test)
                found.append(metric.to_frame())
                mean = found[-1].groupby('class')[metric.base].mean()
                add('train', table=f"{metric.base} of the test scans, {what}", **row,
                    mean=round(float(metric.value), 4),
                    **{k:round(float(v), 4) for k,v in mean.items()},
                    seconds=round(seconds, 1), steps_a_second=round(until.steps/seconds, 1))
                print({**row, metric.base:float(metric.value)}, flush=True)
            except Exception as e:
                traceback.print_exc(limit=3)
                add('train', table='Failures', method=name, who=who,
                    error=f'{metric.base}: {type(e).__name__}: {e}'[:300])
        if found:
            distances = {found[1].columns[-1]: found[1].iloc[:,-1]} if len(found)>1 else {}
            scores.append(found[0].assign(**distances, **row))
    file = OUT/'scores.csv'
    if scores: pd.concat(scores).to_csv(file, mode='a', header=not file.exists(), index=False)

def pace(names):
    "Milliseconds in which the device is busy, and in all, of a step of each method, from a few steps"
    from gpu_step import launches
    store,_ = open_store()
    res = {}
    for k in names:
        learn,cbs = learner(k, OUT/'work', store)
        learn.dls.train.n_iters,learn.metrics = 6,[]
        with learn.no_bar(), learn.no_logging():
            learn.add_cbs(cbs)
            learn.fit(1, 1e-4)
            _,busy,_ = launches(learn, 3)
            learn.dls.train.n_iters = 12
            class Time(Callback):
                def before_train(self): self.begun = time.perf_counter()
                def after_train(self):
                    if DEVICE=='cuda': torch.cuda.synchronize()
                    self.took = time.perf_counter()-self.begun
            learn.fit(1, 1e-4, cbs=(clock:=Time()))
        res[k] = busy,1000*clock.took/12
    return res

def steps_for(seconds, paces, most=6000):
    "How many steps all methods can make together: the device is shared, the host is not"
    one = max(1.15*sum(b for b,_ in paces.values()), 1.4*max(t for _,t in paces.values()))/1000
    return max(EPOCH, min(most, int(seconds/one)//EPOCH*EPOCH))

def done(name):
    file = OUT/'scores.csv'
    if not file.exists(): return False
    d = pd.read_csv(file)
    return bool(((d.method==name) & (d.seed==SEED) & (d.steps==STEPS)).any())

def main():
    global STEPS
    names = os.environ['METHODS'].split(',') if 'METHODS' in os.environ else list(METHODS)
    env,begun = dict(os.environ),time.time()
    if LIMIT:
        env['UNTIL'] = str(begun+LIMIT)
        if 'STEPS' not in os.environ:
            try:
                paces = pace(names)
                for k,(busy,ms) in paces.items():
                    add('train', table='Pace alone', method=k, busy_ms=round(busy, 2), ms=round(ms, 2))
                # methods with such long steps would leave no time for the others
                slow = [k for k in paces if paces[k][0]>60]
                names = [k for k in names if k not in slow] or names
                STEPS = steps_for(SHARE*(begun+LIMIT-time.time()-8), {k:paces[k] for k in names})
                print(f'pace {paces}, left out {slow}, {STEPS} steps', flush=True)
            except Exception:
                traceback.print_exc()
                STEPS = 2100
        env['STEPS'] = str(STEPS)
    todo,running,bad = [k for k in names if not done(k)],{},0
    while todo or running:
        while todo and len(running)<PROCESSES:
            name = todo.pop(0)
            running[name] = subprocess.Popen([sys.executable, __file__, name], env=env)
        for k,p in list(running.items()):
            if p.poll() is not None:
                running.pop(k)
                if p.returncode:
                    bad += 1
                    add('train', table='Failures', method=k, error=f'exit {p.returncode}, see log.txt')
        time.sleep(.2)
    sys.exit(bad>0)

if __name__=='__main__': train(sys.argv[1]) if len(sys.argv)>1 else main()

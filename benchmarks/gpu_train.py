"""Trainings at the paper's size, several in processes of their own on the one device; curves and scores as they go (a part of `gpu.sh`).

Slices from FASTMISEG_SLICES (see gpu_slices.py), else discs on noise. A training that was cut off goes on from its checkpoint in OUT/work.
STEPS (6000), METHODS (names, separated by commas; all), PROCESSES (2), SEED (0).
"""
import json, os, subprocess, sys, time, traceback
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, torch
from fastai.basics import Callback, set_seed
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin, combine_scheds
from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.resume import ResumeCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.learner import miseg_learner
from fastmiseg.metrics import VolumeDice
from fastmiseg.transforms import RandomFlips, RandomLight, RandomShifts
from gpu import DEVICE, DRY, OUT, add
from gpu_slices import Discs, Packed, loaders

STEPS = int(os.environ.get('STEPS', 8 if DRY else 6000))
SEED = int(os.environ.get('SEED', 0))
PROCESSES = int(os.environ.get('PROCESSES', 1 if DRY else 3))
EPOCH = min(STEPS, 4 if DRY else 300)
WIDTH = 4 if DRY else 16

_small = dict(global_weight=.0003, local_weight=.1)
METHODS = { # callbacks, T
    'labels only':         (lambda: [], None),
    'Mean Teacher':        (lambda: [EMATeacherCallback(weight=5.)], None),
    'the paper':           (lambda: [MIRegCallback()], None),
    'recommended':         (lambda: [MIRegCallback(**_small, consistency_weight=0.), EMATeacherCallback(weight=5.)], RandomFlips()+RandomLight(.5)+RandomShifts(.5)),
}
if DRY: METHODS = {'recommended': METHODS['recommended']}

def schedule(lr, div=400., warm=.1):
    "Linear warm-up and a cosine, as in the paper"
    return ParamScheduler({'lr': combine_scheds([warm, 1-warm], [SchedLin(lr/div, lr), SchedCos(lr, 0.)])})

class Log(Callback):
    "A line of the curve after each epoch"
    order = ResumeCallback.order+1
    def __init__(self, method): self.method,self.begun = method,time.perf_counter()
    def after_epoch(self):
        row = dict(zip(self.recorder.metric_names[1:], self.recorder.values[-1]))
        row = dict(method=self.method, seed=SEED, step=(self.epoch+1)*EPOCH, seconds=round(time.perf_counter()-self.begun, 1), **{k:round(float(v), 5) for k,v in row.items() if k!='time'})
        with open(OUT/'curves.jsonl', 'a') as f: f.write(json.dumps(row)+'\n')

def train(name):
    folder = os.environ.get('FASTMISEG_SLICES')
    store = Packed(folder) if folder else Discs()
    make,T = METHODS[name]
    work = OUT/'work'/f"{name.replace(' ', '_')}-{SEED}-{STEPS}"
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision('high')
    parts = ('labeled','valid',('unlabeled',)) if make() else ('labeled','valid')
    dls = loaders(store, parts, n_iters=EPOCH, seed=SEED, device=DEVICE, **(dict(bs=2, unlabeled_bs=3) if DRY else {}))
    set_seed(SEED)
    learn = miseg_learner(dls, width=WIDTH, metrics=VolumeDice(), path=work)
    if DEVICE=='cuda': learn.to_bf16()
    begun = time.perf_counter()
    cbs = make()
    for cb in cbs: cb.T = T
    with learn.no_bar(), learn.no_logging():
        learn.fit(STEPS//EPOCH, 1e-3 if not DRY else 1e-2, cbs=[schedule(1e-3), *cbs, ResumeCallback(work/'run', every=10**6), Log(name)])
    if DEVICE=='cuda': torch.cuda.synchronize()
    seconds = time.perf_counter()-begun
    test = loaders(store, ('labeled','test'), augment=False, device=DEVICE).valid
    scores = []
    for who in ['student']+['teacher']*any(isinstance(o, EMATeacherCallback) for o in cbs):
        if who=='teacher': next(o for o in cbs if isinstance(o, EMATeacherCallback)).to_model(learn.model)
        learn.metrics = [dice:=VolumeDice()]
        with learn.no_bar(), learn.no_logging(): learn.validate(dl=test)
        scores.append(dice.to_frame().assign(method=name, who=who, seed=SEED, steps=STEPS))
        mean = scores[-1].groupby('class').dice.mean()
        row = dict(method=name, who=who, seed=SEED, steps=STEPS, test_dice=round(float(dice.value), 4), **{k:round(float(v), 4) for k,v in mean.items()}, seconds=round(seconds, 1), steps_a_second=round(STEPS/seconds, 1))
        add('train', table=f"Dice of the test scans, {'on the recipe’s grid' if folder else 'of discs'}", **row)
        print(row, flush=True)
    file = OUT/'scores.csv'
    pd.concat(scores).to_csv(file, mode='a', header=not file.exists(), index=False)

def done(name):
    file = OUT/'scores.csv'
    if not file.exists(): return False
    d = pd.read_csv(file)
    return bool(((d.method==name) & (d.seed==SEED) & (d.steps==STEPS)).any())

def main():
    todo = [k for k in (os.environ['METHODS'].split(',') if 'METHODS' in os.environ else METHODS) if not done(k)]
    running,bad = {},0
    while todo or running:
        while todo and len(running)<PROCESSES:
            name = todo.pop(0)
            running[name] = subprocess.Popen([sys.executable, __file__, name])
        for k,p in list(running.items()):
            if p.poll() is not None:
                running.pop(k)
                if p.returncode:
                    bad += 1
                    add('train', table='Failures', method=k, error=f'exit {p.returncode}, see log.txt')
        time.sleep(.2)
    sys.exit(bad>0)

if __name__=='__main__': train(sys.argv[1]) if len(sys.argv)>1 else main()

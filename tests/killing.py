"""Trains each method whole, and again in processes that are killed with SIGKILL at random steps and started again;
both results are written. KILL_SEED=number draws the steps of an earlier run"""
import os, random, signal, sys, time, traceback, warnings; warnings.filterwarnings('ignore')
from pathlib import Path
import numpy as np, torch
from torch import nn, tensor
from fastai.basics import Callback, Datasets, set_seed
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.vision.core import TensorImage, TensorMask
from fastmiseg.callback.baselines import ConsistencyCallback, EntropyMinCallback
from fastmiseg.callback.resume import ResumeCallback
from fastmiseg.callback.state import checkpoints, load_state
from fastmiseg.callback.teacher import EMATeacherCallback
from toy import SemiSupCallback, UNet, disc, learner, loaders, quiet, small_mireg

EPOCHS,STEPS,KILLS = 3,4,3

class Noise(nn.Module):
    "Takes random numbers from PyTorch, NumPy and Python at each step"
    def __init__(self): super().__init__(); self.net = UNet(1,2,width=2)
    def forward(self, x):
        if self.training: x = x + .01*torch.randn_like(x) + np.random.rand()*.01 + random.random()*.01
        return self.net(x)

def plain_loaders():
    "fastai's own shuffled loader, with random numbers in its items"
    ds = Datasets(list(range(14)),
                  tfms=[[lambda i: TensorImage(disc(i)[0]+random.random()*.1)], [lambda i: TensorMask(disc(i)[1])]],
                  splits=[range(10),range(10,14)])
    return ds.dataloaders(bs=2, num_workers=0)

METHODS = dict(
    partial=lambda: [],
    consistency=lambda: [ConsistencyCallback()],
    entropy=lambda: [EntropyMinCallback(.1)],
    teacher=lambda: [EMATeacherCallback(decay=.9)],
    mireg=lambda: [small_mireg()],
    both=lambda: [small_mireg(), EMATeacherCallback(decay=.9)],
    accumulated=lambda: [small_mireg(), GradientAccumulation(4)],
    # gradients are left at an epoch's end
    accumulated_across=lambda: [small_mireg(), EMATeacherCallback(decay=.9), GradientAccumulation(4)],
    tracked=lambda: [small_mireg(), SaveModelCallback(), EarlyStoppingCallback(patience=2), CSVLogger()],
    files=lambda: [small_mireg(unlabeled=list(range(9,16)))],
    torch_loader=lambda: [ConsistencyCallback(unlabeled=torch.utils.data.DataLoader(
        [disc(i)[0] for i in range(9,16)], batch_size=3, shuffle=True))])

def steps(method): return EPOCHS*(5 if method in ('files','torch_loader','accumulated_across') else STEPS)

def train(method, folder, log):
    """A whole training; the number of each step is written to `log`. Where there is something to go on from, it begins
    with other weights and random numbers"""
    seed = os.getpid() if checkpoints(folder/'ckpt') else 0 # a file that was half written is none
    class Tick(Callback):
        order = 80
        def after_batch(self):
            if self.training: os.write(log, bytes([self.train_iter]))
    set_seed(seed)
    dls = plain_loaders() if method in ('files','torch_loader') else loaders(n_iters=steps(method)//EPOCHS)
    learn = quiet(learner(folder, net=Noise, seed=seed, dls=dls))
    cbs = METHODS[method]()
    every = {'partial':3, 'accumulated_across':100}.get(method, 1)
    learn.fit_one_cycle(EPOCHS, 1e-2, cbs=[*cbs, Tick(), ResumeCallback(folder/'ckpt', every=every)])
    res = dict(model=learn.model.state_dict(), losses=torch.stack(list(learn.recorder.losses)),
               lrs=tensor(learn.recorder.lrs, dtype=torch.float64),
               values=tensor(learn.recorder.values))
    for i,cb in enumerate(cbs):
        if isinstance(cb, SemiSupCallback): res[f'cb{i}'] = cb.state_dict()
    torch.save(res, folder/'result.tmp'); os.replace(folder/'result.tmp', folder/'result.pt')

def child(method, folder, kill=False):
    "A process that trains, forked from this one; one that will be killed waits for it in the end"
    r,w = os.pipe()
    if pid:=os.fork(): os.close(w); return pid,r
    try:
        os.close(r)
        sys.stdout = sys.stderr = open(folder/'out.txt', 'a')
        torch.set_num_threads(1)
        train(method, folder, w)
        if kill: os.write(w, bytes([255])); signal.pause()
        os._exit(0)
    except BaseException:
        traceback.print_exc(); sys.stderr.flush()
        os._exit(1)

def finish(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def kill_and_call_again(method, root, rng):
    "Returns what went wrong, or nothing"
    whole,cut = root/method/'whole',root/method/'cut'
    for o in (whole, cut): o.mkdir(parents=True)
    pid,r = child(method, whole)
    if finish(pid): return (whole/'out.txt').read_text()
    os.close(r)
    stops = sorted(rng.sample(range(1, steps(method)+1), KILLS))
    print(method, 'is killed after steps', stops, flush=True)
    for stop in stops:
        pid,r = child(method, cut, kill=True)
        while (step:=os.read(r, 1)) and step[0]<stop: pass
        time.sleep(rng.random()*.02) # perhaps into the writing of a file
        os.kill(pid, signal.SIGKILL)
        os.close(r)
        if finish(pid)!=-signal.SIGKILL: return (cut/'out.txt').read_text()
        for f in checkpoints(cut/'ckpt'): load_state(f)
    pid,_ = child(method, cut)
    if finish(pid): return (cut/'out.txt').read_text()

if __name__=='__main__': # forking is cheap where nothing has been trained yet
    torch.set_num_threads(1)
    seed = int(os.environ.get('KILL_SEED') or random.SystemRandom().randrange(10**6))
    print(f'KILL_SEED={seed}')
    for method in METHODS:
        if err:=kill_and_call_again(method, Path(sys.argv[1]), random.Random(f'{seed} {method}')):
            print(method, err, sep='\n')
            sys.exit(1)

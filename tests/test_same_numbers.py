"""Three steps of each method with three seeds give the numbers that they gave before the step was rebuilt.

`same_numbers.json` was written by the earlier code (a batch fixed as labelled, unlabelled and transformed images):
losses of each step, digests of the weights of network, heads and teacher, and the log's last line, as hexadecimal
floats. With the PyTorch, the vector instructions and the maker of processors that it was written with they are the same
to the bit, elsewhere to rounding.
"""
import hashlib, json, platform
from pathlib import Path
import numpy as np, pytest, torch
from fastai.basics import Callback
from fastmiseg.callback.baselines import ConsistencyCallback, EntropyMinCallback
from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.transforms import RandomFlips, RandomLight, RandomShifts
from toy import learner, loaders, quiet

before = json.loads((Path(__file__).parent/'same_numbers.json').read_text())

def vendor():
    "GenuineIntel, AuthenticAMD, ...: MKL and oneDNN choose by it what they compute with"
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    return next((o.split(':')[1].strip() for o in lines if o.startswith('vendor_id')), platform.processor())

here = dict(torch=torch.__version__, capability=torch.backends.cpu.get_cpu_capability(), vendor=vendor())

def mireg(**kw): return MIRegCallback.paper(n_clusters=4, n_heads=2, **kw)
METHODS = {
    'partial': lambda: [],
    'consistency': lambda: [ConsistencyCallback(5., T=RandomFlips())],
    'entropy': lambda: [EntropyMinCallback()],
    'teacher': lambda: [EMATeacherCallback(.9, 5., T=RandomFlips())],
    'mireg': lambda: [mireg()],
    'mireg_teacher': lambda: [mireg(), EMATeacherCallback(.9)],
    'mireg_shift': lambda: [mireg(T=RandomFlips()+RandomLight(.5)+RandomShifts(.5))],
    'mi': lambda: [mireg(consistency_weight=0.)]}

class Losses(Callback):
    order = 100
    def before_fit(self): self.seen = []
    def after_loss(self):
        if self.training: self.seen.append(float(self.loss_grad))

def digest(tensors):
    h = hashlib.blake2b(digest_size=8)
    for t in tensors: h.update(t.detach().contiguous().numpy().tobytes())
    return h.hexdigest()

@pytest.mark.parametrize('run', before['runs'])
def test_same_numbers(tmp_path, run):
    name,seed = run.rsplit('-', 1)
    cbs,losses = METHODS[name](),Losses()
    learn = quiet(learner(tmp_path, seed=int(seed), width=4, dls=loaders(size=32, n_iters=3, seed=int(seed))))
    torch.manual_seed(int(seed))
    learn.fit_one_cycle(1, 1e-2, cbs=[*cbs, losses])
    want,log = before['runs'][run],list(map(float, learn.recorder.values[-1]))
    floats = lambda hexes: list(map(float.fromhex, hexes))
    heads = [p for cb in cbs if cb.projectors is not None for p in cb.projectors.parameters()]
    average = next((list(cb.average.tensors.values()) for cb in cbs if isinstance(cb, EMATeacherCallback)), [])
    if all(before[k]==o for k,o in here.items()):
        assert (losses.seen, log)==(floats(want['losses']), floats(want['log']))
        found = [digest(o) for o in (learn.model.state_dict().values(), heads, average)]
        assert found==[want[k] for k in ('weights','heads','teacher')]
    else:
        np.testing.assert_allclose(losses.seen, floats(want['losses']), rtol=1e-3)
        np.testing.assert_allclose(log, floats(want['log']), rtol=1e-2)

"""On a CUDA device: right to the last digit where that can be asked for, the same as on the CPU elsewhere, and
without waiting.

`FASTMISEG_DEVICE=cpu pytest -m cuda tests/test_cuda.py` runs what makes sense on a CPU, so that the tests cannot rot.
"""
import os, subprocess, sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from fastai.basics import Callback, SGD, load_learner, set_seed
from fastmiseg.callback.baselines import ConsistencyCallback, EntropyMinCallback
from fastmiseg.callback.copypaste import CopyPasteCallback, largest_pieces
from fastmiseg.callback.pseudo import PseudoLabelCallback
from fastmiseg.callback.resume import ResumeCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.inference import _probabilities
from fastmiseg.learner import miseg_learner
from fastmiseg.metrics import VolumeDice, VolumePrecision, VolumeSensitivity
from fastmiseg.models import UNet, create_unet
from fastmiseg.mutual_info import consistency_loss, entropy_loss, global_mi_loss, local_mi_loss
from fastmiseg.projectors import GlobalProjector, LocalProjector
from fastmiseg.warps import usual_pool
from toy import balanced_mireg, hooks, learner, loaders, quiet, small_mireg

DEVICE = os.environ.get('FASTMISEG_DEVICE', 'cuda')
pytestmark = [pytest.mark.cuda,
              pytest.mark.skipif(DEVICE=='cuda' and not torch.cuda.is_available(), reason='needs a CUDA device')]
only_cuda = pytest.mark.skipif(DEVICE!='cuda', reason='means nothing on a CPU')

METHODS = {
    'labels only': lambda: [],
    'entropy': lambda: [EntropyMinCallback(.1)],
    'consistency': lambda: [ConsistencyCallback()],
    'teacher': lambda: [EMATeacherCallback()],
    'mi': lambda: [small_mireg()],
    'balanced mi': lambda: [balanced_mireg(T=usual_pool())],
    'mi and teacher': lambda: [small_mireg(), EMATeacherCallback()],
    'pseudo-labels': lambda: [PseudoLabelCallback(threshold=.5, dropped=.5), EMATeacherCallback(.9)],
    # not the largest piece alone: which one that is hangs on a pixel
    'copy-paste': lambda: [CopyPasteCallback(largest=False), EMATeacherCallback(.9)]}
methods = pytest.mark.parametrize('method', METHODS)

@pytest.fixture(autouse=True)
def precise():
    "Plain float32 unless a test says otherwise; what a test sets does not last"
    before = torch.get_float32_matmul_precision(),torch.backends.cudnn.allow_tf32,torch.backends.cudnn.deterministic
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32,torch.backends.cudnn.deterministic = False,True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32,torch.backends.cudnn.deterministic = before[1:]

def far(a, b):
    "‖a-b‖/‖b‖"
    a,b = (o.detach().as_subclass(torch.Tensor).double().cpu() for o in (a,b))
    return float((a-b).norm()/b.norm())

# losses and gradients
def soft(*shape): return torch.randn(*shape, dtype=torch.float64).softmax(2)

def function(loss, *shapes):
    "A loss of probabilities and random ones to go with it"
    return lambda: (lambda *x: loss(*x), [soft(*o) for o in shapes])

def head(kind, loss_args, C=24, size=(20,20)):
    def make():
        module = kind(C, n_clusters=10, n_heads=3).double()
        return ((lambda f,g: module.to(f.device, torch.float64 if f.dtype==torch.float64 else torch.float32)
                                   .loss(f, g, **loss_args)),
                [torch.randn(5,C,*size, dtype=torch.float64) for _ in range(2)])
    return make

LOSSES = {
    'global_mi_loss': function(global_mi_loss, (9,3,10), (9,3,10)),
    'local_mi_loss 3': function(partial(local_mi_loss, size=3), (5,2,10,24,24), (5,2,10,24,24)),
    'local_mi_loss 7': function(partial(local_mi_loss, size=7), (5,2,10,24,24), (5,2,10,24,24)),
    'local_mi_loss in 3D': function(partial(local_mi_loss, size=3), (2,2,6,8,12,12), (2,2,6,8,12,12)),
    'consistency_loss': lambda: (lambda p,q: consistency_loss(p, q),
                                 [torch.randn(5,4,24,24, dtype=torch.float64).softmax(1) for _ in range(2)]),
    'entropy_loss': lambda: (lambda p: entropy_loss(p), [torch.randn(5,4,24,24, dtype=torch.float64).softmax(1)]),
    'GlobalProjector': head(GlobalProjector, {}),
    'LocalProjector 3': head(LocalProjector, dict(size=3)),
    'LocalProjector 7': head(LocalProjector, dict(size=7))}

WAYS = dict(plain=(torch.float32,False,False), last=(torch.float32,False,True), tf32=(torch.float32,True,True),
            fp16=(torch.float16,True,False), bf16=(torch.bfloat16,True,True))

@pytest.mark.parametrize('how', WAYS)
@pytest.mark.parametrize('name', LOSSES)
def test_losses(name, how):
    "Value and gradients against float64 on the CPU, whatever precision and layout the network around them works in"
    dtype,tf32,channels_last = WAYS[how]
    if tf32:
        torch.set_float32_matmul_precision('high')
        torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    loss,xs = LOSSES[name]()
    xs = [o.to(dtype) for o in xs]
    if channels_last: xs = [o.contiguous(memory_format=torch.channels_last) if o.ndim==4 else o for o in xs]
    def run(device, to, mixed):
        ins = [o.to(device, to).requires_grad_() for o in xs]
        with torch.autocast(device, dtype=dtype) if mixed else nullcontext(): value = loss(*ins)
        # as a gradient scaler does, for small gradients become 0 in this type
        scale = 2**12 if dtype==torch.float16 else 1
        return value, *torch.autograd.grad(value*scale, ins, allow_unused=True)
    want = run('cpu', torch.float64, False)
    got = run(DEVICE, dtype, dtype!=torch.float32)
    assert got[0].dtype==torch.float32 and got[0].device.type==DEVICE
    assert far(got[0], want[0])<1e-5
    # of the gradient, which comes in the type of its input;
    # 4e-5 is what centring leaves in float32 near uniform distributions
    rounding = {torch.float32:4e-5, torch.float16:2e-3, torch.bfloat16:1e-2}[dtype]
    for a,b in zip(got[1:], want[1:]):
        assert (a is None)==(b is None)
        if a is not None: assert a.dtype==dtype and far(a, b)<rounding

# training
class Keep(Callback):
    "Losses of all steps, on their device"
    def before_fit(self): self.losses = []
    def after_loss(self):
        if self.training:
            self.losses.append((self.learn.loss_grad if hasattr(self.learn, 'loss_grad') else self.learn.loss).detach())

def train(path, device, method, epochs=2, cbs=(), **kw):
    """A short training in which rounding stays rounding: plain SGD, no dropout, more than one pixel in the deepest
    maps, and a small step (with 1e-2 and maps of one pixel, weights that are changed by 3e-7 change the eighth loss
    by 6 %)"""
    dls = loaders(device=device, size=32, bs=4)
    learn = quiet(learner(path, width=4, dls=dls, opt_func=partial(SGD, mom=.9), **kw))
    cbs = [*METHODS[method](), keep:=Keep(), *cbs]
    learn.fit(epochs, 2e-4, cbs=cbs)
    learn.steps = torch.stack(keep.losses).cpu()
    return learn

@methods
def test_training_is_that_of_the_cpu(tmp_path, method):
    "The same batches, transformations and weights: eight steps on the device end where eight on the CPU do"
    here,there = (train(tmp_path, d, method) for d in (DEVICE,'cpu'))
    assert next(here.model.parameters()).device.type==DEVICE and hooks(here.model)==0
    assert here.recorder.metric_names==there.recorder.metric_names
    torch.testing.assert_close(here.steps, there.steps, rtol=2e-4, atol=1e-5)
    for (n,a),b in zip(here.model.state_dict().items(), there.model.state_dict().values()):
        torch.testing.assert_close(a.cpu().float(), b.float(), rtol=5e-3, atol=5e-4, msg=lambda m: f'{n}: {m}')

@methods
@pytest.mark.parametrize('precision', [
    'fp32', pytest.param('fp16', marks=only_cuda), pytest.param('bf16', marks=only_cuda)])
@pytest.mark.parametrize('layout', ['plain','channels last'])
def test_precision(tmp_path, method, precision, layout):
    """fastai's mixed precision, both layouts: every logged number is finite, and the losses are near those of plain
    float32"""
    def run(how):
        net = create_unet('unet', n_in=1, n_out=2, width=4) if layout=='channels last' else UNet(1,2,width=4)
        set_seed(0)
        for m in net.modules():
            if hasattr(m, 'reset_parameters'): m.reset_parameters()
        learn = quiet(learner(tmp_path, net=net, dls=loaders(device=DEVICE), opt_func=SGD))
        if how!='fp32': getattr(learn, f'to_{how}')()
        learn.fit(2, 1e-3, cbs=[*METHODS[method](), keep:=Keep()])
        assert np.isfinite(np.array([float(o) for o in learn.recorder.values[-1]])).all()
        assert {p.dtype for p in learn.model.parameters()}=={torch.float32}
        return torch.stack(keep.losses).cpu()
    torch.testing.assert_close(run(precision), run('fp32'), rtol=.05, atol=.02)

@methods
def test_lr_find(tmp_path, method):
    "The search leaves weights, optimiser and batches as they were, on the device too"
    learn = quiet(learner(tmp_path, dls=loaders(device=DEVICE)))
    learn.add_cbs(METHODS[method]())
    before = {k:o.clone() for k,o in learn.model.state_dict().items()}
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=12)
    for k,o in learn.model.state_dict().items(): assert torch.equal(o.cpu(), before[k].cpu()), k
    learn.fit(1, 1e-3)

class Stop(Callback):
    order = ResumeCallback.order+1
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.train_iter==self.at: raise KeyboardInterrupt

@methods
@pytest.mark.parametrize('there', ['device','cpu'])
def test_resume(tmp_path, method, there):
    "Interrupted in the second epoch on the device, continued there or on the CPU: weights as if undisturbed"
    there = DEVICE if there=='device' else 'cpu'
    whole = train(tmp_path, DEVICE, method)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, DEVICE, method, cbs=[ResumeCallback(tmp_path/'run', every=1), Stop(6)])
    rest = train(tmp_path, there, method, cbs=[ResumeCallback(tmp_path/'run', every=1)], seed=1)
    assert len(rest.steps)==2
    torch.testing.assert_close(rest.steps, whole.steps[6:], rtol=1e-3, atol=1e-5)
    for (n,a),b in zip(rest.model.state_dict().items(), whole.model.state_dict().values()):
        torch.testing.assert_close(a.cpu().float(), b.cpu().float(), rtol=5e-3, atol=5e-4, msg=lambda m: f'{n}: {m}')

WITHOUT = '''
import sys, warnings; warnings.filterwarnings('ignore')
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
import test_cuda as t
learn = t.train(Path(sys.argv[2]), 'cpu', sys.argv[3], cbs=[t.ResumeCallback(sys.argv[2]+'/run', every=1)], seed=1)
torch.save({k:o for k,o in learn.model.state_dict().items()}, sys.argv[2]+'/rest.pt')
'''

def test_resume_where_there_is_no_cuda(tmp_path):
    "A checkpoint of the device opens on a machine that has none"
    method = 'mi and teacher'
    whole = train(tmp_path, DEVICE, method)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, DEVICE, method, cbs=[ResumeCallback(tmp_path/'run', every=1), Stop(6)])
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES':'', 'FASTMISEG_DEVICE':'cpu'}
    res = subprocess.run([sys.executable, '-c', WITHOUT, str(Path(__file__).parent), str(tmp_path), method],
                         env=env, capture_output=True, text=True)
    assert res.returncode==0, res.stderr[-3000:]
    rest = torch.load(tmp_path/'rest.pt', weights_only=True)
    for k,o in whole.model.state_dict().items():
        torch.testing.assert_close(rest[k].float(), o.cpu().float(), rtol=5e-3, atol=5e-4, msg=lambda m: f'{k}: {m}')

@methods
def test_moved_between_devices(tmp_path, method):
    "Fitted here, then on the CPU, then here again, with the same callbacks"
    learn = quiet(learner(tmp_path, dls=loaders(device=DEVICE)))
    cbs = METHODS[method]()
    for device in (DEVICE,'cpu',DEVICE):
        learn.dls.to(torch.device(device))
        learn.model.to(device)
        learn.opt = None # fastai's optimiser keeps its averages where they were
        learn.fit(1, 1e-3, cbs=cbs)
        assert {o.device.type for o in learn.model.state_dict().values()}=={device}
        assert np.isfinite([float(o) for o in learn.recorder.values[-1]]).all()
    for cb in cbs:
        if hasattr(cb, 'to_model'): cb.to_model(learn.model)
        if getattr(cb, 'projectors', None) is not None:
            assert {p.device.type for p in cb.projectors.parameters()}=={DEVICE}

# metrics, inference, export
def test_volume_metrics_are_those_of_the_cpu(tmp_path):
    "To the last digit: counts are integers"
    g = torch.Generator().manual_seed(0)
    pred,y = torch.randn(30,4,48,48, generator=g),torch.randint(4, (30,48,48), generator=g)
    def values(device):
        metrics = [VolumeDice(), VolumeSensitivity(), VolumePrecision(), *VolumeDice.per_class(['a','b','c','d'])]
        for i in range(0, 30, 7):
            class Mask(torch.Tensor): pass
            mask = y[i:i+7].to(device).as_subclass(Mask)
            mask.scan,mask.index = torch.arange(i, min(i+7, 30))//10,torch.arange(i, min(i+7, 30))
            batch = SimpleNamespace(pred=pred[i:i+7].to(device), y=mask, dl=None, dls=None)
            for m in metrics: m.accumulate(batch)
        return [m.value for m in metrics],metrics[0].to_frame().dice.tolist()
    assert values(DEVICE)==values('cpu')

def test_validation_is_that_of_the_cpu(tmp_path):
    "VolumeDice of a learner's validation, against the CPU's count of the device's own predictions"
    learn = train(tmp_path, DEVICE, 'mi', metrics=VolumeDice())
    dice = learn.validate()[1]
    probs,y = learn.get_preds()
    cpu = VolumeDice()
    cpu.accumulate(SimpleNamespace(pred=probs.cpu(), y=y.cpu(), dl=None, dls=None))
    assert cpu.value==dice

def test_probabilities_are_those_of_the_cpu():
    "Flips and tiles of slices, without a scan"
    set_seed(0)
    net,x = UNet(1, 4, width=4),np.random.default_rng(0).random((3,1,48,64), dtype=np.float32)
    for size in (None, (32,32)):
        want,found = (_probabilities(net.to(d), x, 2, 'hv', size) for d in ('cpu',DEVICE))
        assert found.shape==(3,4,48,64)
        np.testing.assert_allclose(found, want, atol=1e-5)

def test_inference(heart):
    "Probabilities and masks of a whole scan are those of the CPU"
    from fastmiseg.evaluation import evaluate_cohort
    from fastmiseg.inference import predict_volume
    model,scan = heart.learn.model,heart.df[heart.df.split=='test'].image.iloc[0]
    home = next(model.parameters()).device
    try:
        masks,scores = [],[]
        for device in (DEVICE,'cpu'):
            model.to(device)
            masks.append(predict_volume(heart.learn, scan, flips=True).array)
            scores.append(evaluate_cohort(heart.learn, heart.df[heart.df.split=='test'], progress=False).dice)
        assert (masks[0]!=masks[1]).mean()<1e-4 # where two classes are equally likely
        np.testing.assert_allclose(*scores, atol=2e-3)
    finally: model.to(home)

def test_export(tmp_path):
    "What a learner on the device exports opens on the CPU and there, and says the same"
    learn = train(tmp_path, DEVICE, 'mi and teacher')
    x = learn.dls.valid.one_batch()[0]
    learn.model.eval()
    with torch.no_grad(): want = learn.model(x).cpu()
    learn.export(tmp_path/'net.pkl')
    for cpu in (True,False):
        model = load_learner(tmp_path/'net.pkl', cpu=cpu).model.eval()
        with torch.no_grad(): got = model(x.to(next(model.parameters()).device)).cpu()
        torch.testing.assert_close(torch.Tensor(got), torch.Tensor(want), rtol=1e-3, atol=1e-4)

# without waiting
class NobodyWaits(Callback):
    "An error wherever the host waits for the device, from the third step on to the end of the epoch's training"
    order,seen = -200,0
    def before_batch(self):
        if self.training and self.iter==2: torch.cuda.set_sync_debug_mode('error')
        self.seen += self.training and self.iter>=2
    def after_train(self): torch.cuda.set_sync_debug_mode('default')

@only_cuda
@methods
@pytest.mark.parametrize('precision', ['fp32','bf16'])
def test_nobody_waits(tmp_path, method, precision):
    """Not in the loader with its augmentation, not in the step, not in what is recorded of it; the guard alone waits
    for a copy that began before the backward pass"""
    dls = resident_loaders(n_iters=8)
    assert dls.train.one_batch()[0].is_cuda and dls.train._here
    learn = quiet(miseg_learner(dls, width=4, path=tmp_path))
    if precision=='bf16': learn.to_bf16()
    try:
        learn.fit(1, 1e-3, cbs=METHODS[method]()) # what is made once
        learn.fit(1, 1e-3, cbs=[*METHODS[method](), watch:=NobodyWaits()])
    finally: torch.cuda.set_sync_debug_mode('default')
    assert watch.seen==6
    assert all(o.device.type=='cpu' for o in learn.recorder.losses) and len(learn.recorder.losses)==8
    assert np.isfinite([float(o) for o in learn.recorder.losses]).all()

def resident_loaders(**kw):
    from test_resident import Store, loaders
    dls = loaders(Store(size=32), device=DEVICE, **kw)
    dls.c = 2
    dls.train.after_batch.fs[0].crop = (16,16)
    return dls

def test_largest_pieces():
    "The same as on the CPU, and nobody waits"
    y = torch.nn.functional.avg_pool2d(torch.randn(6,1,96,96, generator=torch.Generator().manual_seed(0)), 9, 1)[:,0]
    y = torch.bucketize(y, torch.tensor([0.,.05,.15]))
    there = y.to(DEVICE)
    if DEVICE=='cuda': torch.cuda.set_sync_debug_mode('error')
    try: found = largest_pieces(there, 4)
    finally:
        if DEVICE=='cuda': torch.cuda.set_sync_debug_mode('default')
    assert torch.equal(found.cpu(), largest_pieces(y, 4)) and not torch.equal(found.cpu(), y)

@only_cuda
def test_slices_on_the_device_are_those_that_are_read():
    from test_resident import same
    here,read = resident_loaders(),resident_loaders(resident=False)
    same(list(here.train), list(read.train))
    same(list(here.valid), list(read.valid))
    assert here.train._here and not read.train._here

@only_cuda
def test_slices_that_do_not_fit_are_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda *_: (40_000,10**9))
    dls = resident_loaders()
    assert dls.train.one_batch()[0].is_cuda and not dls.train._here

# two processes on one device
def test_two_processes_on_one_device(tmp_path):
    "gloo, whose messages travel through the host: two halves of a batch give the weights of the whole"
    run = lambda world: [subprocess.Popen([sys.executable, str(Path(__file__).with_name('two_on_one_device.py')),
                                           str(tmp_path), DEVICE, str(rank), str(world)],
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                         for rank in range(world)]
    for p in run(2)+run(1):
        out,_ = p.communicate(timeout=180)
        assert p.returncode==0, out[-3000:]
    a,b,one = (torch.load(tmp_path/f'{n}.pt', weights_only=True) for n in ('2-0','2-1','1-0'))
    for k in one['model']:
        assert torch.equal(a['model'][k], b['model'][k]), k
        torch.testing.assert_close(a['model'][k], one['model'][k], rtol=1e-3, atol=2e-4, msg=lambda m: f'{k}: {m}')
    for s,t,o in zip(a['steps'], b['steps'], one['steps']): assert (s+t)/2==pytest.approx(o, rel=2e-3, abs=1e-4)

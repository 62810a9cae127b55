"""A step on a fake CUDA device, whose tensors have no values: whatever asks for one raises. Copies are counted.

Backward passes need a real device (`test_nobody_waits` in test_cuda.py)."""
import pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from fastmiseg.augment import Augment
from fastmiseg.callback.baselines import ConsistencyCallback, EntropyMinCallback
from fastmiseg.callback.copypaste import CopyPasteCallback
from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.pseudo import PseudoLabelCallback
from fastmiseg.callback.step import StageMaps, Step
from fastmiseg.losses import CrossEntropyDiceLoss
from fastmiseg.models import UNet, find_stages
from fastmiseg.transforms import RandomFlips, RandomLight, RandomShifts
from fastmiseg.warps import usual_pool

copy,pin = torch.ops.aten._to_copy.default,torch.ops.aten._pin_memory.default

class Copies(TorchDispatchMode):
    "Counts copies from the host; an error for one of memory that is not pinned, or for which the host waits"
    def __init__(self):
        super().__init__()
        self.count,self.pinned = 0,[]
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = kwargs.get('device')
        if f is pin: # a fake host has no such memory
            self.pinned.append(args[0])
            return args[0]
        if f is copy and to is not None and torch.device(to).type!=args[0].device.type:
            assert kwargs.get('non_blocking'), f'a copy from {args[0].device} to {to}, for which the host waits'
            assert any(o is args[0] for o in self.pinned), f'a copy from pageable memory to {to}'
            self.count += 1
        return f(*args, **kwargs)

methods = {'recommended': (MIRegCallback, usual_pool()), "the paper's": (MIRegCallback.paper, RandomFlips()),
           'MI, shifts and light': (MIRegCallback, RandomFlips()+RandomShifts()+RandomLight()),
           'MI, a prior': (lambda: MIRegCallback(prior=torch.ones(10)), usual_pool()),
           'consistency': (ConsistencyCallback, usual_pool()), 'entropy': (EntropyMinCallback, None),
           'pseudo-labels': (PseudoLabelCallback, None),
           'pseudo-labels, dropped features': (lambda: PseudoLabelCallback(dropped=.5), None),
           'copy-paste': (CopyPasteCallback, None)}

def step_of(cb, pool, copies):
    "A step of a method, from the drawn T to the loss"
    stages = find_stages(UNet(1, 4, width=4), list(cb.layers))
    with torch.device('cuda'): net,cb.projectors = UNet(1, 4, width=4),cb.make_projectors(stages)
    x,y = torch.empty(4,1,64,64, device='cuda'),torch.zeros(4,64,64, dtype=torch.long, device='cuda')
    maps = StageMaps(net, stages)
    def ask(names, images):
        maps.listen()
        logits = net(images)
        step.receive(names, logits, maps.take())
    with copies:
        T = None if pool is None else pool.draw(10).to('cuda')
        step = Step(x, y, torch.empty(10,1,64,64, device='cuda'), T)
        cb.views(step)
        ask(['l'], step.x_l)
        if step.images: ask(list(step.images), torch.cat(list(step.images.values())))
        for name,(of,changes) in step.again.items():
            with maps.given({k: f(step.feats[of][k]) for k,f in changes.items()}): step.logits[name] = net(step.x_u)
        loss = CrossEntropyDiceLoss()(step.logits['l'], step.y_l) + cb.weighted(step)
        if hasattr(type(cb), 'after_step'): cb.after_step()
    return loss

@pytest.mark.parametrize('name', methods)
def test_a_step_copies_at_most_once_and_never_waits(name):
    make,pool = methods[name]
    with FakeTensorMode(allow_non_fake_inputs=True):
        copies,cb = Copies(),make()
        if name=='MI, a prior': cb.prior = cb.prior.to('cuda') # as after the first step
        assert step_of(cb, pool, copies).device.type=='cuda'
    assert copies.count<=1

def test_augmentation_copies_once():
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        tfm = Augment((48,48), rotate=45, flip='hv', jitter=.3, scale=.2, elastic=.1)
        tfm.before_call(torch.empty(4,1,64,64, device='cuda'), 0)
    assert tfm.grid.device.type=='cuda' and tfm.grid.shape==(4,48,48,2) and copies.count==1

"""The methods that mix images, the tutorial's and ours, train in one forward pass, go on to the bit, and leave no trace
(in two processes: test_distributed)"""
import random
from copy import deepcopy
import pytest, torch
from fastmiseg.callback.baselines import ConsistencyCallback
from fastmiseg.callback.copypaste import CopyPasteCallback
from fastmiseg.callback.pseudo import PseudoLabelCallback
from fastmiseg.callback.resume import ResumeCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from own_methods import METHODS, FollowingCallback, shown
from test_no_trace import Bomb, state
from toy import balanced_mireg, hooks, learner, loaders, quiet, small_mireg
from two_processes import Stop, plain_loaders

OURS = [PseudoLabelCallback, CopyPasteCallback]

def train(path, cbs, stops=()):
    for k,stop in enumerate([*stops, None]):
        learn = quiet(learner(path, width=2, seed=k, dls=loaders(bs=2, unlabeled_bs=4, n_iters=4)))
        kept = cbs()
        try: learn.fit_one_cycle(2, 1e-2, cbs=[*kept, ResumeCallback(path/'ckpt', every=1), Stop(stop)])
        except KeyboardInterrupt: assert stop
        else: assert not stop
    return learn

def test_twenty_lines():
    assert len(shown)==4 and all(len([l for l in s.splitlines() if l.strip()])<=20 for s in shown)

@pytest.mark.parametrize('method', [*METHODS, *OURS])
@pytest.mark.parametrize('teacher', [False, True])
def test_one_forward_pass(tmp_path, method, teacher):
    "The network runs once a step (and the teacher once), and the term reaches the loss"
    calls,learn = [],quiet(learner(tmp_path, dls=loaders(bs=2, unlabeled_bs=4, n_iters=3)))
    handle = learn.model.register_forward_pre_hook(lambda m,xs: calls.append(len(xs[0])) if m.training else None)
    learn.fit(1, 1e-2, cbs=[method(), *[EMATeacherCallback(.9)]*teacher])
    handle.remove()
    assert calls==[10,10,10] if not teacher else sorted(calls)==[4,4,4,6,6,6]
    assert torch.tensor(learn.recorder.values[-1]).isfinite().all()

@pytest.mark.parametrize('method', [*METHODS, *OURS, balanced_mireg])
def test_goes_on_to_the_bit(tmp_path, method):
    cbs = lambda: [method(), EMATeacherCallback(.9)]
    whole,pieces = train(tmp_path/'a', cbs),train(tmp_path/'b', cbs, stops=(1,3,4,6))
    for p,q in zip(whole.model.state_dict().values(), pieces.model.state_dict().values()): assert torch.equal(p, q)
    assert torch.equal(torch.stack(list(whole.recorder.losses)), torch.stack(list(pieces.recorder.losses)))

@pytest.mark.parametrize('method', [*METHODS, *OURS, balanced_mireg])
def test_no_trace(tmp_path, method):
    learn = quiet(learner(tmp_path, dls=loaders(bs=2, unlabeled_bs=4)))
    learn.fit(1)
    before = state(learn)
    for exc,when in ((ValueError('boom'),'after_pred'), (KeyboardInterrupt(),'after_loss'),
                     (ValueError('boom'),'before_step')):
        with pytest.raises(type(exc)): learn.fit(1, 1e-3, cbs=[method(), Bomb(exc, when, True)])
        learn._end_cleanup(); learn.opt.zero_grad()
        assert state(learn)==before and hooks(learn.model)==0

def test_events_of_a_method_of_ones_own(tmp_path):
    "What is done for a method is done without `super`, as other callbacks of fastai are written"
    class Own(ConsistencyCallback):
        def __init__(self):
            super().__init__(1.)
            self.seen = []
        def before_fit(self): self.seen.append('before_fit')
        def before_train(self): self.seen.append('before_train')
        def after_validate(self): self.seen.append('after_validate')
        def after_fit(self): self.seen.append('after_fit')
        def _before_fit(self): self.seen.append('a helper, and no event')
        _before_batch = _before_fit
    rows = []
    for cb in (ConsistencyCallback(1.), Own()):
        learn = quiet(learner(tmp_path, seed=0, dls=loaders(bs=2, unlabeled_bs=4, n_iters=3)))
        learn.fit(2, 1e-2, cbs=cb)
        rows.append((list(learn.recorder.metric_names), list(map(list, learn.recorder.values))))
    assert rows[0]==rows[1] and 'consistency' in rows[0][0]
    assert cb.seen==['before_fit', *['before_train','after_validate']*2, 'after_fit']

def test_lr_find_is_forgotten(tmp_path):
    "Joints, gradients' sizes and heads are as before the search, and the next fit is as without it"
    def go(find):
        learn = quiet(learner(tmp_path, dls=loaders(bs=2, unlabeled_bs=4), cbs=(cb:=balanced_mireg())))
        learn.fit(1, 1e-2)
        memory,before = cb.projectors['Conv5'].memory,deepcopy(cb.state_dict())
        assert memory.steps==4 and memory.joint.sum()>0 and len(before['balance']['sizes'])==2
        if find:
            with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
            torch.testing.assert_close(cb.state_dict(), before, rtol=0, atol=0)
        learn.fit(1, 1e-2)
        return learn.model.state_dict()
    for p,q in zip(go(True).values(), go(False).values()): assert torch.equal(p, q)

def test_what_is_remembered_in_buffers(tmp_path):
    "It is as before after a search, and begins anew with another learner"
    def go(cb, find=False):
        learn = quiet(learner(tmp_path, dls=loaders(bs=2, unlabeled_bs=4), cbs=cb))
        learn.fit(1, 1e-2)
        before = cb.projectors.usual.clone()
        if find:
            with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
            assert torch.equal(cb.projectors.usual, before) and before>0
        learn.fit(1, 1e-2)
        return [*learn.model.state_dict().values(), cb.projectors.usual.clone()]
    first = go(cb:=FollowingCallback())
    for again in (go(cb), go(FollowingCallback(), find=True)):
        for p,q in zip(first, again): assert torch.equal(p, q)

def test_lr_find_draws_nothing_of_what_comes(tmp_path):
    "Loaders of unlabelled items draw when they are made"
    def go(find):
        random.seed(0)
        learn = quiet(learner(tmp_path, dls=plain_loaders(3), cbs=ConsistencyCallback(unlabeled=list(range(13,30)))))
        if find:
            with learn.no_bar(): learn.lr_find(num_it=4, show_plot=False)
        learn.fit(1, 1e-2)
        return learn.model.state_dict()
    for p,q in zip(go(True).values(), go(False).values()): assert torch.equal(p, q)

@pytest.mark.parametrize('teacher', [False, True])
def test_all_of_them_together(tmp_path, teacher):
    "One forward pass of all images, a term of each method, and the same training in pieces"
    cbs = lambda: [PseudoLabelCallback(threshold=.5, dropped=.5), CopyPasteCallback(start=.3), small_mireg(),
                   *[EMATeacherCallback(.9)]*teacher]
    whole,pieces = train(tmp_path/'a', cbs),train(tmp_path/'b', cbs, stops=(2,5))
    for p,q in zip(whole.model.state_dict().values(), pieces.model.state_dict().values()): assert torch.equal(p, q)
    assert {'pseudo','copypaste','global_mi','local_mi','consistency'}<=set(whole.recorder.metric_names)
    assert torch.tensor(whole.recorder.values[-1]).isfinite().all()

@pytest.mark.parametrize('method', OURS)
def test_plain_learner(tmp_path, method):
    "A learner that knows nothing of unlabelled images gets them from the callback"
    learn = quiet(learner(tmp_path, dls=plain_loaders(3)))
    learn.fit(1, 1e-2, cbs=[cb:=method(unlabeled=list(range(13,21))), EMATeacherCallback(.9)])
    assert torch.tensor(learn.recorder.values[-1]).isfinite().all() and cb.terms

"""The callback that takes paired batches apart: one pass or several, what methods share, and a sentence for each wrong
use"""
import warnings
from copy import deepcopy

import pytest, torch
from torch import nn
from fastai.basics import Callback, DataLoader, DataLoaders, Transform
from fastai.callback.tracker import SaveModelCallback
from fastai.data.transforms import Normalize
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.core import TensorImage
from fastmiseg.callback.baselines import ConsistencyCallback, EntropyMinCallback
from fastmiseg.callback.copypaste import CopyPasteCallback
from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.method import SemiSupCallback, sigmoid_rampup
from fastmiseg.callback.paired import PairedBatchCallback
from fastmiseg.callback.pseudo import PseudoLabelCallback
from fastmiseg.callback.resume import ResumeCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.metrics import VolumeDice
from fastmiseg.models import Stage
from fastmiseg.mutual_info import entropy_loss
from fastmiseg.projectors import LocalProjector
from fastmiseg.transforms import RandomFlips, RandomShifts
from fastmiseg.warps import RandomWarps, usual_pool
from toy import UNet, balanced_mireg, learner, loaders, quiet, small_mireg
from two_processes import Stop, plain_loaders

class Nothing(SemiSupCallback):
    "A term of weight 0 that sees x and T(x)"
    def __init__(self, **kw): super().__init__(nothing=0., **kw)
    def penalty(self, step): return step.logits['tx'].mean()

class Probing(Nothing):
    layers = ('Conv5',)
    def make_projectors(self, found): return nn.Linear(found['Conv5'].channels, 3)
    def penalty(self, step): return self.projectors(step.target_feats['Conv5'].mean((2,3))).square().mean()

class Seen(Callback):
    "The labelled half's prediction, and the number of forward passes, of each training step"
    order = 60
    def before_fit(self):
        self.pred,self.calls = [],[]
        self.handle = self.model.register_forward_pre_hook(
            lambda m,xs: self.calls.append(len(xs[0])) if m.training else None)
    def after_pred(self):
        if self.training: self.pred.append(self.learn.pred.detach().clone())
    def after_fit(self): self.handle.remove()

def train(tmp_path, cbs, passes=1, **kw):
    learn,seen = quiet(learner(tmp_path, dls=loaders(bs=2, unlabeled_bs=3, n_iters=1), **kw)),Seen()
    learn.paired_batch.passes = passes
    learn.fit(1, 0., cbs=[*cbs, seen])
    return learn,seen

def test_two_passes_leave_the_labelled_images_alone(tmp_path):
    "With statistics of their own, what is said of them is what it is without any method; in one pass it is not"
    alone,one,two = (train(tmp_path, *args)[1] for args in (([],), ([Nothing()],), ([Nothing()],2)))
    assert (alone.calls, one.calls, two.calls)==([2],[8],[2,6])
    assert torch.equal(alone.pred[0], two.pred[0]) and not torch.allclose(alone.pred[0], one.pred[0])

class Noted(SemiSupCallback):
    "What the network says to x and to zeros, in one step"
    layers = ('Conv5',)
    def __init__(self, *views): super().__init__(noted=0.); self.asked = views
    def views(self, step):
        for k in self.asked: step.see(k, (lambda: torch.zeros_like(step.x_u)) if k=='zeros' else None)
    def penalty(self, step):
        self.said = {k: (step.logits[k].detach().clone(), step.feats[k]['Conv5'].detach().clone()) for k in self.asked}
        return step.logits[self.asked[0]].mean()

def test_three_passes_keep_each_view_apart(tmp_path):
    "What is said of x, and its maps, are what they are where x is the only view; with two passes they are not"
    def said(passes, *views):
        _,seen = train(tmp_path, [cb:=Noted(*views)], passes)
        return cb.said['x'],seen.calls
    (alone,_),(two,calls_of_2),(three,calls_of_3) = said(2, 'x'),said(2, 'x', 'zeros'),said(3, 'x', 'zeros')
    assert (calls_of_2,calls_of_3)==([2,6],[2,3,3])
    for a,b,c in zip(alone, three, two): assert torch.equal(a, b) and not torch.allclose(a, c)

@pytest.mark.parametrize('passes', [2, 3])
@pytest.mark.parametrize('make', [
    lambda: [small_mireg()], lambda: [small_mireg(), EMATeacherCallback(.9)], lambda: [EntropyMinCallback()]])
def test_several_passes_go_on_to_the_bit(tmp_path, make, passes):
    def run(path, stops=()):
        for k,stop in enumerate([*stops, None]):
            learn = quiet(learner(path, seed=k, dls=loaders(n_iters=3)))
            learn.paired_batch.passes = passes
            try: learn.fit(2, 1e-2, cbs=[*make(), ResumeCallback(path/'ckpt', every=1), Stop(stop)])
            except KeyboardInterrupt: pass
        return learn.model.state_dict().values()
    for p,q in zip(run(tmp_path/'a'), run(tmp_path/'b', (2,4))): assert torch.equal(p, q)

def test_no_pass_for_nothing(tmp_path):
    "A teacher without a weight asks for no images, so that the labelled ones go through alone, once"
    for n in (2,3): assert train(tmp_path, [EMATeacherCallback(weight=0.)], passes=n)[1].calls==[2]

def test_who_answers(tmp_path):
    "The network for x without a teacher, the teacher beside it; asked before the forward pass it says the same"
    class Asks(Nothing):
        def views(self, step):
            super().views(step)
            if self.early: step.target
        def penalty(self, step): targets.append(step.target.clone()); return super().penalty(step)
    for early in (False,True):
        targets,ask = [],Asks()
        ask.early = early
        learn,seen = train(tmp_path, [ask, EMATeacherCallback(.9)])
        assert seen.calls==([3,5] if early else [5,3]) # the teacher runs the network's modules, with its own weights
        if not early: kept = targets
        assert torch.equal(targets[0], kept[0]) and not targets[0].requires_grad
    with pytest.raises(ValueError, match="the network has not answered for 'x'; ask for it in `views`"):
        train(tmp_path, [type('Early', (Nothing,), dict(views=lambda self, step: step.target))()])

def bad(tmp_path, cbs, dls=None, **kw): quiet(learner(tmp_path, dls=dls, **kw)).fit(1, cbs=cbs)
def supervised(): return loaders(n=9, n_iters=3)

def test_wrong_uses_have_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no stage 'Conv7' in UNet; there are Conv1"):
        bad(tmp_path, type('Unknown', (Nothing,), dict(layers=('Conv7',)))())
    with pytest.raises(ValueError, match='Nothing: there are no unlabelled images. Either train on paired batches'):
        bad(tmp_path, Nothing(), supervised())
    with pytest.raises(ValueError, match=r'unlabelled images are \(1, 8, 8\)'):
        bad(tmp_path, Nothing(unlabeled=DataLoader([torch.randn(1,8,8)]*4, bs=2)), supervised())
    with pytest.raises(ValueError, match='the DataLoader gave no batch'):
        bad(tmp_path, Nothing(unlabeled=DataLoader([], bs=2)), supervised())
    with pytest.raises(ValueError, match='the list of unlabelled images is empty'):
        bad(tmp_path, Nothing(unlabeled=[]), supervised())
    with pytest.raises(ValueError, match='unlabeled: 2 methods were given images of their own, '
                                         'but one forward pass serves them all'):
        bad(tmp_path, [Nothing(unlabeled=[4]), ConsistencyCallback(unlabeled=[5])], supervised())
    with pytest.raises(ValueError, match='T: 2 methods were given a T of their own'):
        bad(tmp_path, [ConsistencyCallback(T=RandomFlips()), Nothing(T=RandomShifts(.5))])
    with pytest.raises(ValueError, match='T: .*RandomFlips.* is not a pool to draw transformations from; '
                                         'give one, as RandomFlips'):
        bad(tmp_path, ConsistencyCallback(T=RandomFlips))
    with pytest.raises(ValueError, match=r'T: RandomFlips\(axes=\(\), p=0.5\) does nothing'):
        bad(tmp_path, ConsistencyCallback(T=RandomFlips(())))
    with pytest.raises(ValueError, match="give the loss reduction='mean'"):
        bad(tmp_path, Nothing(), loss_func=CrossEntropyLossFlat(axis=1, reduction='none'))
    with pytest.raises(ValueError, match='passes: 0 is not 1, 2 or 3'):
        (learn:=quiet(learner(tmp_path))).paired_batch.passes = 0
        learn.fit(1, cbs=Nothing())

def test_methods_begin_anew_with_another_network(tmp_path):
    cb = Probing()
    (learn:=quiet(learner(tmp_path))).fit(1, cbs=cb)
    first = cb.projectors
    learn.fit(1, cbs=cb)
    assert cb.projectors is first
    learn.model,learn.opt = UNet(1,2,width=4),None
    learn.fit(1, cbs=cb)
    assert cb.projectors is not first and cb.projectors.in_features==64

def test_nothing_of_one_learner_reaches_the_next(tmp_path):
    used = [balanced_mireg(),EMATeacherCallback(.9)]
    quiet(learner(tmp_path)).fit(1, 1e-2, cbs=used)
    def result(cbs):
        (learn:=quiet(learner(tmp_path))).fit(1, 1e-2, cbs=cbs)
        return [*learn.model.state_dict().values(), *cbs[0].projectors.state_dict().values(),
                *cbs[1].average.tensors.values(), *cbs[0].balance._sizes.values()]
    again,new = result(used),result([balanced_mireg(),EMATeacherCallback(.9)])
    assert all(map(torch.equal, again, new))

def test_what_was_loaded_belongs_to_the_next_network(tmp_path):
    used,cb = EMATeacherCallback(.9),EMATeacherCallback(.9)
    for o in (used,cb): quiet(learner(tmp_path)).fit(1, 1e-2, cbs=o)
    kept = deepcopy(used.state_dict())
    cb.load_state_dict(kept)
    quiet(learner(tmp_path)).fit(1, 0., cbs=cb)
    assert cb.average.steps>used.average.steps

def test_what_a_search_or_a_resumed_fit_loads_belongs_to_its_own_network(tmp_path):
    "The learner after it begins anew all the same"
    def result(cb):
        quiet(learner(tmp_path, seed=1)).fit(1, 1e-2, cbs=cb)
        return list(cb.average.tensors.values())
    new,searched,resumed = result(EMATeacherCallback(.9)),EMATeacherCallback(.9),EMATeacherCallback(.9)
    with (learn:=quiet(learner(tmp_path, cbs=searched))).no_bar(): learn.lr_find(num_it=20, show_plot=False)
    fit = lambda cb, *cbs: quiet(learner(tmp_path)).fit(1, 1e-2, cbs=[cb, ResumeCallback(tmp_path/'c', every=1), *cbs])
    with pytest.raises(KeyboardInterrupt): fit(EMATeacherCallback(.9), Stop(2))
    fit(resumed)
    for cb in (searched, resumed): assert all(map(torch.equal, result(cb), new))

def test_fits_from_one_start_do_not_know_of_each_other(tmp_path):
    "Heads and teacher of the fits before went into those after `learn.load`: a teacher that had seen their masks"
    def results(rates):
        learn = quiet(learner(tmp_path, cbs=[balanced_mireg(), EMATeacherCallback(.9)]))
        learn.save('start')
        for lr in rates:
            learn.load('start', with_opt=False)
            learn.opt = None
            learn.dls.train.epoch,learn.paired_batch.generator = 0,torch.Generator().manual_seed(0)
            torch.manual_seed(0)
            learn.fit(1, lr)
        return [*learn.model.state_dict().values(), *learn.ema_teacher.average.tensors.values()]
    assert all(map(torch.equal, results([1e-2,1e-3]), results([1e-3])))

def test_weights_that_a_fit_loads_are_its_own(tmp_path):
    cbs = [small_mireg(), EMATeacherCallback(.9)]
    learn = quiet(learner(tmp_path, cbs=cbs))
    for i in (1,2):
        learn.fit(1, 1e-3, cbs=SaveModelCallback())
        assert cbs[1].average.steps==4*i
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
    assert cbs[1].average.steps==8

def test_a_fit_that_is_refused_costs_nothing(tmp_path):
    cb = EMATeacherCallback(.9)
    quiet(learner(tmp_path)).fit(1, 1e-2, cbs=cb)
    with pytest.raises(ValueError, match='there are no unlabelled images'):
        quiet(learner(tmp_path, dls=plain_loaders(2))).fit(1, cbs=cb)
    assert cb.average is not None

class Scale(Transform):
    def __init__(self, factor): self.factor = factor
    def encodes(self, x:TensorImage): return self.factor*x

@pytest.mark.parametrize('make', [ConsistencyCallback, PseudoLabelCallback])
def test_images_that_are_not_in_0_to_1(tmp_path, make):
    "Said once, where light is changed; what a `Normalize` of the loaders did counts as undone"
    def said(cb, *tfms):
        learn = quiet(learner(tmp_path, dls=loaders(n_iters=3)))
        for o in tfms: learn.dls.train.after_batch.add(o)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            learn.fit(1, cbs=cb)
        return sum('unlabelled images have intensities from' in str(o.message) for o in found)
    assert said(make(), Scale(5.))==1 and not said(make(), Scale(.2))
    assert not said(make(), Scale(.2), Normalize.from_stats([.1], [.01], cuda=False))
    assert not said(ConsistencyCallback(T=RandomFlips()), Scale(5.))

def test_the_T_without_light_that_is_proposed_warps_as_usual(tmp_path):
    learn = quiet(learner(tmp_path, dls=loaders(n_iters=1)))
    learn.dls.train.after_batch.add(Scale(5.))
    with pytest.warns(UserWarning, match='leave light alone') as found: learn.fit(1, cbs=ConsistencyCallback())
    said = next(str(o.message) for o in found if 'leave light alone' in str(o.message))
    assert repr(RandomWarps()) in repr(eval(said.split('T=')[1])) and repr(RandomWarps()) in repr(usual_pool())

def test_two_terms_of_one_name(tmp_path):
    with pytest.raises(ValueError, match='consistency: MIRegCallback and ConsistencyCallback both have a term of this '
                                         'name, so that it would count twice'):
        bad(tmp_path, [small_mireg(), ConsistencyCallback()])
    bad(tmp_path, [small_mireg(consistency_weight=0.), ConsistencyCallback()])
    with pytest.raises(ValueError, match='mean_teacher: EMATeacherCallback and EMATeacherCallback both'):
        bad(tmp_path, [EMATeacherCallback(), EMATeacherCallback(.5)])

@pytest.mark.parametrize('name', ['dice','valid_loss'])
def test_a_term_with_the_name_of_a_metric(tmp_path, name):
    "A model file had the term's number as its Dice"
    class Own(ConsistencyCallback):
        def __init__(self):
            super().__init__()
            self.weights = {name: 1.}
    learn = quiet(learner(tmp_path, metrics=VolumeDice(), cbs=(cb:=Own())))
    for go in (learn.fit, learn.fit_one_cycle):
        with pytest.raises(ValueError, match=f'{name}: Own has a term of this name, and the record of the training '
                                             'already has such a column'): go(1)
    cb.weights = {f'{name}_of_views': 1.}
    for _ in range(2): learn.fit(1)
    assert learn.recorder.metric_names==['epoch','train_loss','valid_loss','dice',f'{name}_of_views','time']

@pytest.mark.parametrize('weights,penalty,said', [
    (dict(a=1., b=5.), lambda x: x.mean(), r'penalty returned one term, and there are 2 weights \(a, b\)'),
    (dict(a=1.), lambda x: dict(a=x.mean(), b=x.mean()), "the term 'b' has no weight; there are a"),
    (dict(a=1.), lambda x: x.mean((1,2,3)), r"the term 'a' is a tensor of shape \(3,\), expected"),
    (dict(a=1.), lambda x: 0., "the term 'a' is 0.0, expected")])
def test_penalties_that_do_not_fit_their_weights(tmp_path, weights, penalty, said):
    "Of two weights the second was passed over"
    class Mine(SemiSupCallback):
        def penalty(self, step): return penalty(step.logits['tx'])
    with pytest.raises(ValueError, match=f'Mine: {said}'): bad(tmp_path, Mine(**weights))

def test_a_term_without_gradient_is_told(tmp_path):
    "Such as the entropy of a teacher's answer; one that has nothing to say in some steps is none"
    class Mine(SemiSupCallback):
        def __init__(self, of): super().__init__(mine=1.); self.of,self.n = of,0
        def penalty(self, step):
            self.n += 1
            return entropy_loss(self.of(step, self.n))
    def told(of):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            quiet(learner(tmp_path, cbs=[EMATeacherCallback(weight=0.), Mine(of)])).fit(1)
        return sum('mine: this term of Mine had no gradient in any step of the epoch' in str(o.message) for o in found)
    assert told(lambda step, n: step.target)==1
    assert not told(lambda step, n: step.target if n>1 else step.probs('tx'))

def test_two_views_of_one_name(tmp_path):
    "The second method was given the images of the first"
    class Mine(Nothing):
        def views(self, step):
            step.see('tx')
            step.see('strong', lambda: -step.x_u)
    with pytest.raises(ValueError, match="see: images called 'strong' are there already"):
        bad(tmp_path, [PseudoLabelCallback(), Mine()])

def test_two_teachers(tmp_path):
    "Each took the network's place in the validation, and the network was left with the weights of one of them"
    with pytest.raises(ValueError, match='EMATeacherCallback and EMATeacherCallback: both would answer'):
        bad(tmp_path, [EMATeacherCallback(weight=1.), EMATeacherCallback(decay=.5, weight=0.)])

def test_a_stage_is_clustered_in_one_way():
    with pytest.raises(ValueError, match="MIRegCallback: 'Conv5' is in global_layers and in local_layers"):
        MIRegCallback(local_layers=('Conv5','Upconv2'))
    assert MIRegCallback(local_weight=0., global_layers=('Conv5','Upconv2')).layers==('Conv5','Upconv2')
    alone = MIRegCallback(global_weight=0., local_layers=('Conv5','Upconv2'))
    assert type(alone.make_projectors({'Conv5': Stage('Conv5', 'Conv5', 8, 16)})['Conv5']) is LocalProjector

def test_weight_that_is_no_number(tmp_path):
    (learn:=quiet(learner(tmp_path)))
    before = [o.clone() for o in learn.model.parameters()]
    for w in (float('nan'), lambda pct: float('inf'), -1):
        with pytest.raises(ValueError, match=r'consistency: its weight is (nan|inf|-1) at 0% of the training'):
            learn.fit(1, cbs=ConsistencyCallback(w))
    assert all(map(torch.equal, before, learn.model.parameters()))

class Huge(SemiSupCallback):
    def __init__(self): super().__init__(huge=10.)
    def penalty(self, step): return step.logits['tx'].mean()+3e38

@pytest.mark.parametrize('weight', ['5', sigmoid_rampup])
def test_weight_of_another_kind(tmp_path, weight):
    with pytest.raises(ValueError, match='consistency: its weight is .* at 0% .*, as sigmoid_rampup'):
        bad(tmp_path, ConsistencyCallback(weight))

def test_a_sum_that_is_not_finite(tmp_path):
    with pytest.raises(FloatingPointError, match='the weighted sum is inf at step 0 '):
        bad(tmp_path, Huge())

class Validates(Callback):
    def after_step(self): self.learn.validate()

def test_validation_inside_a_fit(tmp_path):
    with pytest.raises(RuntimeError, match='a fit with methods is under way: to validate or predict inside it'):
        bad(tmp_path, [Nothing(), Validates()])
    bad(tmp_path, Nothing())
    with pytest.raises(RuntimeError, match='ResumeCallback: a fit is under way: to validate or predict inside it'):
        bad(tmp_path, [kept := ResumeCallback(tmp_path/'checkpoints'), Validates()])
    bad(tmp_path, kept)

def test_networks_of_two_inputs(tmp_path):
    x,y = torch.randn(1,16,16),torch.zeros(16,16).long()
    dls = DataLoaders(*(DataLoader([(x,x,y)]*4, bs=2) for _ in range(2)))
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = UNet(2,2,width=2)
        def forward(self, x, z): return self.net(torch.cat([x,z], 1))
    with pytest.raises(ValueError, match='the batches have 2 inputs for the network, and a method knows of one'):
        bad(tmp_path, ConsistencyCallback(unlabeled=DataLoader([x]*4, bs=2)), dls, net=Two)

def test_unlabelled_images_that_are_none(tmp_path):
    x,y = torch.randn(1,16,16),torch.zeros(16,16).long()
    dls = DataLoaders(*(DataLoader([(x,y)]*4, bs=2) for _ in range(2)))
    for given,said in ((tmp_path, 'is one path; give the files themselves, as get_image_files'),
                       (str(tmp_path), 'is one path'), (dls, 'got DataLoaders, expected one loader'),
                       ([], 'the list of unlabelled images is empty')):
        with pytest.raises(ValueError, match=f'unlabeled: .*{said}'):
            bad(tmp_path, ConsistencyCallback(unlabeled=given), dls)
    with pytest.raises(ValueError, match='unlabeled: a batch of the DataLoader is, or begins with, a dict; expected'):
        bad(tmp_path, ConsistencyCallback(unlabeled=torch.utils.data.DataLoader([dict(image=x)]*2)), plain_loaders(2))
    with pytest.raises(ValueError, match='there are no unlabelled images. Either'):
        bad(tmp_path, ConsistencyCallback(), loaders(unlabeled_bs=0))

def test_the_mask_is_the_first_target(tmp_path):
    "Beside a map of weights for the loss: methods took the last target for the mask"
    x,y,weights = torch.randn(1,16,16),torch.ones(16,16).long(),torch.zeros(16,16)
    dls = DataLoaders(*(DataLoader([(x,y,weights)]*4, bs=2) for _ in range(2)))
    for dl in dls.loaders: dl.n_inp = 1
    class Sees(Nothing):
        def penalty(self, step):
            masks.append(step.y_l)
            return super().penalty(step)
    masks,loss = [],lambda p, y, w: nn.functional.cross_entropy(p, y)
    bad(tmp_path, Sees(unlabeled=DataLoader([x]*4, bs=2)), dls, loss_func=loss)
    assert masks and all(torch.equal(o, torch.ones(2,16,16).long()) for o in masks)

@pytest.mark.parametrize('make', [ConsistencyCallback, EntropyMinCallback, EMATeacherCallback, CopyPasteCallback,
                                  PseudoLabelCallback])
def test_networks_of_one_channel(tmp_path, make):
    "The softmax of a single channel is 1 everywhere: terms were 0, and the methods did nothing, without a word"
    class Binary(nn.Module):
        def forward(self, p, y): return nn.functional.binary_cross_entropy_with_logits(p[:,0], y.float())
    with pytest.raises(ValueError, match='model: returns one channel, and methods take the softmax of one for each'):
        bad(tmp_path, make(), net=UNet(1,1,width=2), loss_func=Binary())

def test_networks_that_no_stage_is_asked_of(tmp_path):
    class Fixed(nn.Module):
        "Knows images of 16×16 only"
        def __init__(self):
            super().__init__()
            self.conv,self.place = nn.Conv2d(1,2,3,padding=1),nn.Parameter(torch.zeros(16,16))
        def forward(self, x): return self.conv(x+self.place)
    (learn:=quiet(learner(tmp_path))).model,learn.opt = Fixed(),None
    learn.fit(1, cbs=[ConsistencyCallback(), EMATeacherCallback()])

def test_the_same_T_may_be_given_to_each(tmp_path):
    T = RandomFlips()+RandomShifts(.5)
    bad(tmp_path, [small_mireg(consistency_weight=0., T=T), EMATeacherCallback(T=T), ConsistencyCallback(T=T)])

def test_every_learner_has_it():
    from fastai.basics import defaults
    assert sum(c is PairedBatchCallback for c in defaults.callbacks)==1

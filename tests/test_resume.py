"Trainings that are killed with SIGKILL, again and again, and called again: the same weights to the bit"
import itertools, os, subprocess, sys
from pathlib import Path
import pytest, torch
from fastai.basics import Callback, set_seed, store_attr
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import GradientAccumulation
from fastmiseg.callback.baselines import ConsistencyCallback
from fastmiseg.callback.resume import ResumeCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from toy import learner, loaders, quiet, small_mireg
from killing import EPOCHS, METHODS, Noise, plain_loaders, steps

class Stop(Callback):
    "Interrupts after the nth step that this callback sees, or after the nth epoch"
    order = 95
    def __init__(self, n, after='batch'): super().__init__(); self.n,self.after,self.count = n,after,itertools.count(1) # no part of a checkpoint
    def _at(self, what):
        if what==self.after and next(self.count)==self.n: raise KeyboardInterrupt
    def after_batch(self):
        if self.training: self._at('batch')
    def after_epoch(self): self._at('epoch')

def same(a, b):
    assert a.keys()==b.keys()
    for k in a:
        if isinstance(a[k], dict): same(a[k], b[k])
        elif isinstance(a[k], torch.Tensor): assert torch.equal(a[k], b[k]), k
        else: assert a[k]==b[k], k

@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    "Three kills for each method, in processes forked from a fresh one"
    if not hasattr(os, 'fork'): pytest.skip('needs os.fork')
    root = tmp_path_factory.mktemp('killed')
    res = subprocess.run([sys.executable, str(Path(__file__).with_name('killing.py')), str(root)], env={**os.environ, 'OMP_NUM_THREADS':'1'}, capture_output=True, text=True)
    print(res.stdout) # the seed, and where each was killed
    assert res.returncode==0, (res.stdout+res.stderr)[-4000:]
    return root

@pytest.mark.parametrize('method', METHODS)
def test_killed_and_called_again(killed, method):
    a,b = (torch.load(killed/method/o/'result.pt', weights_only=False) for o in ('whole','cut'))
    assert len(a['losses'])==len(a['lrs'])==steps(method)
    same(a, b)

def test_log_is_whole(killed):
    logs = [[l.split(',')[:-1] for l in (killed/'tracked'/o/'history.csv').read_text().splitlines()] for o in ('whole','cut')]
    assert logs[0]==logs[1] and len(logs[0])==EPOCHS+1

def test_half_written_file_is_not_taken(tmp_path):
    learn = quiet(learner(tmp_path))
    learn.fit(1, 1e-2, cbs=ResumeCallback(tmp_path/'c', every=1, keep=3))
    good = sorted((tmp_path/'c').iterdir())
    whole = good[-1].read_bytes()
    (tmp_path/'c'/'00-00009-000000.tmp').write_bytes(whole)         # was being written
    for cut in (0, 10, len(whole)//2, len(whole)-1):                # a disk that lied
        good[-1].write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match='is damaged'): quiet(learn:=learner(tmp_path, seed=1)).fit(1, 1e-2, cbs=ResumeCallback(tmp_path/'c', every=1, keep=3))
    assert torch.load(good[-1], weights_only=True)['over']

def test_progress_bar_of_a_later_epoch(tmp_path):
    "fastai's bar in a terminal, which has a clock that starts with its first step"
    class Stop(Callback):
        order = 95
        def after_batch(self):
            if self.training and self.epoch==1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learner(tmp_path).fit(2, cbs=[ResumeCallback(tmp_path/'c', every=1), Stop()])
    learn = learner(tmp_path); learn.fit(2, cbs=ResumeCallback(tmp_path/'c', every=1))
    assert hasattr(learn, 'progress') and len(learn.recorder.values)>0

def test_no_number_after_going_on(tmp_path):
    "The message still says where the batch came from"
    class Stop(Callback):
        order = 95
        def after_batch(self):
            if self.training and self.iter==1: raise KeyboardInterrupt
    class Broken(Callback):
        order = 91
        def before_batch(self):
            if self.training and self.iter==3: self.learn.xb = (self.x*float('nan'),)
    fit = lambda cb: quiet(learner(tmp_path)).fit(1, 1e-3, cbs=[small_mireg(), ResumeCallback(tmp_path/'c', every=1), cb])
    with pytest.raises(KeyboardInterrupt): fit(Stop())
    with pytest.raises(FloatingPointError, match=r'batch 3.*The batch came from labelled: \d.*; unlabelled: \d'): fit(Broken())

def attempts(make, path, *stops):
    "The result of `make(k, cbs)` in the last of several attempts, all but the last interrupted"
    for k,stop in enumerate([*stops, None]):
        try: res = make(k, path, [stop] if stop else [])
        except KeyboardInterrupt: assert stop
        else: assert not stop
    return res

@pytest.mark.parametrize('kind', ['paired','files'])
@pytest.mark.parametrize('every,freeze_epochs,at', [(1,1,6), (100,1,6), (100,2,11), (100,0,3), (1,0,6)])
def test_several_fits_share_one_callback(tmp_path, kind, every, freeze_epochs, at):
    "As `fine_tune` does: the fit that is over is passed over, the next begins where it ended and has all its epochs"
    class Epochs(Callback):
        def before_epoch(self): seen.append((self.n_epoch, self.epoch))
    seen,files = [],kind=='files'
    def tune(seed, path, cbs):
        seen.clear()
        set_seed(seed)
        learn = quiet(learner(tmp_path, net=Noise, seed=seed, dls=plain_loaders() if files else None,
                              splitter=lambda m: [list(m.net.Conv1.parameters()), [p for n,p in m.named_parameters() if not n.startswith('net.Conv1.')]]))
        learn.fine_tune(2, 1e-2, freeze_epochs=freeze_epochs, cbs=[small_mireg(unlabeled=list(range(9,16)) if files else None), Epochs(), ResumeCallback(tmp_path/path, every=every), *cbs])
        return learn.model.state_dict()
    whole = attempts(tune, 'a')
    same(whole, attempts(tune, 'b', Stop(at)))
    assert seen==[(2,0),(2,1)] or every==1 or freeze_epochs==0

def test_interrupted_at_an_epochs_end_and_in_the_next(tmp_path):
    "The order of the images of an epoch that has been begun twice"
    def fit(seed, path, cbs):
        set_seed(seed)
        learn = quiet(learner(tmp_path, net=Noise, seed=seed, dls=plain_loaders()))
        learn.fit(3, 1e-2, cbs=[ConsistencyCallback(unlabeled=list(range(9,16))), ResumeCallback(tmp_path/path, every=1), *cbs])
        return learn.model.state_dict()
    same(attempts(fit, 'a'), attempts(fit, 'b', Stop(1, 'epoch'), Stop(2), Stop(4), Stop(1), Stop(1, 'epoch')))

def test_finished_training_with_a_stream_of_its_own(tmp_path):
    def fit(seed, path, cbs):
        set_seed(seed)
        learn = quiet(learner(tmp_path, seed=seed, dls=plain_loaders()))
        learn.fit(1, 1e-2, cbs=[small_mireg(unlabeled=list(range(9,16))), ResumeCallback(tmp_path/path)])
        return learn.model.state_dict()
    same(attempts(fit, 'a'), fit(1, 'a', []))

def test_fit_after_a_finished_training_has_all_epochs(tmp_path):
    class Count(Callback):
        def after_epoch(self): seen.append(self.epoch)
    def fit(): (learn:=quiet(learner(tmp_path))).fit(2, 1e-2, cbs=ResumeCallback(tmp_path/'c')); return learn
    fit(); learn,seen = fit(),[]
    learn.fit(3, 1e-2, cbs=Count())
    assert seen==[0,1,2]

@pytest.mark.parametrize('stop', [(6,), (1,'epoch'), (11,), (15,), (3,'epoch')])
def test_gradients_across_epochs_and_fits(tmp_path, stop):
    "Five batches to an epoch, a step every two: one batch's gradients are left, also at the end of the first fit"
    def fit(seed, path, cbs):
        learn = quiet(learner(tmp_path, seed=seed, dls=loaders(n_iters=5)))
        mine = [mi:=small_mireg(), teacher:=EMATeacherCallback(decay=.9), GradientAccumulation(4), ResumeCallback(tmp_path/path, every=100), *cbs]
        for n in (1,2): learn.fit_one_cycle(n, 1e-2, cbs=mine)
        return dict(model=learn.model.state_dict(), heads=mi.projectors.state_dict(), teacher=teacher.average)
    same(attempts(fit, 'a'), attempts(fit, 'b', Stop(*stop)))

def test_validation_is_no_fit(tmp_path):
    "In the learner's constructor, as any callback"
    def make(seed, path, cbs=()): return quiet(learner(tmp_path, seed=seed, cbs=[small_mireg(), ResumeCallback(tmp_path/path, every=1), *cbs]))
    def ask(learn): learn.validate(); learn.get_preds()
    def run(seed, path, cbs):
        learn = make(seed, path, cbs)
        ask(learn)
        learn.fit(2, 1e-2)
        return learn.model.state_dict()
    whole = make(0, 'a'); whole.fit(2, 1e-2); whole = whole.model.state_dict()
    with pytest.raises(KeyboardInterrupt): make(0, 'b', [Stop(6)]).fit(2, 1e-2)
    files = sorted((tmp_path/'b').iterdir())
    ask(make(3, 'b'))
    assert sorted((tmp_path/'b').iterdir())==files                  # nothing is written, nothing is begun
    same(whole, run(4, 'b', []))                                    # goes on
    learn = make(5, 'b'); learn.fit(2, 1e-2); ask(learn); same(whole, learn.model.state_dict()) # is passed over
    same(whole, run(6, 'b', []))
    learn = make(7, 'b'); learn.fit(2, 1e-2); learn.validate(); learn.fit(1, 1e-2)  # the second fit is the second, whatever was asked between
    assert sorted(o.name for o in (tmp_path/'b').iterdir())[-1]=='01-00001-000000.pt'

def test_what_constructors_take_is_taken_from_them(tmp_path):
    "Unless the training has changed it"
    class Mine(Callback):
        def __init__(self, limit, n=0): super().__init__(); store_attr(); self.middle = n
        def after_batch(self): self.n += self.training; self.middle = self.n/2
    class Heir(Mine):
        def __init__(self, **kw): super().__init__(**kw)
    def fit(cbs, stop=None):
        quiet(learner(tmp_path)).fit(3, 1e-2, cbs=[*cbs, ResumeCallback(tmp_path/'c', every=1), *([stop] if stop else [])])
        return cbs
    kinds = lambda n: [Mine(n), Heir(limit=n), EarlyStoppingCallback(patience=10*n), GradientAccumulation(4 if n==1 else 2)]
    with pytest.raises(KeyboardInterrupt): fit(kinds(1), Stop(7))
    a,b,early,acc = fit(kinds(2))
    assert (a.limit, a.n, a.middle)==(b.limit, b.n, b.middle)==(2, 12, 6.)
    assert (early.patience, acc.n_acc)==(20, 2) and early.best<float('inf')

def test_log_of_a_training_that_stopped_early(tmp_path):
    def fit(seed):
        quiet(learner(tmp_path, seed=seed)).fit(4, 0., cbs=[EarlyStoppingCallback(min_delta=10.), CSVLogger(), ResumeCallback(tmp_path/'c')])
        return (tmp_path/'history.csv').read_text()
    log = fit(0)
    assert 2<len(log.splitlines())<5 and fit(1)==log

def test_other_training_is_refused(tmp_path):
    quiet(learner(tmp_path)).fit(1, cbs=[small_mireg(), ResumeCallback(tmp_path/'c')])
    with pytest.raises(ValueError, match='was written by a training with MIRegCallback, here is ConsistencyCallback'):
        quiet(learner(tmp_path)).fit(1, cbs=[ConsistencyCallback(), ResumeCallback(tmp_path/'c')])
    with pytest.raises(ValueError, match='belongs to another training'): quiet(learner(tmp_path)).fit(2, cbs=[small_mireg(), ResumeCallback(tmp_path/'c')])

def test_last_good_checkpoint_survives_a_nan(tmp_path):
    class Breaks(ConsistencyCallback):
        def penalty(self, v): return super().penalty(v)*(float('nan') if v.pct>.5 else 1.)
    with pytest.raises(FloatingPointError, match=r'consistency is nan at step 3 \(epoch 0, batch 3\).*labelled: .*unlabelled: '):
        quiet(learner(tmp_path)).fit(1, 1e-2, cbs=[Breaks(), ResumeCallback(tmp_path/'c', every=1)])
    last = torch.load(sorted((tmp_path/'c').iterdir())[-1], weights_only=True)
    assert (last['train_iter'], last['iter'])==(3,3) and all(o.isfinite().all() for o in last['model'].values())

def test_lr_find_is_no_training(tmp_path):
    learn = quiet(learner(tmp_path, cbs=[ResumeCallback(tmp_path/'c')]))
    learn.lr_find(num_it=6, show_plot=False)
    assert not (tmp_path/'c').exists()
    learn.fit(1)
    assert len(list((tmp_path/'c').iterdir()))==1

"Trainings that are killed with SIGKILL, again and again, and called again: the same weights to the bit"
import itertools, json, os, re, shutil, signal, subprocess, sys, warnings
from pathlib import Path
import pandas as pd, pytest, torch
from fastai.basics import Callback, CancelFitException, CrossEntropyLossFlat, DataLoaders, SGD, set_seed, store_attr
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import GradientAccumulation
from fastmiseg.callback.baselines import ConsistencyCallback
from fastmiseg.callback.method import sigmoid_rampup
from fastmiseg.callback.plan import items_in_words
from fastmiseg.callback.resume import ResumeCallback
from fastmiseg.callback.state import checkpoints, load_state, plain
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.learner import Bfloat16Callback
from fastmiseg.lock import only_one
from fastmiseg.transforms import RandomFlips, RandomShifts
from toy import disc, learner, loaders, quiet, small_mireg
from killing import EPOCHS, METHODS, Noise, plain_loaders, steps

class Stop(Callback):
    "Interrupts after the nth step that this callback sees, or after the nth epoch"
    order = 95
    def __init__(self, n, after='batch'):
        super().__init__()
        self.n,self.after,self.count = n,after,itertools.count(1) # no part of a checkpoint
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
    res = subprocess.run([sys.executable, str(Path(__file__).with_name('killing.py')), str(root)],
                         env={**os.environ, 'OMP_NUM_THREADS':'1'}, capture_output=True, text=True)
    print(res.stdout) # the seed, and where each was killed
    assert res.returncode==0, (res.stdout+res.stderr)[-4000:]
    return root

@pytest.mark.parametrize('method', METHODS)
def test_killed_and_called_again(killed, method):
    a,b = (torch.load(killed/method/o/'result.pt', weights_only=False) for o in ('whole','cut'))
    assert len(a['losses'])==len(a['lrs'])==steps(method)
    same(a, b)

def test_log_is_whole(killed):
    logs = [[l.split(',')[:-1] for l in (killed/'tracked'/o/'history.csv').read_text().splitlines()]
            for o in ('whole','cut')]
    assert logs[0]==logs[1] and len(logs[0])==EPOCHS+1

def test_half_written_file_is_not_taken(tmp_path):
    learn = quiet(learner(tmp_path))
    learn.fit(1, 1e-2, cbs=ResumeCallback(tmp_path/'c', every=1, keep=3))
    good = checkpoints(tmp_path/'c')
    whole = good[-1].read_bytes()
    half = tmp_path/'c'/'.0123456789ab-000099.pt'
    for cut in (0, 10, len(whole)//2, len(whole)-1):                # a disk that lied
        half.write_bytes(whole)                                     # was being written
        good[-1].write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match='is damaged'):
            quiet(learn:=learner(tmp_path, seed=1)).fit(1, 1e-2, cbs=ResumeCallback(tmp_path/'c', every=1, keep=3))
        assert load_state(good[-1])['over'] and not half.exists()

def test_progress_bar_of_a_later_epoch(tmp_path):
    "fastai's bar in a terminal, which has a clock that starts with its first step"
    class Stop(Callback):
        order = 95
        def after_batch(self):
            if self.training and self.epoch==1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learner(tmp_path).fit(2, cbs=[ResumeCallback(tmp_path/'c', every=1), Stop()])
    learn = learner(tmp_path); learn.fit(2, cbs=ResumeCallback(tmp_path/'c', every=1))
    assert hasattr(learn, 'progress') and len(learn.recorder.values)>0

def test_a_fit_that_goes_on_knows_which_terms_had_a_gradient(tmp_path):
    "Interrupted in a validation, it sees no step of the epoch"
    class Stop(Callback):
        def before_validate(self): raise KeyboardInterrupt
    fit = lambda *cbs: quiet(learner(tmp_path)).fit(1, cbs=[small_mireg(), ResumeCallback(tmp_path/'c', every=1), *cbs])
    with pytest.raises(KeyboardInterrupt): fit(Stop())
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*had no gradient')
        fit()

def test_more_epochs_of_a_finished_training_in_bf16(tmp_path):
    "At its end the autocast is gone"
    for n in (1,2):
        learn = quiet(learner(tmp_path, cbs=Bfloat16Callback()))
        learn.fit(n, cbs=[small_mireg(), ResumeCallback(tmp_path/'c', change=n>1)])
    assert len(learn.recorder.values)==2

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
    fit = lambda cb: quiet(learner(tmp_path)).fit(
        1, 1e-3, cbs=[small_mireg(), ResumeCallback(tmp_path/'c', every=1), cb])
    with pytest.raises(KeyboardInterrupt): fit(Stop())
    with pytest.raises(FloatingPointError, match=r'batch 3.*The batch came from labelled: \d.*; unlabelled: \d'):
        fit(Broken())

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
                              splitter=lambda m: [
                                  list(m.net.Conv1.parameters()),
                                  [p for n,p in m.named_parameters() if not n.startswith('net.Conv1.')]]))
        learn.fine_tune(2, 1e-2, freeze_epochs=freeze_epochs,
                        cbs=[small_mireg(unlabeled=list(range(9,16)) if files else None), Epochs(),
                             ResumeCallback(tmp_path/path, every=every), *cbs])
        return learn.model.state_dict()
    whole = attempts(tune, 'a')
    same(whole, attempts(tune, 'b', Stop(at)))
    assert seen==[(2,0),(2,1)] or every==1 or freeze_epochs==0

def test_interrupted_at_an_epochs_end_and_in_the_next(tmp_path):
    "The order of the images of an epoch that has been begun twice"
    def fit(seed, path, cbs):
        set_seed(seed)
        learn = quiet(learner(tmp_path, net=Noise, seed=seed, dls=plain_loaders()))
        learn.fit(3, 1e-2, cbs=[ConsistencyCallback(unlabeled=list(range(9,16))),
                                ResumeCallback(tmp_path/path, every=1), *cbs])
        return learn.model.state_dict()
    same(attempts(fit, 'a'), attempts(fit, 'b', Stop(1, 'epoch'), Stop(2), Stop(4), Stop(1), Stop(1, 'epoch')))

def torch_loaders(batches):
    "PyTorch's, with generators of their own: labelled and validation, and unlabelled"
    def of(ids, bs, shuffle, mask=True):
        own,data = torch.Generator().manual_seed(7),[disc(i) if mask else disc(i)[0] for i in ids]
        if not shuffle: return torch.utils.data.DataLoader(data, bs)
        if not batches: return torch.utils.data.DataLoader(data, bs, shuffle=True, generator=own)
        order = torch.utils.data.RandomSampler(data, generator=own)
        return torch.utils.data.DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(order, bs, False))
    return DataLoaders(of(range(8), 2, True), of(range(8,12), 2, False)), of(range(12,20), 4, True, mask=False)

@pytest.mark.parametrize('batches', [False,True])
def test_loaders_that_draw_from_a_generator(tmp_path, batches):
    "After their first round they went on with other images than those that would have come"
    def fit(seed, path, cbs, find=False):
        dls,unlabelled = torch_loaders(batches)
        learn = quiet(learner(tmp_path, seed=seed, dls=dls))
        learn.add_cb(ConsistencyCallback(unlabeled=unlabelled))
        if find:
            with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
        learn.fit(3, 1e-2, cbs=[ResumeCallback(tmp_path/path, every=1), *cbs])
        return learn.model.state_dict()
    whole = attempts(fit, 'a')
    same(whole, attempts(fit, 'b', Stop(6), Stop(3)))
    same(whole, fit(0, 'c', [], find=True))

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
        mine = [mi:=small_mireg(), teacher:=EMATeacherCallback(decay=.9), GradientAccumulation(4),
                ResumeCallback(tmp_path/path, every=100), *cbs]
        for n in (1,2): learn.fit_one_cycle(n, 1e-2, cbs=mine)
        return dict(model=learn.model.state_dict(), heads=mi.projectors.state_dict(), teacher=teacher.average.tensors)
    same(attempts(fit, 'a'), attempts(fit, 'b', Stop(*stop)))

def test_validation_is_no_fit(tmp_path):
    "In the learner's constructor, as any callback"
    def make(seed, path, cbs=()):
        return quiet(learner(tmp_path, seed=seed, cbs=[small_mireg(), ResumeCallback(tmp_path/path, every=1), *cbs]))
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
    learn = make(7, 'b')
    learn.fit(2, 1e-2)
    learn.validate()
    learn.fit(1, 1e-2) # the second fit is the second, whatever was asked between
    assert (last:=load_state(checkpoints(tmp_path/'b')[-1]))['fit']==1 and last['over'] and last['done']==1

def test_what_constructors_take_is_taken_from_them(tmp_path):
    "Unless the training has changed it"
    class Mine(Callback):
        def __init__(self, limit, n=0): super().__init__(); store_attr(); self.middle = n
        def after_batch(self): self.n += self.training; self.middle = self.n/2
    class Heir(Mine):
        def __init__(self, **kw): super().__init__(**kw)
    def fit(cbs, stop=None):
        quiet(learner(tmp_path)).fit(3, 1e-2, cbs=[*cbs, ResumeCallback(tmp_path/'c', every=1),
                                                   *([stop] if stop else [])])
        return cbs
    kinds = lambda n: [Mine(n), Heir(limit=n), EarlyStoppingCallback(patience=10*n)]
    with pytest.raises(KeyboardInterrupt): fit(kinds(1), Stop(7))
    a,b,early = fit(kinds(2))
    assert (a.limit, a.n, a.middle)==(b.limit, b.n, b.middle)==(2, 12, 6.)
    assert early.patience==20 and early.best<float('inf')

def test_log_of_a_training_that_stopped_early(tmp_path):
    def fit(seed):
        quiet(learner(tmp_path, seed=seed)).fit(
            4, 0., cbs=[EarlyStoppingCallback(min_delta=10.), CSVLogger(), ResumeCallback(tmp_path/'c')])
        return (tmp_path/'history.csv').read_text()
    log = fit(0)
    assert 2<len(log.splitlines())<5 and fit(1)==log

# under other settings

def plan(path, cbs=None, lr=1e-3, epochs=2, stop=None, change=False, every=1, dls=None, fit='fit', width=2, **kw):
    "Train under settings that can be changed one by one"
    learn = quiet(learner(path, dls=dls() if dls else None, width=width, **kw))
    cbs = [small_mireg(), EMATeacherCallback(decay=.9)] if cbs is None else cbs()
    resume = ResumeCallback(path/'c', every=every, change=change)
    getattr(learn, fit)(epochs, lr, cbs=[*cbs, resume, *([stop] if stop else [])])
    return learn,cbs

mireg = lambda **kw: lambda: [small_mireg(**kw), EMATeacherCallback(decay=.9)]
def with_weight(w): return CrossEntropyLossFlat(axis=1, weight=torch.tensor([1.,w]))

OTHER = {
    'rate': (dict(lr=1e-5), [r'lr: 0\.001, here 1e-05']),
    'schedule': (dict(fit='fit_one_cycle'), ['lr: 0.001, here 4e-05 at 0%, ', 'mom: 0.9, here 0.95 at 0%, ']),
    'epochs': (dict(epochs=3), ['epochs: 2, here 3']),
    'batches': (dict(dls=lambda: loaders(n_iters=6)), ['batches: 4, here 6']),
    'batch size': (dict(dls=lambda: loaders(bs=3)), ['batch size: 2, here 3']),
    'unlabelled batch size': (dict(dls=lambda: loaders(unlabeled_bs=4)), ['unlabelled batch size: 3, here 4']),
    'seed of the draws': (dict(dls=lambda: loaders(seed=5)), ['seed of the draws: 0, here 5']),
    'unlabelled images': (dict(dls=lambda: loaders(n=21)),
                          [r'unlabelled images: 11 from 9 to 19 \(\w+\), here 12 from 9 to 20 \(\w+\)']),
    'weight': (dict(cbs=mireg(global_weight=.2)), ['MIRegCallback, weight of global_mi: 0.1, here 0.2']),
    'schedule of a weight': (dict(cbs=mireg(consistency_weight=sigmoid_rampup(5., .8))),
                             [r'weight of consistency: 5, '
                              r'here sigmoid_rampup\(5\.0, 0\.8\): 0\.033.* at 0%, .*5 at 100%']),
    'clusters': (dict(cbs=mireg(n_clusters=4)),
                 ['MIRegCallback, n_clusters: {Conv5: 3, Upconv3: 3}, here {Conv5: 4, Upconv3: 4}']),
    'decay': (dict(cbs=lambda: [small_mireg(), EMATeacherCallback(decay=.8)]),
              ['EMATeacherCallback, decay: 0.9, here 0.8']),
    'T': (dict(cbs=mireg(T=RandomFlips((-1,))+RandomShifts(.5))),
          [r'T: RandomFlips\(axes=\(-2, -1\), p=0\.5\), here _Pools\(.*RandomShifts\(most=0\.5\)']),
    'method': (dict(cbs=lambda: [ConsistencyCallback()]),
               ['methods: MIRegCallback, EMATeacherCallback, here ConsistencyCallback']),
    'no method': (dict(cbs=list), ['methods: MIRegCallback, EMATeacherCallback, here none']),
    'weight decay': (dict(wd=.1), ['wd: 0.01, here 0.1']),
    'optimiser': (dict(opt_func=SGD), ['optimizer: .*adam_step, here .*sgd_step']),
    'accumulation': (dict(cbs=lambda: [*mireg()(), GradientAccumulation(4)]),
                     [r'GradientAccumulation: nothing, here \{n_acc: 4\}']),
    'precision': (dict(cbs=lambda: [*mireg()(), Bfloat16Callback()]),
                  [r'Bfloat16Callback: nothing, here \{kwargs: \{\}\}']),
    'loss': (dict(loss_func=with_weight(2.)),
             [r'loss function: CrossEntropyLossFlat\(.*, here CrossEntropyLossFlat\(.*weight=\(1, 2\)']),
}

@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    "A run that was interrupted in the middle of its first epoch"
    path = tmp_path_factory.mktemp('other')
    with pytest.raises(KeyboardInterrupt): plan(path, stop=Stop(2))
    return path/'c'

def copied(run, path):
    shutil.copytree(run, path/'c')
    return path

def one_line(texts): return [t.replace('{', r'\{').replace('}', r'\}') if '\\' not in t else t for t in texts]

@pytest.mark.parametrize('what', OTHER)
def test_other_settings_are_refused_with_both_values(interrupted, tmp_path, what):
    kw,texts = OTHER[what]
    path = copied(interrupted, tmp_path)
    before = {f.name: f.read_bytes() for f in (path/'c').iterdir()}
    with pytest.raises(ValueError, match=r'000002\.pt was written by a training with other settings:') as e:
        plan(path, **kw)
    for text in one_line(texts): e.match(text)
    e.match('change=True')
    assert {f.name: f.read_bytes() for f in (path/'c').iterdir()}==before

@pytest.mark.parametrize('what', OTHER)
def test_other_settings_on_purpose(interrupted, tmp_path, what):
    "Goes on with the new ones, says so, and a run so changed is resumed to the bit"
    kw,texts = OTHER[what]
    results = []
    for name,stop in (('a',None), ('b',Stop(2))):
        path = copied(interrupted, tmp_path/name)
        if stop:
            with pytest.warns(UserWarning), pytest.raises(KeyboardInterrupt): plan(path, change=True, stop=stop, **kw)
            learn,_ = plan(path, seed=3, **kw)                                    # the settings are the run's by now
        else:
            with pytest.warns(UserWarning, match='goes on from .*000002.pt under other settings:') as w:
                learn,_ = plan(path, change=True, **kw)
            said = '\n'.join(str(o.message) for o in w)
            for text in one_line(texts): assert re.search(text, said), said
        results.append(dict(model=learn.model.state_dict(), steps=learn.train_iter, lrs=list(learn.recorder.lrs)))
    same(*results)
    new = dict(epochs=2, batches=4)
    if what in ('epochs','batches'): new[what] = {'epochs':3, 'batches':6}[what]
    begun = 2 if what=='batches' else 0 # the epoch that was interrupted begins anew
    assert results[0]['steps']==begun+new['epochs']*new['batches']
    if what=='rate': assert results[0]['lrs'][2:]==[1e-5]*6

def test_changed_rate_keeps_what_the_optimiser_has_learnt(interrupted, tmp_path):
    path,seen = copied(interrupted, tmp_path),[]
    class Look(Callback):
        order = 99
        def before_train(self):
            seen.append((self.opt.hypers[-1]['lr'], max(s.get('step', 0) for s in self.opt.state.values())))
    with pytest.warns(UserWarning): plan(path, cbs=lambda: [*mireg()(), Look()], lr=1e-5, change=True)
    assert seen[0]==(1e-5, 2)

def test_another_network_is_refused_in_any_case(interrupted, tmp_path):
    path = copied(interrupted, tmp_path)
    for change in (False, True):
        with pytest.raises(ValueError, match=r'UNet, \d+ parameters \(\w+\), here UNet, \d+ parameters'):
            plan(path, width=3, change=change)
    with pytest.raises(ValueError, match='has the weights of another network'): plan(path, width=3, change=True)

def test_training_on(tmp_path):
    "More epochs for a training that is over, or stopped early; the schedule is the new one at the place of the old"
    whole,_ = plan(tmp_path, fit='fit_one_cycle')
    learn,_ = plan(tmp_path, fit='fit_one_cycle', seed=1)
    same(whole.model.state_dict(), learn.model.state_dict())
    with pytest.raises(ValueError, match='epochs: 2, here 4'): plan(tmp_path, fit='fit_one_cycle', epochs=4)
    with pytest.warns(UserWarning, match='epochs: 2, here 4'):
        learn,_ = plan(tmp_path, fit='fit_one_cycle', epochs=4, change=True)
    fresh,_ = plan(tmp_path/'fresh', fit='fit_one_cycle', epochs=4)
    assert learn.recorder.lrs[:8]==whole.recorder.lrs and learn.recorder.lrs[8:]==pytest.approx(fresh.recorder.lrs[8:])
    assert len(learn.recorder.values)==4 and learn.recorder.values[:2]==whole.recorder.values
    with pytest.raises(ValueError, match='3 epochs are fewer than the 4 that .* has begun; ask for 4 or more'):
        plan(tmp_path, fit='fit_one_cycle', epochs=3, change=True)

@pytest.mark.parametrize('when', ['after_batch','after_epoch'])
def test_training_on_after_an_early_end(tmp_path, when):
    "Begins with the first epoch that is not done"
    class End(Callback):
        order = 70
        def _end(self):
            if self.epoch==1 and self.training==(when=='after_batch'): raise CancelFitException()
        def after_batch(self):
            if when=='after_batch' and self.training: self._end()
        def after_epoch(self):
            if when=='after_epoch': self._end()
    seen = []
    class Epochs(Callback):
        def before_epoch(self): seen.append(self.epoch)
    plan(tmp_path, cbs=lambda: [*mireg()(), End()], epochs=5)
    with pytest.warns(UserWarning, match='epochs: 5, here 4'):
        learn,_ = plan(tmp_path, cbs=lambda: [*mireg()(), Epochs()], epochs=4, change=True)
    assert seen==([1,2,3] if when=='after_batch' else [2,3])
    assert len(learn.recorder.values)==4

def test_settings_of_a_fit_that_is_over(tmp_path):
    "Each fit of a callback has its own plan, and is compared with it"
    def tune(base_lr, stop=None):
        learn = quiet(learner(tmp_path, splitter=lambda m: [
            list(m.Conv1.parameters()), [p for n,p in m.named_parameters() if not n.startswith('Conv1.')]]))
        learn.fine_tune(2, base_lr, cbs=[small_mireg(), ResumeCallback(tmp_path/'c', every=1),
                                         *([stop] if stop else [])])
    with pytest.raises(KeyboardInterrupt): tune(1e-2, Stop(6))
    with pytest.raises(ValueError, match='lr: .*, here '): tune(1e-3)
    tune(1e-2)

def test_log_with_other_columns(interrupted, tmp_path):
    path = copied(interrupted, tmp_path)
    plan(path)
    with pytest.warns(UserWarning, match='the log begins anew, its columns were .*global_mi'):
        learn,_ = plan(path, cbs=lambda: [ConsistencyCallback()], epochs=3, change=True)
    assert len(learn.recorder.values)==1 and len(learn.recorder.values[0])==len(learn.recorder.metric_names)-2

def test_data_of_the_same_number_are_told_apart():
    "By names, order, or what they hold; nothing is read for it"
    for a,b in ((['a','b'],['a','c']), (['a','b','c'],['b','a','c']),
                (pd.DataFrame({'f':[1,2]}), pd.DataFrame({'f':[1,3]})),
                ([torch.zeros(3)],[torch.ones(3)]), ([('a',0)],[('a',1)]), (range(3), range(1,4))):
        assert (items_in_words(a)!=items_in_words(b)
                and items_in_words(a)==items_in_words(type(a)(a) if isinstance(a, list) else a))
    class Lazy:
        def __len__(self): return 7
        def __getitem__(self, i): raise AssertionError('is not to be read')
    assert items_in_words(Lazy())=='7'
    class Thing: pass
    assert items_in_words([Thing()])==items_in_words([Thing()])

@pytest.mark.parametrize('at', [3, 6])
def test_interrupted_fit_is_called_again_with_the_same_callback(tmp_path, at):
    "In the learner's constructor, as in a notebook whose cell is run again"
    whole,_ = plan(tmp_path/'whole')
    resume = ResumeCallback(tmp_path/'c', every=1)
    learn = quiet(learner(tmp_path, cbs=[resume]))
    with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-3, cbs=[*mireg()(), Stop(at)])
    with pytest.raises(ValueError, match='lr: 0.001, here 1'): learn.fit(2, 1., cbs=mireg()())
    learn.fit(2, 1e-3, cbs=mireg()())
    assert learn.train_iter==8
    same(whole.model.state_dict(), learn.model.state_dict())
    learn.fit(1, 1e-3, cbs=mireg()())                                 # the second fit
    assert load_state(checkpoints(tmp_path/'c')[-1])['fit']==1

# damage

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp('finished')
    plan(path, epochs=1)
    return path/'c'

def test_every_damage_of_the_same_size_is_seen(finished, tmp_path):
    "Single bits and stretches, all over the file"
    path = copied(finished, tmp_path)
    last = checkpoints(path/'c')[-1]
    whole = last.read_bytes()
    places = [i*len(whole)//97 for i in range(97)] + [len(whole)-1]
    for k,i in enumerate(places):
        broken = bytearray(whole)
        broken[i:i+1+k%3*40] = bytes(o^(1<<k%8) for o in broken[i:i+1+k%3*40])
        last.write_bytes(broken)
        with pytest.raises(ValueError, match=r'\d+\.pt: is damaged, its contents do not have the checksum'):
            load_state(last)

def test_last_intact_checkpoint_is_taken_and_said(finished, tmp_path):
    path = copied(finished, tmp_path)
    before,last = checkpoints(path/'c')
    raw = bytearray(last.read_bytes())
    raw[len(raw)//2] ^= 1
    last.write_bytes(raw)
    with pytest.warns(UserWarning, match=f'{last.name}: is damaged.*'
                                         f'The last intact checkpoint is taken, .*{before.name}'):
        plan(path, epochs=1)
    for f in checkpoints(path/'c'): f.write_bytes(f.read_bytes()[:-1]+b'x')
    with pytest.raises(ValueError, match='There is no intact checkpoint in .*delete the folder to begin anew'):
        plan(path, epochs=1)

def test_file_without_checksum_is_damaged(tmp_path):
    torch.save(dict(fit=0), tmp_path/'000001.pt')
    with pytest.raises(ValueError, match='is damaged'): load_state(tmp_path/'000001.pt')

def test_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path/'000001.pt')
    with pytest.raises(ValueError, match='000001.pt: is not a regular file, and was not opened'):
        load_state(tmp_path/'000001.pt')

# two at a time

TRAIN = """
import sys, time; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from fastai.basics import Callback
from test_resume import *
class Wait(Callback):
    order = 99
    def after_batch(self):
        if self.training and self.train_iter==2: print('ready', flush=True); time.sleep(120)
torch.set_num_threads(1)
dls = loaders(num_workers=int(sys.argv[3]))
cbs = [small_mireg(), EMATeacherCallback(decay=.9), ResumeCallback(Path(sys.argv[2])/'c', every=1), Wait()]
quiet(learner(sys.argv[2], dls=dls)).fit(2, 1e-3, cbs=cbs)
"""

def started(path, code=TRAIN, workers=0):
    "A training in a process of its own, at its second step"
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code,
                          str(Path(__file__).parent), str(path), str(workers)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, 'OMP_NUM_THREADS':'1'})
    for line in p.stdout:
        if line.strip()=='ready': return p
    raise AssertionError(p.stderr.read())

def test_second_training_is_told_and_a_killed_one_does_not_block(tmp_path):
    "With worker processes, which outlive a training that is killed"
    p = started(tmp_path, workers=2)
    try:
        note = json.loads((tmp_path/'c'/'in-use').read_text())
        assert note['process']==p.pid
        before = sorted(f.name for f in (tmp_path/'c').iterdir())
        with pytest.raises(ValueError, match=rf"ResumeCallback: .*c: is in use by process {p.pid} on .*, since \d.*; "
                                             "wait for it, stop it, or choose another folder"):
            plan(tmp_path)
        assert sorted(f.name for f in (tmp_path/'c').iterdir())==before
    finally:
        p.kill()
        p.wait()
    assert (tmp_path/'c'/'in-use').exists()                          # what a killed one leaves is no lock
    learn,_ = plan(tmp_path)
    assert learn.train_iter==8 and not (tmp_path/'c'/'in-use').exists()

def test_lock_is_given_back_however_a_fit_ends(tmp_path):
    class Bomb(Callback):
        order = 99
        def __init__(self, e): self.e = e
        def after_batch(self):
            if self.training: raise self.e
    for e in (KeyboardInterrupt(), RuntimeError('boom'), ValueError('boom')):
        with pytest.raises(type(e)): plan(tmp_path, cbs=lambda: [*mireg()(), Bomb(e)])
        assert not (tmp_path/'c'/'in-use').exists()
        with only_one(tmp_path/'c'): pass
    with only_one(tmp_path/'c'):
        with pytest.raises(ValueError, match=f'is in use by process {os.getpid()}'): plan(tmp_path)
    with pytest.raises(ValueError, match='other settings'): plan(tmp_path, lr=1.)
    plan(tmp_path)

def test_lock_and_forks(tmp_path):
    "A forked process neither keeps a lock nor gives it back"
    if not hasattr(os, 'fork'): pytest.skip('needs os.fork')
    held = only_one(tmp_path)
    held.__enter__()
    r,w = os.pipe()
    if not (pid:=os.fork()):
        os.close(w)
        try: held.__exit__(None, None, None)
        finally:
            os.read(r, 1)
            os._exit(0)
    os.close(r)
    assert (tmp_path/'in-use').exists()
    with pytest.raises(ValueError, match='is in use by process'): only_one(tmp_path).__enter__()
    held.__exit__(None, None, None)
    with only_one(tmp_path): pass                                    # while the fork lives
    os.close(w)
    os.waitpid(pid, 0)

# Ctrl-C while a checkpoint is written, and disks that are full

WRITING = TRAIN.replace("class Wait(Callback):", """import fastmiseg.files as files
def slow(f, n=itertools.count(1)):
    if next(n)==3:
        try: # the signal may come before the next line
            print('ready', flush=True)
            time.sleep(120)
        finally:
            if sys.argv[4:]: print('cleaning', flush=True); time.sleep(120)
    return fsync(f)
fsync,os.fsync = os.fsync,slow
class Wait(Callback):""").replace("self.train_iter==2", "False")

@pytest.mark.parametrize('slow_cleaning', [False, True])
def test_interrupted_while_a_checkpoint_is_written(tmp_path, slow_cleaning):
    "The ones before are whole; a second Ctrl-C ends it at once, whatever is being cleaned up"
    if slow_cleaning and 'PYTEST_XDIST_WORKER' in os.environ:
        pytest.skip('two signals in time need a core: run without -n')
    code = WRITING.replace('sys.argv[4:]', str(slow_cleaning))
    p = started(tmp_path, code)
    p.send_signal(signal.SIGINT)
    if slow_cleaning:
        assert p.stdout.readline().strip()=='cleaning'
        p.send_signal(signal.SIGINT)
    assert 'KeyboardInterrupt' in p.communicate(timeout=60)[1] and p.returncode!=0
    files = checkpoints(tmp_path/'c')
    assert files and [load_state(f)['number'] for f in files]==list(range(1, len(files)+1))
    assert not (tmp_path/'c'/'in-use').exists() and not list((tmp_path/'c').glob('.*'))
    learn,_ = plan(tmp_path)
    assert learn.train_iter==8

def test_full_disk_is_said_with_the_files_name(tmp_path):
    resource = pytest.importorskip('resource')
    plan(tmp_path, epochs=1)
    size = checkpoints(tmp_path/'c')[-1].stat().st_size
    before = {f.name: f.read_bytes() for f in (tmp_path/'c').iterdir()}
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size//2, hard))       # as a disk that has no room for the second half
    try:
        with pytest.raises(OSError, match=r'c/\d+\.pt: cannot be written \(File too large; \d+ MB are free there\); '
                                          'the checkpoints before it are whole: '
                                          'make room and start the training again'):
            with pytest.warns(UserWarning): plan(tmp_path, epochs=2, change=True)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {f.name: f.read_bytes() for f in (tmp_path/'c').iterdir()}==before

def test_last_good_checkpoint_survives_a_nan(tmp_path):
    class Breaks(ConsistencyCallback):
        def penalty(self, v): return super().penalty(v)*(float('nan') if v.pct>.5 else 1.)
    with pytest.raises(FloatingPointError, match=r'consistency is nan at step 3 \(epoch 0, batch 3\).*'
                                                 'labelled: .*unlabelled: '):
        quiet(learner(tmp_path)).fit(1, 1e-2, cbs=[Breaks(), ResumeCallback(tmp_path/'c', every=1)])
    last = load_state(checkpoints(tmp_path/'c')[-1])
    assert (last['train_iter'], last['iter'])==(3,3) and all(o.isfinite().all() for o in last['model'].values())

def test_lr_find_is_no_training(tmp_path):
    learn = quiet(learner(tmp_path, cbs=[ResumeCallback(tmp_path/'c')]))
    learn.lr_find(num_it=6, show_plot=False)
    assert not (tmp_path/'c').exists()
    learn.fit(1)
    assert [load_state(f)['over'] for f in checkpoints(tmp_path/'c')]==[False,True]

def test_losses_of_this_epoch_are_still_on_the_device():
    "and those of the epochs before are not: a checkpoint keeps them together"
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(allow_non_fake_inputs=True):
        mixed = [torch.zeros((), device=d) for d in ('cpu','cpu','cuda','cuda','cpu')]
        kept = plain(mixed)['stacked']
    assert kept.shape==(5,) and kept.device.type=='cpu'

"Trainings that are killed with SIGKILL, again and again, and called again: the same weights to the bit"
import os, subprocess, sys
from pathlib import Path
import pytest, torch
from fastai.basics import Callback
from fastmiseg.callback.baselines import ConsistencyCallback
from fastmiseg.callback.resume import ResumeCallback
from toy import learner, quiet, small_mireg
from killing import EPOCHS, METHODS

def same(a, b):
    assert a.keys()==b.keys()
    for k in a:
        if isinstance(a[k], dict): same(a[k], b[k])
        elif isinstance(a[k], torch.Tensor): assert torch.equal(a[k], b[k]), k
        else: assert a[k]==b[k], k

@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    "Two kills for each method, in processes forked from a fresh one"
    if not hasattr(os, 'fork'): pytest.skip('needs os.fork')
    root = tmp_path_factory.mktemp('killed')
    res = subprocess.run([sys.executable, str(Path(__file__).with_name('killing.py')), str(root)], env={**os.environ, 'OMP_NUM_THREADS':'1'}, capture_output=True, text=True)
    assert res.returncode==0, (res.stdout+res.stderr)[-4000:]
    return root

@pytest.mark.parametrize('method', METHODS)
def test_killed_and_called_again(killed, method):
    a,b = (torch.load(killed/method/o/'result.pt', weights_only=False) for o in ('whole','cut'))
    assert len(a['losses'])==len(a['lrs'])==12 or method in ('files','torch_loader')
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

def test_several_fits_share_one_callback(tmp_path):
    "As `fine_tune` does: the fit that is over is passed over"
    class Stop(Callback):
        order = 95
        n = 0
        def after_batch(self):
            self.n += self.training
            if self.n==6: raise KeyboardInterrupt
    def run(path, stop=False, seed=0):
        learn = quiet(learner(tmp_path, seed=seed, splitter=lambda m: [list(m.Conv1.parameters()), [p for n,p in m.named_parameters() if not n.startswith('Conv1.')]]))
        try: learn.fine_tune(2, 1e-2, cbs=[small_mireg(), ResumeCallback(tmp_path/path, every=1)]+([Stop()] if stop else []))
        except KeyboardInterrupt: pass
        return learn.model.state_dict()
    whole = run('a')
    run('b', stop=True)
    same(whole, run('b', seed=5))

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

"""One training from its settings: files of settings, options of the command, every method, and going on after an
interruption"""
import inspect, json, os, sys, warnings
from dataclasses import fields, replace
import pandas as pd, pytest, torch
from fastai.basics import Callback
from fastmiseg import cli
from fastmiseg.callback.method import SemiSupCallback
from fastmiseg.commands import settings_from, train_run
from fastmiseg.preparing import Preparation
from fastmiseg.warps import usual_pool
from fastmiseg.methods import methods, terms
from fastmiseg.scans.phantom import make_phantom
from fastmiseg.settings import Settings, json_object, read_settings, schedule, weight
from fastmiseg.training import callbacks_of, check_scans, fit, pretrain, semisup_cbs

tiny = Settings(epochs=2, n_iters=3, width=2, bs=2, unlabeled_bs=2)

def test_options_are_the_fields_of_settings():
    "No option of a training is written a second time, and none is missing"
    options = inspect.signature(cli.train).parameters
    own = {'data','out','resume','settings','workers','overwrite','folds'}
    assert set(options)==own|{f.name for f in (*fields(Preparation), *fields(Settings))}

@pytest.mark.parametrize('method', methods)
def test_usual_weights_are_those_of_the_callbacks(method):
    "The table says what the callbacks get, term by term"
    cbs = callbacks_of(Settings(method=method))
    for cb in cbs: cb.join(cbs)
    assert all(isinstance(o, SemiSupCallback) for o in cbs)
    got = {'consistency' if k=='mean_teacher' else k:w for o in cbs for k,w in o.weights.items()}
    said = lambda o: getattr(o, '__name__', o)
    assert {k:said(o) for k,o in got.items()}=={k:said(schedule(o)) for k,o in methods[method].weights.items()}
    assert set(got)<=set(terms)

def test_settings_from_files(tmp_path):
    (tmp_path/'a.json').write_text(json.dumps(dict(method='teacher', consistency=[5.,.8], adam=dict(eps=1e-5))))
    s = Settings.from_file(tmp_path/'a.json')
    assert s==Settings(method='teacher', consistency=[5.,.8], adam=dict(eps=1e-5))
    if sys.version_info>=(3,11):
        (tmp_path/'a.toml').write_text('method = "teacher"\nconsistency = [5.0, 0.8]\n[adam]\neps = 1e-5\n')
        assert Settings.from_file(tmp_path/'a.toml')==s
        (tmp_path/'bad.toml').write_text('method = ')
        with pytest.raises(ValueError, match='bad.toml: is not TOML'): read_settings(tmp_path/'bad.toml')
        (tmp_path/'deep.toml').write_text('a = ' + '['*50 + ']'*50)
        with pytest.raises(ValueError, match='deep.toml: is nested more than 20 levels deep'):
            read_settings(tmp_path/'deep.toml')
        (tmp_path/'when.toml').write_text('lr = 2020-01-01')
        with pytest.raises(ValueError, match='when.toml: holds a value that no setting can have'):
            read_settings(tmp_path/'when.toml')
    (tmp_path/'bad.json').write_text('{')
    with pytest.raises(ValueError, match='bad.json: is not JSON'): read_settings(tmp_path/'bad.json')
    with pytest.raises(ValueError, match='none.json: cannot be read as settings'): read_settings(tmp_path/'none.json')
    (tmp_path/'deep.json').write_text('['*100_000 + ']'*100_000)
    with pytest.raises(ValueError, match='deep.json: is nested too deeply'): read_settings(tmp_path/'deep.json')
    (tmp_path/'nan.json').write_text('{"lr": NaN}')
    with pytest.raises(ValueError, match='nan.json: holds NaN, expected finite numbers'):
        read_settings(tmp_path/'nan.json')
    os.mkfifo(tmp_path/'pipe.json')
    with pytest.raises(ValueError, match='pipe.json: is not a regular file'): read_settings(tmp_path/'pipe.json')
    (tmp_path/'list.json').write_text('[1]')
    with pytest.raises(ValueError, match='settings: expected names and values, got list'):
        Settings.from_file(tmp_path/'list.json')

@pytest.mark.parametrize('bad,said', [
    (dict(epochs=0), 'epochs: 0 is below 1'),
    (dict(method='pretrain', epochs=1), 'epochs: pretraining takes half of them'),
    (dict(epochs=1.5), 'epochs: expected int, got 1.5'),
    (dict(skip_bad=1), 'skip_bad: expected bool, got 1'),
    (dict(lr='fast'), "lr: expected float, got 'fast'"),
    (dict(method=None), 'method: expected str, got None'),
    (dict(mireg=[1]), r'mireg: expected dict, got \[1\]'),
    (dict(consistency=[5]), r'consistency: \[5\] is not a weight'),
    (dict(consistency='5'), "consistency: '5' is not a weight"),
    (dict(consistency=[5,.5,'up']), 'is not a weight; give a number, or'),
    (dict(flips='x'), "flips: got 'x', expected h, v, hv or none"),
    (dict(lr=0.), 'lr: 0.0 is not above 0, and below 1000'),
    (dict(lr=float('nan')), 'lr: nan is not above 0'),
    (dict(div=0.), 'div: 0.0 is not above 0'),
    (dict(pct_start=1.), 'pct_start: 1.0 is not between 0 and 1'),
    (dict(wd=-1.), 'wd: -1.0 is not a number from 0 on'), (dict(wd=float('nan')), 'wd: nan is not'),
    (dict(consistency=float('nan')), 'consistency: nan is not a number from 0 on'),
    (dict(decay=1.), 'decay: 1.0 is not between 0 and 1'),
    (dict(width=10**6), 'width: 1000000 is not at most 4096'),
    (dict(loss='dice'), "loss: got 'dice', expected ce or ce\\+dice"),
    (dict(precision='fp8'), "precision: got 'fp8', expected fp32, bf16 or fp16"),
    (dict(passes=4), 'passes: 4 is not 1, 2 or 3')])
def test_wrong_settings(bad, said):
    with pytest.raises(ValueError, match=said): Settings.from_dict(bad)

@pytest.mark.parametrize('bad,said', [
    (dict(mireg=dict(clusters=3)),
     "mireg: MIRegCallback takes no 'clusters' here; there are global_layers, local_layers, n_clusters"),
    (dict(mireg=dict(T=1)), "mireg: MIRegCallback takes no 'T' here"),
    (dict(mireg=dict(neighborhood=3)), 'neighborhood: 3 is not a window for each local stage; give'),
    (dict(mireg=dict(global_layers=5)), 'mireg: .*cannot be used'),
    (dict(method='pseudo', labels=dict(weight=1)),
     "labels: PseudoLabelCallback takes no 'weight' here; there are threshold"),
    (dict(labels=dict(dropped=.5)),
     "labels: are arguments of PseudoLabelCallback, which the method 'recommended' does not have"),
    (dict(method='pseudo', mireg=dict(memory=0.)),
     "mireg: are arguments of MIRegCallback, which the method 'pseudo' does not have"),
    (dict(method='partial', paste=dict(side=.5)), "paste: are arguments of CopyPasteCallback, which")])
def test_wrong_arguments_of_callbacks(bad, said):
    with pytest.raises(ValueError, match=said): callbacks_of(Settings(**bad))

@pytest.mark.parametrize('adam,more,said', [
    (dict(epss=1), {}, "adam: 'epss' is nothing that it takes here; there are eps, sqr_mom, decouple_wd; lr and wd"),
    (dict(wd=.5), {}, "adam: 'wd' is nothing that it takes here"), (dict(lr=1.), {}, "adam: 'lr' is nothing"),
    (dict(mom=.5), {}, "adam: 'mom' is nothing that it takes here"),
    (dict(beta=.5), dict(one_cycle=False), "there are eps, sqr_mom, decouple_wd, mom;")])
def test_arguments_of_adam_that_would_be_passed_over(adam, more, said):
    "A schedule, or a setting, has the last word of them"
    with pytest.raises(ValueError, match=said): Settings(adam=adam, **more)
    assert Settings(adam=dict(mom=.5, eps=1e-5), one_cycle=False).adam['mom']==.5

def test_nothing_to_learn_from(some):
    "Said before anything is prepared, with the method to take"
    all_labeled = some.assign(split=some.split.replace('unlabeled', 'labeled'))
    with pytest.raises(ValueError, match=r"method: 'recommended' learns from unlabelled scans, and there are none: "
                                         "all 5 scans .* take method='partial'.* labeled=2"):
        check_scans(Settings(), all_labeled)
    with pytest.raises(ValueError, match='split: no scan is labeled'):
        check_scans(Settings(), some.assign(split='unlabeled'))
    with pytest.raises(ValueError, match="split: no scan is valid, and each epoch is validated; there are {.*}. Make"):
        check_scans(Settings(), some[some.split!='valid'])
    for method in ('partial','full'): check_scans(Settings(method=method), all_labeled)
    check_scans(Settings(), some)

def test_texts_of_options():
    assert weight('5')==5. and weight('5,0.8')==[5.,.8] and weight('5,0.8,down')==[5.,.8,'down']
    assert json_object('{"eps": 1e-5}')=={'eps':1e-5}
    for text,said in (('{', 'is not JSON'), ('3', 'is not a JSON object')):
        with pytest.raises(ValueError, match=said): json_object(text)

def test_strong_copies_of_Tx_need_a_T():
    assert not Settings(method='pseudo').uses_T and Settings(method='pseudo', labels=dict(moved=True)).uses_T
    assert Settings(method='teacher').uses_T and not Settings(method='partial').uses_T

def test_T_of_the_settings():
    from fastmiseg.scans.recipe import Recipe
    paper = lambda **kw: Settings(method='paper', **kw)
    assert str(paper().T)=='RandomFlips(axes=None, p=0.5)'
    assert set(str(Settings().T).split(' + '))==set(str(usual_pool()).split(' + ')) # as for the callbacks
    assert str(paper(flips='none', shift=.5).T)=='RandomFlips(axes=(), p=0.5) + RandomShifts(most=0.5)'
    assert paper(flips='hv').T.axes==(-2,-1)
    with pytest.raises(ValueError, match='does nothing'): paper(flips='none').check_T(Recipe())
    Settings(flips='none').check_T(Recipe()) # it warps
    Settings(method='entropy', flips='none').check_T(Recipe()) # which compares nothing with T(x)

@pytest.fixture
def some(hearts):
    "Two labelled hearts, three without masks for training"
    df = hearts.df.reset_index(drop=True)
    df.attrs.update(hearts.df.attrs)
    df['split'] = ['labeled']*2 + ['unlabeled']*3 + ['valid']*2 + ['other']*(len(df)-7)
    return df

class Stop(Callback):
    order = 95
    def __init__(self, at): super().__init__(); self.at = at
    def after_batch(self):
        if self.training and self.train_iter==self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('changes', [
    dict(method='pretrain'), dict(method='mireg+teacher', one_cycle=False),
    dict(method='pseudo+teacher', loss='ce+dice', passes=2), dict(method='mireg+teacher', precision='bf16')])
def test_goes_on(hearts, some, tmp_path, changes):
    """Interrupted in the middle and called again, a training ends with the weights and the log of one that nobody
    disturbed"""
    s = replace(tiny, **changes)
    train = lambda path, **kw: fit(s, some, hearts.recipe, hearts.root/'slices', path,
                                   every=1, workers=0, quiet=True, **kw)
    whole,_ = train(tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'b', cbs=[*callbacks_of(s), Stop(2)])
    again,_ = train(tmp_path/'b')
    for p,q in zip(whole.model.state_dict().values(), again.model.state_dict().values()): assert torch.equal(p, q)
    logs = [pd.read_csv(tmp_path/o/'log.csv') for o in 'ab']
    pd.testing.assert_frame_equal(*logs)

@pytest.mark.skipif(torch.cuda.is_available(), reason='fp16 is for GPUs')
def test_fp16_without_a_gpu_is_refused_before_any_work(tmp_path):
    make_phantom(tmp_path/'scans', n_subjects=4, size=(32,40))
    with pytest.raises(ValueError, match='precision: fp16 is for GPUs, and there is none here; take bf16 or fp32'):
        train_run(tmp_path/'scans', tmp_path/'run', precision='fp16')
    assert not (tmp_path/'run').exists()

def test_full_supervision_sees_all_masks(hearts, some):
    learn,cbs = fit(replace(tiny, method='full', epochs=1), some, hearts.recipe, hearts.root/'slices',
                    workers=0, quiet=True)
    assert cbs==[] and getattr(learn.dls.train, 'unlabeled', None) is None
    labelled = {o.scan for o in learn.dls.train.dataset.items}
    assert labelled==set(some.scan[:5])

def test_training_on(hearts, some, tmp_path):
    "More epochs, on purpose; without saying so it is an error with both values"
    train = lambda s, **kw: fit(s, some, hearts.recipe, hearts.root/'slices', tmp_path, workers=0, quiet=True, **kw)
    s = replace(tiny, method='consistency', epochs=1)
    train(s)
    with pytest.raises(ValueError, match='epochs.*1.*2'): train(replace(s, epochs=2))
    with pytest.warns(UserWarning, match='epochs'): learn,_ = train(replace(s, epochs=2), change=True)
    assert len(pd.read_csv(tmp_path/'log.csv'))==2

def test_another_method_has_what_is_usual_for_it():
    s = Settings(epochs=3, passes=3)
    assert (s.loss,s.warp,s.jitter)==('ce+dice',.5,.5)
    paper = s.changed(method='paper')
    assert (paper.loss,paper.warp,paper.jitter,paper.passes,paper.epochs)==('ce',0.,0.,3,3)
    assert s.changed(lr=.1).to_dict()=={**s.to_dict(), 'lr':.1} and paper.changed(method='recommended')==s

def test_recommended_callbacks():
    "New ones at each call, those of the method that is named in one place, with what was asked for instead"
    one,two = semisup_cbs(),semisup_cbs([3,4], global_mi=.2)
    assert [type(o) for o in one]==[type(o) for o in two]==[type(o) for o in callbacks_of(Settings())]
    assert not {id(o) for o in one} & {id(o) for o in two}
    assert two[0].unlabeled==[3,4] and two[0].weights['global_mi']==.2 and one[0].weights['global_mi']==.1
    with pytest.raises(ValueError, match="settings: there is no 'rate'"): semisup_cbs(rate=1)
    with pytest.raises(ValueError, match=r"'passes' is a matter of the learner or its fit \(as learn.paired_batch"):
        semisup_cbs(method='paper', passes=1)
    with pytest.raises(ValueError, match="paste: CopyPasteCallback takes no 'boxes' here"):
        semisup_cbs(method='copypaste', paste=dict(boxes=3))

def test_pretraining_learns_from_mutual_information(tmp_path):
    "By itself it trains the encoder; held to the gradient of masks that are not there, it would train nothing"
    from fastmiseg.callback.copypaste import CopyPasteCallback
    from toy import learner, loaders, quiet, small_mireg
    learn = quiet(learner(tmp_path, dls=loaders(bs=2, unlabeled_bs=4, n_iters=3)))
    seen = []
    class Look(Callback):
        def after_backward(self): seen.append(float(self.model.Conv5[0].weight.grad.abs().sum()))
    learn.add_cb(Look())
    with learn.no_bar(), learn.no_logging(): pretrain(learn, 1, 1e-2, cbs=[small_mireg(consistency_weight=0.)])
    assert len(seen)==3 and min(seen)>0
    with pytest.raises(ValueError, match=r'balance: measures .* MIRegCallback\(balance=False\)'):
        pretrain(learn, 1, cbs=[small_mireg(balance=True)])
    with pytest.raises(ValueError, match='CopyPasteCallback: learns from masks, and pretraining is without'):
        pretrain(learn, 1, cbs=[small_mireg(), CopyPasteCallback()])
    assert type(learn.loss_func).__name__=='CrossEntropyLossFlat'

def test_pretraining_has_the_terms_of_the_command(tmp_path):
    from toy import learner, loaders, quiet
    learn,seen = quiet(learner(tmp_path, dls=loaders(n_iters=1))),[]
    class Look(Callback):
        def before_fit(self): seen.extend(o for o in self.learn.cbs if isinstance(o, SemiSupCallback))
    learn.add_cb(Look())
    with learn.no_bar(): pretrain(learn, 1)
    a,b = (o for os in (seen, callbacks_of(Settings(method='pretrain'))) for o in os)
    said = list(inspect.signature(type(b)).parameters)
    kept = [k for k in said if hasattr(b, k) and k not in ('T','balance','unlabeled')]
    assert type(a) is type(b) and a.weights==b.weights and a.balance is b.balance is None and len(kept)>8
    for k in kept: assert getattr(a, k)==getattr(b, k), k
    assert str(a.T)==str(b.T)

def test_pretraining_needs_no_masks(tmp_path):
    "The same network comes of it whatever the masks are; loss and optimiser are as before, also after an interruption"
    from toy import learner, loaders, quiet, small_mireg
    class Other(Callback):
        "Other masks"
        def before_batch(self): self.learn.yb = (torch.zeros_like(self.yb[-1]),)
    def run(change):
        learn = quiet(learner(tmp_path, dls=loaders(n_iters=3)))
        if change: learn.add_cb(Other())
        loss = learn.loss_func
        pretrain(learn, 1, 1e-2, cbs=[small_mireg()])
        assert learn.loss_func is loss and learn.opt is None
        return learn
    before = [p.detach().clone() for p in learner(tmp_path).model.parameters()]
    a,b = run(False),run(True)
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)
    assert not all(torch.equal(p, q) for p,q in zip(before, a.model.parameters()))
    with pytest.raises(KeyboardInterrupt): pretrain(a, 1, 1e-2, cbs=[small_mireg(), Stop(2)])
    assert type(a.loss_func).__name__=='CrossEntropyLossFlat' and a.opt is None
    a.fit(1)

def test_several_processes_without_accelerate(monkeypatch, tmp_path, capsys):
    "As torchrun starts them, where pip has not installed it: a sentence, before any work"
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(SystemExit, match='2'): cli.train(str(tmp_path), str(tmp_path/'run'))
    assert ('several processes were started, and training in them needs accelerate: pip install accelerate'
            in capsys.readouterr().err)
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('method,given,said', [
    ('partial', dict(unlabeled_bs=4, decay=.9, warp=.2), [
        "unlabeled_bs: the method 'partial' learns from no unlabelled scan, so that this changes nothing",
        "decay: the method 'partial' has no teacher, so that this changes nothing",
        "warp: the method 'partial' compares nothing with T(x), so that this changes nothing"]),
    ('pseudo', dict(jitter=.2, flips='h'), [
        "flips, jitter: the method 'pseudo' compares nothing with T(x), so that this changes nothing"]),
    ('pseudo', dict(jitter=.2, labels=dict(moved=True)), []),
    ('recommended', dict(jitter=.2, unlabeled_bs=4), []),
    ('pseudo+teacher', dict(decay=.9, passes=1), [])])
def test_settings_that_do_nothing_are_said(method, given, said):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        settings_from(Settings(method=method), **given)
    assert [str(o.message) for o in found]==said

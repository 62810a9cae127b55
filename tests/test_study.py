"Studies: rows, columns, arithmetic, evidence, and the same figures again"
import importlib.util, json, os, pickle, re, subprocess, sys, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.data.transforms import Normalize
from scipy.stats import ttest_rel

from fastmiseg import training
from fastmiseg.scans.cohort import load_cohort
from fastmiseg.scans.split import split_cohort
from fastmiseg.scans.phantom import make_phantom
from fastmiseg.scans.recipe import Recipe
from fastmiseg.study import work as study_work
from fastmiseg.study.evidence import Evidence, decides, describe_run, name_of, split_name, student_of
from fastmiseg.study.plans import Study, find_study, studies
from fastmiseg.study.preset import Preset, presets, settings_of
from fastmiseg.study.protocol import changes_of, made_with
from fastmiseg.study.report import legend, pages_text, paired_p, plot_study, study_curves, study_table
from fastmiseg.study.run import compare_study, report_study, run_study, scored, study_results, wanted_runs
from fastmiseg.study.work import evaluate_slices, make_run, part_of
from fastmiseg.methods import methods
from fastmiseg.metrics import VolumeDice
from fastmiseg.packed import open_store, pack_slices
from fastmiseg.surface import VolumeHD95
from fastmiseg.settings import Settings
from fastmiseg.training import callbacks_of
from fastmiseg.transforms import Flips, in_sequence
from fastmiseg.warps import Warps

recipe = Recipe(spacing=6., size=32, classes=('background','RV','Myo','LV'), flip='hv')
small = Settings(method='paper', width=4, epochs=2, n_iters=10, bs=2, unlabeled_bs=2,
                 lr=2e-2, div=400., pct_start=.1)
tiny = Preset('cpu', small, labeled=1, valid=1, test=2, recipe=recipe, weights=presets['cpu'].weights)
results = Path(__file__).parent.parent/'studies'
plans = sorted((results/'plans').glob('*.json'))
everything = {**studies, **{o.stem:find_study(o) for o in plans}}

@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    make_phantom(root:=tmp_path_factory.mktemp('scans'), n_subjects=12, seed=0, size=(32,40))
    return root

@pytest.fixture(scope='module')
def out(tmp_path_factory): return tmp_path_factory.mktemp('studies')

def run(study, scans, out, rows=None, **kw):
    study = everything.get(study, study) if isinstance(study, str) else study
    return run_study(study.only(rows) if rows else study, scans, out,
                     **{**dict(preset=tiny, seeds=1, processes=0), **kw})

# -- settings ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', list(everything))
def test_every_row_can_be_made(name):
    for preset in presets.values():
        for row in everything[name].rows.values():
            s = settings_of(preset, row)
            assert s==settings_of(preset, row)==Settings.from_dict(json.loads(json.dumps(s.to_dict())))
            callbacks_of(s)

def test_weights_of_a_ramp_are_the_presets():
    for preset in presets.values():
        s,full = (settings_of(preset, dict(method='mireg', until=u)).weights for u in (.2,0))
        assert {k:v[0] for k,v in s.items()}==full and all(v[1]==.2 for v in s.values())
        assert set(full)=={'global_mi','local_mi','consistency'}

def test_ramp_of_two_weights():
    s = settings_of(presets['cpu-shift'], dict(method='mi', until=.2))
    assert s.weights==dict(global_mi=[.0003,.2], local_mi=[.1,.2]) and callbacks_of(s)

def test_what_is_as_usual_is_no_other_setting():
    s = settings_of(presets['cpu'], dict(method='mireg'))
    assert s==settings_of(presets['cpu'], dict(method='mireg', adam={}, one_cycle=True, global_mi=.001))
    for k in ('acdc','promise12','spleen','mmwhs'):
        s = settings_of(presets[k], dict(method='mireg'))
        assert s.one_cycle is False and s.adam==dict(sqr_mom=.999, decouple_wd=False)
        assert (settings_of(presets[k], dict(method='mireg', adam=dict(eps=1e-5))).adam
                ==dict(sqr_mom=.999, decouple_wd=False, eps=1e-5))

def test_T_of_a_row_are_changes():
    T = lambda preset, method='mireg', **o: tuple(
        getattr(settings_of(presets[preset], dict(method=method, **o)), k)
        for k in ('flips','flip_p','jitter','shift'))
    assert T('cpu-shift', flip_p=.8)==(None,.8,.5,.5) and T('cpu-shift', shift=0.)==(None,.5,.5,0.)
    assert T('cpu-shift', flips='none')==('none',.5,.5,.5) and T('spleen')==('hv',.5,0.,0.)
    assert (T('cpu-shift', **{k:o for k,o in studies['views'].rows['Flips and intensity'].items() if k!='method'})
            ==(None,.5,.5,0.))
    for method in ('partial','full','entropy'):
        assert T('cpu-shift', method)==T('cpu')==(None,.5,0.,0.) # they have none

def test_plans_in_files(tmp_path):
    def fails(text, match, name='plan.json'):
        (tmp_path/name).write_text(text)
        with pytest.raises(ValueError, match=match): find_study(tmp_path/name)
    fails('{', r'plan.json: is not JSON')
    fails('{"title":"t"}', 'plan.json: is not a study; it needs a title, and rows')
    fails('[]', 'plan.json: is not a study')
    fails('{"title":"t", "rows":{}, "our":"a"}', "plan.json: there is no 'our' in a study; there are title, rows, ours")
    fails('{"title":"t", "rows":{"a":{"method":"mi", "entropy":1}}}',
          "plan.json: row 'a': entropy: the method 'mi' has no entropy term")
    fails('{"title":"t", "rows":{"a":["mi"]}}', "plan.json: row 'a':")
    with pytest.raises(ValueError, match="nothing.json: cannot be read as settings"):
        find_study(tmp_path/'nothing.json')
    if sys.version_info>=(3,11):
        (tmp_path/'decay.toml').write_text('title = "t"\nours = "a"\n[rows.a]\nmethod = "teacher"\ndecay = 0.9\n')
        assert find_study(tmp_path/'decay.toml')==Study('decay', 't', {'a': dict(method='teacher', decay=.9)}, ours='a')

# -- runs and tables ---------------------------------------------------------------------------------------------------
def some_rows(study):
    "Rows at 1 and 2 labelled subjects; of the long studies the first and the last two"
    rows = list(study.rows)
    if study.draws and study.x:
        return [k for k in rows
                if study.line(k) in ('All masks','Labels only','Recommended') and k.endswith((', 1','masks'))]
    return ([k for k in rows if k.endswith((', 1',', 2'))] if study.x
            else rows if len(rows)<10 else [rows[0],*rows[-2:]])

def check_arithmetic(scores, table, study):
    "Means, deviations, gap closed and p of a table, from the scores by other means"
    t = table.set_index('row')
    classes,seeds = sorted(set(scores['class'])),sorted(set(scores.seed))
    mean = lambda g, s: np.mean([g[(g.seed==s)&(g['class']==c)].dice.mean() for c in classes])
    means = {k: np.array([mean(g, s) for s in seeds]) for k,g in scores.groupby('row')}
    for k,m in means.items():
        assert np.isclose(t['mean'][k], m.mean())
        assert np.isclose(t.mean_sd[k], m.std(ddof=1) if len(m)>1 else np.nan, equal_nan=True)
    base = {k: study.at(study.base, k) for k in means}
    assert ('gap_closed' in t)==(study.bound in means and any(o in means for o in base.values()))
    for k,m in means.items() if 'gap_closed' in t else ():
        if study.x and k==study.bound: continue
        lo,hi = means[base[k]].mean(),means[study.bound].mean()
        assert np.isclose(t.gap_closed[k], (m.mean()-lo)/(hi-lo) if hi!=lo else np.nan, equal_nan=True)
    by = lambda k: [scores[(scores.row==k)&(scores.subject==s)].dice.mean() for s in sorted(set(scores.subject))]
    for k in set(means)-{study.against(k) for k in means}:
        ours = study.against(k)
        if ours not in means: continue
        assert np.isclose(t.p[k], ttest_rel(by(ours), by(k), alternative='greater').pvalue, equal_nan=True)
        if study.draws and len(seeds)>1:
            assert np.isclose(t.p_draws[k], ttest_rel(means[ours], means[k], alternative='greater').pvalue,
                              equal_nan=True)

@pytest.mark.parametrize('name', [k for k in everything if k!='table1' and not k.startswith('benchmark_')])
def test_study_runs(name, scans, out, tmp_path):
    study = everything[name]
    rows,score = some_rows(study),study.score or 'test'
    found = run(study, scans, out, rows)
    stem = out/'_'.join([name, *{tiny.name}-{study.preset}, *{score}-{'test'}])
    table = pd.read_csv(stem.with_suffix('.csv'))
    assert list(table.row)==rows and set(found.row)==set(table.row)
    assert (list(table.columns)[:10]==['row','seeds','RV','RV_sd','Myo','Myo_sd','LV','LV_sd','mean','mean_sd']
            and 'hd95' in table)
    check_arithmetic(found, table, study)
    text = stem.with_suffix('.md').read_text()
    assert 'test 2 (2 scans)' in text and 'No subject is in two parts' in text and 'final checkpoint' in text
    assert stem.with_suffix('.png').stat().st_size>5000
    there = Evidence(out)
    parts = there.parts(there.find([o for _,o in wanted_runs(study.only(rows[:1]), tiny, 1, score)])[0]['split'])
    assert set(found.subject)==set(parts.subject[parts.split==score])
    kept = [o for o in out.rglob('*') if o.suffix in ('.md','.csv','.jsonl') and 'slices' not in o.parts]
    # results name no folder of this machine
    assert len(kept)>=5 and str(scans) not in ''.join(o.read_text() for o in kept)
    same_figures(found, run(study, scans, tmp_path, rows[-1:], store=out/'slices'))

def same_figures(first, again):
    cols = ['row','seed','subject','class','dice','hd95','assd']
    first,again = (o[cols].sort_values(cols[:4]).reset_index(drop=True)
                   for o in (first[first.row.isin(again.row)], again))
    pd.testing.assert_frame_equal(again, first, check_exact=True)

def test_table1_arithmetic_and_repetition(scans, out, tmp_path):
    scores = run('table1', scans, out, seeds=2, processes=2)
    check_arithmetic(scores, pd.read_csv(out/'table1.csv'), studies['table1'])
    same_figures(scores, run('table1', scans, tmp_path, ['All','Mean Teacher'], seeds=2))

def test_what_made_the_runs_is_told():
    found = [(row, dict(settings=dict(seed=seed), versions=v))
             for (row,seed),v in zip([('a',0),('a',1),('b',0),('b',1)],
                                     ('torch 2','torch 2','torch 2','torch 3'))]
    assert (made_with(found[:3])==['- torch 2.']
            and made_with(found)==['- torch 2: a (0, 1); b (0).', '- torch 3: b (1).'])

def test_runs_are_shared_and_kept(scans, out):
    run('teacher', scans, out)
    made = (out/'runs.jsonl').read_text()
    run('teacher', scans, out)
    run('table1', scans, out, ['Mean Teacher','All'])
    assert (out/'runs.jsonl').read_text()==made
    last = Evidence(out).runs()[-1]
    assert (last['settings']['width']==4 and len(last['curve']['dice'])==2
            and last['threads']>=1 and 'torch' in last['versions'])
    assert {o.suffix for o in (out/'work').iterdir()}=={'.lock'}

def test_report_without_scans(scans, out):
    "The same page from the evidence alone"
    scores = run('teacher', scans, out)
    page,table = (out/'teacher.md').read_text(),(out/'teacher.csv').read_bytes()
    (out/'teacher.md').unlink()
    again = report_study(studies['teacher'], tiny, wanted_runs(studies['teacher'], tiny, 1), out)
    assert again.equals(scores) and (out/'teacher.md').read_text()==page and (out/'teacher.csv').read_bytes()==table
    with pytest.raises(ValueError, match=r'3 of 6 runs are not there \(Mean Teacher, seed 7, for one\); '
                                         'give the scans'):
        report_study(studies['teacher'], tiny, wanted_runs(studies['teacher'], tiny, [0,7]), out)

def evidence_of(path, study, preset, recipe, names, values):
    "Runs that nobody made, each with one Dice for all test scans"
    there,found = Evidence(path),names['df'][names['df'].split=='test']
    for (_,run),v in zip(wanted_runs(study, preset, 1, 'test', recipe, names), values):
        one = dict(dice=v, hd95=1., assd=1., sensitivity=v, precision=v, **{'class':'heart'})
        there.add(run, found[['subject','scan']].assign(**one), versions='none', threads=1, seconds=1)
    return there

def split_for(path, scans, keys):
    df = split_cohort(load_cohort(scans), labeled=1, valid=1, test=2, show=False)
    return {**Evidence(path).keep_cohort({k:df for k in keys}), 'df':df}

def test_a_row_with_its_own_recipe_takes_no_run_of_another(scans, tmp_path, monkeypatch):
    "Without the scans nobody knows the recipe that it changes"
    monkeypatch.delenv('FASTMISEG_DATA', raising=False)
    rows = {'A':dict(method='partial'), 'B':dict(method='partial', recipe=dict(augment='strong'))}
    (plan := tmp_path/'own.json').write_text(json.dumps(dict(title='Own', rows=rows, ours='A')))
    names = split_for(tmp_path, scans, [(2,0)])
    evidence_of(tmp_path, find_study(plan), presets['cpu'], recipe, names, [.5])
    with pytest.raises(ValueError, match="^recipe: the row 'B' changes that of the study, which is not known here: "
                                         'runs of other rows would be taken for its own; give the scans'):
        compare_study(str(plan), None, tmp_path, seeds=1)
    assert '| A | 0.500 |' in compare_study(str(plan), None, tmp_path, seeds=1, rows=['A'])

def test_a_report_under_another_preset_has_a_name_of_its_own(scans, tmp_path):
    "That of the study's own preset stays"
    study = studies['benchmark'].only(['Labels only, 1','Recommended, 1'])
    names = split_for(tmp_path, scans, [(1,0)])
    for k in (study.preset,'cpu'):
        evidence_of(tmp_path, study, presets[k], recipe, names, [.4,.5])
        report_study(study, presets[k], wanted_runs(study, presets[k], 1), tmp_path)
    assert sorted(o.name for o in tmp_path.glob('*.md'))==['benchmark.md','benchmark_cpu.md']
    assert ', preset cpu\n' in (tmp_path/'benchmark_cpu.md').read_text()

@pytest.mark.parametrize('rows', [
    ['Labels only, 1','Labels only, 3','Recommended, 1','Recommended, 3','MI (ours), 1'],
    ['Labels only, 1','Recommended, 1','Recommended, 3']])
def test_a_figure_of_some_rows(rows):
    "Not all methods are at each number of subjects, and not at each there is what they are compared with"
    def one(k): return dict(row=k, labeled=int(k[-1]), subject='s', scan='s', dice=.5, hd95=1., **{'class':'heart'})
    scores = pd.DataFrame([dict(one(k), seed=s) for k in rows for s in range(2)])
    gains = plot_study(scores, studies['benchmark'].only(rows)).axes[1]
    assert len(gains.get_yticks())==len({k[:-3] for k in rows}-{'Labels only'})

@pytest.mark.parametrize('draws', [False,True])
def test_legend_says_what_the_distance_leaves_out(draws):
    "A row that misses the class in three scans of four has no better HD95 without a word about it"
    far = {'Labels only':[10.]*4, 'All':[2.,np.nan,np.nan,np.nan]}
    scores = pd.DataFrame([dict(row=k, seed=seed, subject=f's{i}', scan=f's{i}', dice=.5+.1*i+.01*seed,
                                hd95=far[k][i] if c=='RV' else 1., **{'class':c})
                           for k in far for seed in range(2) for i in range(4) for c in ('RV','LV')])
    study = Study('left-out', 'Left out', {k:{} for k in far}, base='Labels only', draws=draws)
    said = legend(study_table(scores, study), study)
    assert 'scans in which the class was missed or invented, over all seeds 6 of 8 (RV) in "All". ' in said
    said = legend(study_table(scores.fillna(dict(hd95=3.)), study), study)
    assert 'scans in which the class was missed or invented (none here). ' in said

def test_legend_says_what_its_spread_and_its_p_are_of():
    "What has all masks has them in each draw; and a row among many is small by chance"
    study = Study('few', 'Few', {'All masks':dict(method='full'), 'Labels only':{}, 'All':{}}, base='Labels only',
                  bound='All masks', draws=True)
    scores = pd.DataFrame([dict(row=k, seed=seed, subject=f's{i}', scan=f's{i}', dice=.5+.1*i+.01*seed*j, hd95=1.,
                                **{'class':'RV'})
                           for j,k in enumerate(study.rows) for seed in range(2) for i in range(4)])
    said = legend(study_table(scores, study), study)
    assert 'draws of the labelled subjects, each with its own seed; in "All masks" over seeds alone. HD95' in said
    assert 'differ, and is not corrected for the number of rows. p over draws' in said
    few = study.only(['Labels only','All'])
    assert 'each with its own seed. HD95' in legend(study_table(scores[scores.row!='All masks'], few), few)

def test_settings_are_chosen_on_validation_scans(scans, out):
    scores = run('choose', scans, out, ['Partial supervision','Mean Teacher: consistency [1.0, 0.4]'])
    there = Evidence(out)
    parts = there.parts(next(o for o in there.runs() if o['score']=='valid')['split'])
    assert set(scores.subject)==set(parts.subject[parts.split=='valid']) and (out/'choose_valid.md').exists()

def test_mistakes(scans, out):
    with pytest.raises(ValueError, match="study: 'table9' is none of table1"):
        compare_study('table9', scans, out)
    with pytest.raises(ValueError, match="preset: 'phone' is none of acdc"):
        compare_study('table1', scans, out, preset='phone')
    with pytest.raises(ValueError, match='rows: Ours: no such row; there are Full supervision'):
        compare_study('table1', scans, out, rows=['Ours'])
    with pytest.raises(ValueError, match="chooses settings, which is done on valid scans; got 'test'"):
        run('choose', scans, out, score='test')
    with pytest.raises(ValueError, match="score: the preset has no 'test' scans; there are labeled, unlabeled, valid"):
        run('table1', scans, out, preset=replace(tiny, test=0), score='test')

def test_number_of_labelled_subjects_that_rows_have_of_their_own(tmp_path):
    "--labeled would change one row in 34, and the title and the name of the file"
    with pytest.raises(ValueError, match=r"labeled: got 5, but 33 of 34 rows have their own .*Labels only .*, 1"
                                         r'.*"labeled": \[5\] into a file plan.json with "like": "benchmark"'):
        compare_study('benchmark', None, tmp_path, labeled=5)
    (plan:=tmp_path/'plan.json').write_text('{"like": "benchmark", "labeled": [5]}')
    rows = find_study(plan).rows
    assert {o.get('labeled') for k,o in rows.items() if k!='All masks'}=={5}
    with pytest.raises(ValueError, match=r'"labeled": \[2\] into the plan$'):
        compare_study(str(plan), None, tmp_path, labeled=2)
    with pytest.raises(ValueError, match='runs are not there'): # this row has the preset's number
        compare_study(str(plan), None, tmp_path, labeled=2, rows=['All masks'], recipe='acdc')

def test_a_failed_run_is_named_and_the_others_are_kept(scans, tmp_path):
    study = Study('broken', 'broken', {
        'Partial supervision': dict(method='partial'),
        'Too wide': dict(method='mireg', mireg=dict(neighborhood={'Upconv3':99,'Upconv2':7}))})
    with pytest.raises(RuntimeError, match=r'(?s)1 of 2 runs failed; call the study again to repeat them:'
                                           r'.*Too wide, seed 0: .*neighborhood: 99 is more than the map'):
        run(study, scans, tmp_path, processes=2)
    assert len(Evidence(tmp_path).runs())==1 and len(Evidence(tmp_path).scores().run.unique())==1

def a_run(scans, out, **row):
    df = split_cohort(load_cohort(scans), 1, 1, 1, seed=0)
    split, = Evidence(out).keep_cohort({1:df}).values()
    return describe_run(settings_of(tiny, row), 1, 'test', recipe, split),df

def test_optimiser_and_schedule_of_a_row(scans, tmp_path):
    df = split_cohort(load_cohort(scans), 1, 1, 1, seed=0)
    def hypers(name, **row):
        learn,_ = training.fit(settings_of(tiny, dict(method='partial', **row)), df, recipe,
                               tmp_path/'slices', tmp_path/name, quiet=True)
        return (learn.opt.hypers[-1],
                [getattr(o, 'func', o).__name__ for o in learn.opt.cbs],
                {k:np.array(o) for k,o in learn.recorder.hps.items()})
    h,steps,hps = hypers('usual')
    assert ((h['eps'],h['sqr_mom'])==(1e-8,.99) and 'weight_decay' in steps
            and np.isclose(hps['mom'].min(), .85, atol=.01))
    h,steps,_ = hypers('torch', adam=dict(sqr_mom=.999, decouple_wd=False))
    assert ((h['eps'],h['sqr_mom'],h['wd'])==(1e-8,.999,small.wd)
            and 'l2_reg' in steps and 'weight_decay' not in steps)
    assert hypers('fastai', adam=dict(eps=1e-5))[0]['eps']==1e-5
    h,_,hps = hypers('held', one_cycle=False)
    first,n = small.lr/small.div,small.epochs*small.n_iters # warm-up over a tenth of 20 steps
    assert set(hps)=={'lr'} and h['mom']==.9 and np.allclose(hps['lr'][:3], [first, (first+small.lr)/2, small.lr])
    assert np.allclose(hps['lr'][2:], small.lr*(1+np.cos(np.pi*np.arange(n-2)/(n-2)))/2)

@pytest.mark.parametrize('one_cycle', [True,False])
def test_an_interrupted_run_goes_on(one_cycle, scans, tmp_path, monkeypatch):
    def go(name):
        run,df = a_run(scans, tmp_path/name, method='mireg+teacher', one_cycle=one_cycle)
        make_run(run, df, tmp_path/'slices', tmp_path/name, torch.get_num_threads())
    class PowerCut(Callback):
        def after_batch(self):
            if self.training and self.train_iter==15: raise KeyboardInterrupt
    go('whole')
    with monkeypatch.context() as m:
        m.setattr(study_work, 'callbacks_of', lambda s: [*callbacks_of(s), PowerCut()])
        with pytest.raises(KeyboardInterrupt): go('cut')
    assert not Evidence(tmp_path/'cut').runs() and list((tmp_path/'cut'/'work').glob('*/checkpoints/*.pt'))
    clock, = (tmp_path/'cut'/'work').glob('*/seconds')
    assert 0<float(clock.read_text())<1000
    clock.write_text('1000')
    go('cut')
    whole,cut = (Evidence(tmp_path/o) for o in ('whole','cut'))
    assert cut.scores().equals(whole.scores()) and cut.runs()[0]['curve']==whole.runs()[0]['curve']
    assert whole.runs()[0]['seconds']<1000<cut.runs()[0]['seconds']
    assert not [o for o in cut.work.iterdir() if o.is_dir()] # no weights

def test_settings_of_rows_are_told(scans, out):
    run('shift', scans, out, ['Partial supervision','Consistency only'])
    text = (out/'shift_valid.md').read_text()
    assert '- T: flips along the axes of the recipe.' in text
    assert '- Otherwise in "Consistency only": consistency [5.0, 0.8]; shift 0.5; jitter 0.5.' in text
    run('faithful', scans, out, ["Both: PyTorch's Adam",'Both: linear warm-up, cosine, momentum held'])
    text = (out/'faithful.md').read_text()
    assert '''- Otherwise in "Both: PyTorch's Adam": Adam with sqr_mom 0.999, decouple_wd False.''' in text
    assert ('- Otherwise in "Both: linear warm-up, cosine, momentum held": '
            'linear warm-up and cosine (momentum 0.9).') in text
    run('faithful', scans, out, ['All'],
        preset=replace(tiny, settings=replace(small, one_cycle=False, adam=dict(sqr_mom=.999))))
    assert ('Adam with sqr_mom 0.999, linear warm-up and cosine (momentum 0.9) up to 0.02 from a 400th'
            in (out/'faithful.md').read_text())

def test_changes_are_those_of_the_method():
    assert changes_of(presets['cpu-shift'], dict(method='mi'))==[]
    assert changes_of(presets['cpu-shift'], dict(method='mi', global_mi=.1, labeled=4))==['global_mi 0.1']

def test_curves_hold_every_epoch(scans, out):
    run('figure7', scans, out, seeds=2)
    runs = Evidence(out).find([o for _,o in wanted_runs(studies['figure7'], tiny, 1)])
    c = study_curves(list(zip('abc', runs)))
    assert 'pretraining' in runs[1] and not {'pretraining'}&{*runs[0],*runs[2]}
    assert c.groupby('row').epoch.apply(list).to_dict()==dict.fromkeys('abc', [1,2]) and c.dice.between(0,1).all()

def test_subjects_are_paired():
    s = pd.DataFrame(dict(subject=list('aabbcc'), dice=[.5,.7,.4,.4,.9,.7]))
    expected = ttest_rel([.6,.4,.8], [.5,.2,.75], alternative='greater').pvalue
    assert np.isclose(paired_p(s, s.assign(dice=s.dice-[.1,.1,.2,.2,.05,.05])), expected)

# -- the benchmark -----------------------------------------------------------------------------------------------------
def test_rows_of_the_benchmark():
    "Every method at every number of labelled subjects, all masks once; the same methods on both cohorts"
    lines = {}
    for name,numbers in (('benchmark',(1,3,7)),('benchmark_acdc',(1,3,7)),('benchmark_hippocampus',(1,2,8))):
        study = everything[name]
        lines[name] = list(dict.fromkeys(map(study.line, study.rows)))
        assert len(lines[name])==12 and len(study.rows)==1+11*3 and study.draws and study.ours in lines[name]
        assert ({o['labeled'] for k,o in study.rows.items() if k!='All masks'}==set(numbers)
                and presets[study.preset].test>=30)
        for n in numbers:
            runs = [settings_of(presets[study.preset], o) for o in study.rows.values() if o.get('labeled')==n]
            assert len(runs)==len({json.dumps(o.to_dict()) for o in runs})==11 # no two rows are the same training
    assert lines['benchmark']==lines['benchmark_acdc']==lines['benchmark_hippocampus']
    paper = settings_of(presets['acdc-64'], everything['benchmark'].rows["MI (the paper's settings), 3"])
    assert ((paper.loss,paper.shift,paper.jitter)==('ce',0.,0.)
            and paper.weights==dict(global_mi=.1, local_mi=.1, consistency=5.))

def test_benchmark(scans, tmp_path):
    """Two draws at two numbers of subjects: the arithmetic, both people of a teacher, one section for
    each number; a run that is made again is the same to the last digit"""
    rows = ['All masks', *(f'{k}, {n}' for n in (1,2) for k in ('Labels only','MI (ours)'))]
    study = replace(everything['benchmark_hippocampus'].only(rows), ours='MI (ours)') # which has a teacher
    # few steps, but as many as something is learnt in
    preset = replace(tiny, name=study.preset, settings=replace(small, epochs=1, n_iters=30, bs=4, div=5.), weights={})
    scores = run(study, scans, tmp_path/'a', preset=preset, seeds=2)
    table = pd.read_csv(tmp_path/'a'/'benchmark_hippocampus.csv')
    check_arithmetic(scores, table, study)
    t = table.set_index('row')
    assert (t.student[['MI (ours), 1','MI (ours), 2']].notna().all() and t.student.isna().sum()==3
            and (t.minutes>0).all())
    students = Evidence(tmp_path/'a').scores()
    found = Evidence(tmp_path/'a').find([o for k,o in wanted_runs(study, preset, 2, 'test', recipe)
                                         if k=='MI (ours), 2'])
    means = [students[students.run==student_of(o['id'])].groupby('class').dice.mean().mean() for o in found]
    assert np.isclose(t.student['MI (ours), 2'], np.mean(means)) and t['mean'].max()>0
    for c in ('RV','Myo','LV'):
        assert np.isclose(t[f'hd95_{c}']['Labels only, 1'],
                          scores[(scores.row=='Labels only, 1')&(scores['class']==c)].hd95.mean(),
                          equal_nan=True)
    text = (tmp_path/'a'/'benchmark_hippocampus.md').read_text()
    assert (text.count('| All masks |')==2 and '## 1 labelled' in text and '## 2 labelled' in text
            and 'each has labelled subjects of its own' in text)
    assert (text.count('Otherwise in "MI (ours)":')==1
            and (tmp_path/'a'/'benchmark_hippocampus.png').stat().st_size>10000)
    same_figures(scores[scores.seed==0],
                 run(study, scans, tmp_path/'b', ['MI (ours), 2'], preset=preset, seeds=1,
                     store=tmp_path/'a'/'slices'))

def test_plans_like_another(tmp_path):
    def plan(**o):
        (tmp_path/'p.json').write_text(json.dumps(o))
        return find_study(tmp_path/'p.json')
    s = plan(like='benchmark', title='t', labeled=[2], preset='phantom')
    assert (len(s.rows)==12 and s.rows['Mean Teacher, 2']['labeled']==2
            and s.preset=='phantom' and s.at('a', 'Mean Teacher, 2')=='a, 2')
    s = plan(title='t', rows={'a': dict(method='partial'), 'b': dict(method='full')}, labeled=[1,5])
    assert list(s.rows)==['b','a, 1','a, 5'] and s.x=='labeled' and not s.draws
    with pytest.raises(ValueError, match="p.json: like: 'table9' is none of table1"): plan(like='table9')
    with pytest.raises(ValueError, match="p.json: preset: 'phone' is none of acdc"):
        plan(like='benchmark', preset='phone')

# -- evidence ----------------------------------------------------------------------------------------------------------
def test_other_scans_of_the_same_names(scans, tmp_path):
    rows = ['Partial supervision']
    run('table1', scans, tmp_path/'s', rows)
    make_phantom(tmp_path/'other', n_subjects=12, seed=1, size=(32,40))
    with pytest.raises(ValueError, match=r'made with other scans of the same names '
                                         r'\(12 of 12 differ, heart000 for one\); choose another folder'):
        run('table1', tmp_path/'other', tmp_path/'s', rows)
    run('table1', scans, tmp_path/'s', rows)

def some_scores(seed):
    return pd.DataFrame([
        {'subject':f'00{i}', 'scan':f'{i}.0', 'class':c, 'dice':1/(seed+i+3), 'hd95':np.nan}
        for i in range(9) for c in 'ab'])

def some_run(seed, **kw): return describe_run(replace(small, seed=seed, **kw), 2, 'test', recipe, 'split_0')

def _add(out, seeds):
    for seed in seeds:
        Evidence(out).add(some_run(seed), some_scores(seed), versions='v', threads=1, seconds=1, curve={})

def test_processes_add_runs_at_the_same_time(tmp_path):
    with ProcessPoolExecutor(4, get_context('spawn')) as pool:
        for f in [pool.submit(_add, str(tmp_path), range(i, 40, 4)) for i in range(4)]: f.result()
    there = Evidence(tmp_path)
    found = there.find([some_run(o) for o in range(40)])
    of_run = dict(list(there.scores().groupby('run')))
    assert len(there.runs())==40
    for seed,o in enumerate(found):
        pd.testing.assert_frame_equal(of_run[o['id']][[*some_scores(seed)]].reset_index(drop=True),
                                      some_scores(seed), check_exact=True)

def test_names_come_back_as_they_are(tmp_path):
    scores = some_scores(0)
    scores['class'],scores['subject'] = 'NA','001'
    Evidence(tmp_path).add(some_run(0), scores, versions='v', threads=1, seconds=1, curve={})
    pd.testing.assert_frame_equal(Evidence(tmp_path).scores()[[*scores]], scores, check_exact=True)

def test_a_run_that_was_cut_while_it_was_added(tmp_path, monkeypatch):
    "Scores without their run are no run, and do not stand beside those of the next call"
    from fastmiseg.study import evidence
    write = evidence.write_text
    def cut(path, text):
        if path.name=='runs.jsonl': raise KeyboardInterrupt
        write(path, text)
    with monkeypatch.context() as m:
        m.setattr(evidence, 'write_text', cut)
        with pytest.raises(KeyboardInterrupt): _add(tmp_path, [0])
    assert not Evidence(tmp_path).runs() and len(Evidence(tmp_path).scores())==18
    _add(tmp_path, [0])
    assert len(Evidence(tmp_path).runs())==1 and len(Evidence(tmp_path).scores())==18

def test_evidence_that_cannot_be_used(tmp_path):
    _add(tmp_path, [0,1])
    there = Evidence(tmp_path)
    with pytest.raises(ValueError, match="scans.csv: has no column split_0, which the runs name"):
        there.parts('split_0')
    there.add({**some_run(0), 'split':'split_1'}, some_scores(0), versions='v')
    loose = {k:o for k,o in some_run(0).items() if k!='split'}
    with pytest.raises(ValueError, match='2 runs have these settings and differ in recipe or split '
                                         '.*name the recipe and give the scans'):
        there.find([loose])
    assert there.find([some_run(0)])[0]['split']=='split_0'
    with open(tmp_path/'runs.jsonl', 'a') as f: f.write('{"id": "half\n')
    with pytest.raises(ValueError, match='runs.jsonl: line 4 cannot be used'): there.runs()

def test_runs_that_are_older_than_a_setting(tmp_path):
    _add(tmp_path, [0])
    o = json.loads((tmp_path/'runs.jsonl').read_text())
    del o['settings']['passes']
    (tmp_path/'runs.jsonl').write_text(json.dumps(o)+'\n')
    there = Evidence(tmp_path)
    assert there.find([some_run(0), some_run(0, passes=2)])==[{**o, 'settings':some_run(0)['settings']}, None]

def test_scans_are_added_to_those_that_are_known(scans, tmp_path):
    df = split_cohort(load_cohort(scans), 1, 1, 1, seed=0)
    there = Evidence(tmp_path)
    there.keep_cohort({1:df[:5]})
    _add(tmp_path, [0])
    name = there.keep_cohort({1:df[3:]})[1]
    known = there.scans()
    assert len(known)==len(df) and sorted(known.scan)==sorted(df.scan) and name==split_name(df[3:])
    assert there.parts(name).values.tolist()==df[3:][['subject','scan','split']].sort_values('scan').values.tolist()
    assert split_name(df.sample(frac=1, random_state=0))==split_name(df)

# -- slices instead of scans, and draws --------------------------------------------------------------------------------
class Above(torch.nn.Module):
    "The first structure is where the image is brighter than something"
    def __init__(self, level):
        super().__init__()
        self.level = level
    def forward(self, x): return torch.cat([0*x, x-self.level, x-9, x-9], 1)

def test_scores_of_slices_are_those_of_the_metrics(scans, tmp_path):
    df = split_cohort(load_cohort(scans), 1, 2, 3, seed=0)
    s = settings_of(tiny, dict(method='teacher'))
    learn,_ = training.fit(s, df, recipe, tmp_path/'slices', quiet=True)
    found = evaluate_slices(learn, df, tmp_path/'slices', 'valid')
    learn.metrics = [dice:=VolumeDice(), hd95:=VolumeHD95()]
    with learn.no_bar(), learn.no_logging(): learn.validate()
    for metric in (dice, hd95):
        both = found.merge(metric.to_frame(), on=['scan','class'])
        assert (len(both)==len(found)==2*3
                and np.allclose(both[f'{metric.base}_x'], both[f'{metric.base}_y'], equal_nan=True))
    test = evaluate_slices(learn, df, tmp_path/'slices', 'test')
    assert set(test.scan)==set(df.scan[df.split=='test']) and set(test.subject)==set(df.subject[df.split=='test'])
    whole = study_work.evaluate_cohort(learn, df[df.split=='valid'], progress=False)
    both = found.merge(whole, on=['scan','class'])
    assert (both.dice_x-both.dice_y).abs().max()<.2 # the same scans on another grid
    with pytest.raises(ValueError, match="part: the cohort has no 'test' scans"):
        evaluate_slices(learn, df[df.split!='test'], tmp_path/'slices', 'test')
    learn.model = Above(.5)
    want = evaluate_slices(learn, df, tmp_path/'slices', 'valid')
    learn.model = Above(0.)
    learn.dls.train.after_batch.add(Normalize.from_stats([.5], [1.], cuda=False))
    assert want.dice.max()>0 and evaluate_slices(learn, df, tmp_path/'slices', 'valid').equals(want)

def test_student_and_teacher(scans, tmp_path, monkeypatch):
    "A teacher that is the student after each step is the student; one that forgets slowly is another"
    def weights(learn, df, store, score):
        total = sum(float(o.abs().sum()) for o in learn.model.parameters())
        return pd.DataFrame([{'subject':'a', 'scan':'a', 'class':'RV', 'dice':total}])
    monkeypatch.setattr(study_work, '_score', weights)
    for decay,same in ((0.,True),(.9,False)):
        run_,df = a_run(scans, tmp_path, method='teacher', decay=decay, epochs=1)
        make_run(run_, df, tmp_path/'slices', tmp_path)
        of_run = Evidence(tmp_path).scores().set_index('run').dice
        assert (of_run[name_of(run_)]==of_run[student_of(name_of(run_))])==same
    run_,df = a_run(scans, tmp_path, method='partial', epochs=1)
    make_run(run_, df, tmp_path/'slices', tmp_path)
    assert name_of(run_) in set(found:=Evidence(tmp_path).scores().run) and student_of(name_of(run_)) not in set(found)

def test_packed_slices_are_scored_as_slices_only(scans, tmp_path):
    packed = pack_slices(load_cohort(scans), recipe, tmp_path/'a.slices.npz', tmp_path/'slices')
    study = studies['table1'].only(['Partial supervision'])
    for score in ('test','valid'):
        with pytest.raises(ValueError, match=f'a.slices.npz has slices and no scans; score them as {score}-slices'):
            run(study, packed, tmp_path/'s', score=score)
    with pytest.raises(ValueError, match="score: 'slices' is none of test, valid, test-slices"):
        run(study, packed, tmp_path/'s', score='slices')
    from_file,from_scans = (run(study, o, tmp_path/name, score='test-slices')
                            for o,name in ((packed,'file'),(scans,'scans')))
    assert from_file.equals(from_scans) # the same training and scores, and the same name

def test_packed_slices_that_cannot_be_used(scans, tmp_path):
    df = load_cohort(scans)
    with pytest.raises(ValueError, match='b.npz: is not a name for packed slices; '
                                         'expected one that ends in .slices.npz'):
        pack_slices(df, recipe, tmp_path/'b.npz')
    with pytest.raises(ValueError, match='recipe: has no `size`'):
        pack_slices(df, Recipe(spacing=6.), tmp_path/'b.slices.npz')
    path = pack_slices(df[:2], recipe, tmp_path/'b.slices.npz', tmp_path/'slices')
    with pytest.raises(ValueError, match='has the slices of Recipe.*, not those of .*; '
                                         'pack the scans with this recipe'):
        open_store(path, replace(recipe, size=16))
    assert open_store(path, replace(recipe, rotate=5.)).recipe.rotate==5. # the slices are the same
    with pytest.raises(ValueError, match=f'has no slices of 10 scans, {df.scan[2]} for one'):
        open_store(path, recipe).prepare(df)
    some = open_store(path, recipe).prepare(df[:2].assign(split=['labeled','unlabeled']))
    with pytest.raises(ValueError, match=f'{df.scan[1]}: has no mask here'): some.mask(df.scan[1], 0)
    again = pickle.loads(pickle.dumps(some))
    assert again.scans.equals(some.scans) and np.array_equal(again.mask(df.scan[0], 0), some.mask(df.scan[0], 0))
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ValueError, match='cannot be read as packed slices .*; pack them again'):
        open_store(path, recipe)

def test_each_seed_has_labelled_subjects_of_its_own(scans, tmp_path):
    study = Study('draws', 'Draws',
                  {f'Partial supervision, {n}': dict(method='partial', labeled=n) for n in (1,3)},
                  ours='Partial supervision', x='labeled', draws=True)
    run(study, scans, tmp_path, seeds=3, processes=0)
    there = Evidence(tmp_path)
    parts = {(o['labeled'],o['settings']['seed']): there.parts(o['split']).groupby('split').subject.apply(set)
             for o in there.runs()}
    assert (len({frozenset(o.labeled) for (n,_),o in parts.items() if n==1})==3
            and all(len(o.labeled)==n for (n,_),o in parts.items()))
    assert all(parts[1,k].labeled<parts[3,k].labeled for k in range(3)) # fewer are some of the more
    for name in ('valid','test'): assert len({frozenset(o[name]) for o in parts.values()})==1
    usual = split_cohort(load_cohort(scans), 3, 1, 2, seed=0)
    assert parts[3,0].labeled==set(usual.subject[usual.split=='labeled']) # the first draw is the usual split

def test_no_run_is_begun_that_cannot_be_finished(monkeypatch):
    "By what its method has taken so far; a run that takes too long is left"
    def job(method, steps): return dict(run=dict(settings=dict(method=method, epochs=1, n_iters=steps)))
    begun = []
    def pretend(run):
        s = run['settings']
        begun.append((s['method'],s['n_iters']))
        time.sleep(s['n_iters']/100)
        return s['n_iters']/100
    monkeypatch.setattr(study_work, 'make_run', pretend)
    jobs = {'a1':job('a',30), 'b1':job('b',10), 'a2':job('a',300), 'b2':job('b',10), 'c':job('c',500)}
    with ThreadPoolExecutor(2) as pool: done = [k for k,e in study_work._finished(pool, jobs, 2, 2.)]
    assert set(done)=={'a1','b1','b2'} and ('a',300) not in begun and ('c',500) not in begun
    with ThreadPoolExecutor(2) as pool:
        assert {k for k,_ in study_work._finished(pool, {'a':job('a',1), 'b':job('b',1)}, 2, None)}=={'a','b'}

def test_evidence_of_two_machines(tmp_path):
    df = pd.DataFrame(dict(subject=list('abc'), scan=list('abc'), split=['labeled','valid','test'],
                           content=list('xyz')))
    for k,seeds in (('here',[0,1]),('there',[1,2])):
        Evidence(tmp_path/k).keep_cohort({1:df if k=='here' else df.assign(split=['valid','labeled','test'])})
        _add(tmp_path/k, seeds)
    here = Evidence(tmp_path/'here')
    assert here.merge(tmp_path/'there')==1 and here.merge(tmp_path/'there')==0 and here.merge(tmp_path/'nothing')==0
    assert (len(here.runs())==3 and len(here.scores())==3*18
            and len(here.scans().columns)==5 and (here.scans()!='').all(None))
    other = Evidence(tmp_path/'other')
    other.keep_cohort({1:df.assign(content='w')})
    _add(other.path, [7])
    with pytest.raises(ValueError, match=r'made with other scans of the same names \(3 of 3 differ'):
        here.merge(other.path)
    assert len(here.runs())==3

def test_two_studies_begin_in_an_empty_folder(tmp_path):
    "The second took the splits of the first away, whose runs then named what was not there"
    df = pd.DataFrame(dict(subject=list('abc'), scan=list('abc'), split=['labeled','valid','test'],
                           content=list('xyz')))
    there,other = Evidence(tmp_path),df.assign(split=['valid','labeled','test'])
    names = [there.keep_cohort({1:o})[1] for o in (df, other)]
    for name,o in zip(names, (df, other)): assert there.parts(name).split.tolist()==o.split.tolist()
    there.keep_cohort({1:df.assign(content='w')}) # without any run these are scans of a study that was given up
    assert set(there.scans().content)=={'w'}

# -- the command -------------------------------------------------------------------------------------------------------
def test_command(scans, tmp_path):
    env = {k:v for k,v in os.environ.items() if k!='FASTMISEG_DATA'}
    (script:=tmp_path/'fastmiseg-compare').write_text( # as pip makes it
        'import sys\n'
        'from fastmiseg.cli import compare\n'
        'if __name__=="__main__": sys.exit(compare())\n')
    cli = lambda *a: subprocess.run([sys.executable, script, *map(str, a)], capture_output=True, text=True, env=env)
    done = cli('table9', '--data', scans)
    assert done.returncode==2 and "fastmiseg-compare: study: 'table9' is none of" in done.stderr
    out = ['--out', tmp_path/'s', '--seeds', 1]
    done = cli('table1', *out)
    assert done.returncode==2 and 'set FASTMISEG_DATA' in done.stderr and 'Traceback' not in done.stderr
    assert 'figure4' in cli('--help').stdout
    rows = ['--rows', 'Partial supervision;Entropy min.', '--epochs', 1, '--n-iters', 1]
    done = cli('table1', '--data', scans, *out, '--score', 'valid', *rows)
    assert done.returncode==2 and 'there are 12 in this cohort' in done.stderr # the preset wants 56
    parts = ['--labeled', 1, '--valid', 1, '--test', 1]
    done = cli('table1', '--data', scans, '--recipe', 'auto', *out, *rows, *parts)
    assert (done.returncode==0 and '--labeled 1 --valid 1 --test 1' in done.stdout
            and 'labeled 1 (1 scans), test 1' in done.stdout), done.stderr
    again = cli('table1', *out, *rows, *parts) # without scans
    assert (again.returncode==0
            and again.stdout.replace(' --n-iters', ' --recipe auto --n-iters').split()[-60:]
                ==done.stdout.split()[-60:]), again.stderr
    (plan:=tmp_path/'mine.json').write_text(json.dumps(dict(
        title='Mine', rows={'a': dict(method='partial'), 'b': dict(method='partial', wd=.1)},
        ours='a', score='valid')))
    done = cli(plan, '--data', scans, *out, *rows[2:], *parts)
    assert (done.returncode==0 and '# Mine' in done.stdout and '- Otherwise in "b": wd 0.1.' in done.stdout
            and (tmp_path/'s'/'mine_cpu-1-labelled_valid.csv').exists()), done.stderr

# -- the committed results ---------------------------------------------------------------------------------------------
def test_readme_says_what_the_tables_say():
    root = Path(__file__).parent.parent
    text = (root/'README.md').read_text(encoding='utf-8')
    text = text[text.index('## What it gives'):text.index('## What it reads')]
    papers = "Labels only (the paper's base)"
    four = pd.read_csv(root/'studies'/'claim_acdc_test-slices.csv', index_col='row')['mean']
    for cohort,numbers,base in [('acdc', (1,3,4,7), (1,)), ('hippocampus', (1,2), (1,2))]:
        dice = pd.read_csv(root/'studies'/f'benchmark_{cohort}_test-slices.csv', index_col='row')['mean']
        dice = pd.concat([dice, four[four.index.str.endswith(', 4')]]) # of hearts; nothing else has four
        assert ' and '.join(f"{dice[f'{papers}, {n}']:.3f}" for n in base) in text
        for n in numbers:
            assert f"{dice[f'Labels only, {n}']:.3f} to {dice[f'Recommended, {n}']:.3f}" in text, (cohort, n)
        assert f"all masks: {dice['All masks']:.3f}" in text
    assert {f"{dice[f'{k}, 8']:.2f}" for k in ('Labels only','Recommended')}=={'0.81'} # "leave it at"
    gpu = (root/'benchmarks'/'gpu.md').read_text(encoding='utf-8')
    said = re.findall(r'0\.\d{3}', text[text.index('On a GPU'):text.index('On hippocampi')])
    assert len(said)==3 and all(f'| {float(o):g} |' in gpu for o in said)

def test_page_of_the_studies_says_what_their_tables_say():
    "Every Dice and every share of the gap in a line with links stands on one of the pages that it links to"
    for line in (results/'README.md').read_text(encoding='utf-8').splitlines():
        linked = re.findall(r'\]\(([\w./-]+\.md)(?:#[\w-]+)?\)', line)
        if not linked: continue
        pages = ''.join((results/o).read_text(encoding='utf-8') for o in linked)
        for dice in re.findall(r'\b0\.[4-9]\d\d\b', line): assert dice in pages, f'{dice}: {line[:80]}'
        shares = re.findall(r'(\d+) %', re.sub(
            r"The aim was \d+ %|the paper's claim, \d+ %|\d+ % of the row|with shifts \d+ %", '', line))
        for o in shares: assert f'| {o}% |' in pages, f'{o} %: {line[:80]}'

def script(name):
    spec = importlib.util.spec_from_file_location(name, results/f'{name}.py')
    spec.loader.exec_module(module:=importlib.util.module_from_spec(spec))
    return module

committed = [o for o in sorted(results.glob('*.csv')) if o.with_suffix('.md').exists()]

@pytest.mark.parametrize('csv', committed, ids=lambda o: o.stem)
def test_committed_tables_are_those_of_the_committed_runs(csv):
    name,given = script('all_tables').command_of(csv.with_suffix('.md'))
    study = find_study(results.parent/name if '/' in name else name)
    preset = presets[given.get('preset') or study.preset]
    preset = replace(preset, **{k:given[k] for k in ('labeled','valid','test') if k in given},
                     settings=replace(preset.settings, **{k:given[k] for k in ('epochs','n_iters') if k in given}))
    if 'rows' in given: study = study.only(given['rows'])
    there,score = Evidence(results),scored(study, preset, given.get('score'))
    wanted = wanted_runs(study, preset, given.get('seeds', 3), score,
                         Recipe.named(given.get('recipe') or preset.recipe, None))
    found = [(k, o) for (k,_),o in zip(wanted, there.find([o for _,o in wanted]))]
    (scores,table),text = study_results(study, found, there),csv.with_suffix('.md').read_text(encoding='utf-8')
    pd.testing.assert_frame_equal(table, pd.read_csv(csv), check_dtype=False)
    minutes = sum(o['seconds'] for _,o in found)/60
    assert f'{pages_text(table, study)}\n\n{legend(table, study)}\n' in text
    assert (f'- {len(found)} runs, {minutes:.0f} minutes' in text
            and all(o in text for o in made_with(found)))
    scans = there.parts(found[0][1]['split']).query(f"split=='{part_of(score)}'").scan.nunique()
    assert scores.groupby(['row','seed']).scan.nunique().eq(scans).all()

def test_every_committed_page_is_written_again(tmp_path, monkeypatch):
    "By the command that stands in it, without the scans, to the byte"
    import shutil
    for o in ('runs.jsonl','scores.csv','scans.csv'): shutil.copy(results/o, tmp_path/o)
    monkeypatch.delenv('FASTMISEG_DATA', raising=False)
    monkeypatch.chdir(results.parent)
    for csv in committed[::4]:
        name,given = script('all_tables').command_of(csv.with_suffix('.md'))
        assert compare_study(name, None, tmp_path, **given)==csv.with_suffix('.md').read_text(encoding='utf-8')
        assert (tmp_path/csv.name).read_bytes()==csv.read_bytes()

@pytest.mark.parametrize('md', sorted(results.glob('*.md')), ids=lambda o: o.stem)
def test_committed_results_have_their_command(md):
    text = md.read_text(encoding='utf-8')
    named = re.search(r'^    (?:fastmiseg-compare (?:studies/plans/)?([\w-]+)(?:\.json)? --data'
                      r'|python studies/(\w+)\.py) ?DATA', text, re.M)
    assert md.stem=='README' or md.stem.startswith(named[1] or named[2])
    assert not md.with_suffix('.csv').exists() or md.with_suffix('.png').exists()

def test_how_settings_were_chosen_is_written_again():
    assert script('choice').table()==(results/'choice'/'README.md').read_text(encoding='utf-8')

def test_page_beside_nnunet_is_written_again():
    assert script('nnunet').page()==(results/'nnunet.md').read_text(encoding='utf-8')

def test_nnunet_gets_the_slices_and_the_split_of_the_base(scans, tmp_path, monkeypatch):
    import nibabel as nib
    monkeypatch.setitem(presets, 'acdc-64', replace(tiny, settings=replace(small, epochs=1, n_iters=2)))
    job = (module:=script('nnunet')).jobs_of(scans, 1, [0,1], tmp_path/'evidence')[module.base,1]
    df = job['df']
    scores,about = module.train_ours(job)
    assert set(scores.scan)==set(df.scan[df.split=='valid']) and about['steps']==2
    slices = open_store(job['store'], recipe).prepare(df[df.split!='test'])
    module.write_raw(slices, labeled:=list(df.scan[df.split=='labeled']), tmp_path/'raw')
    assert {o.name for o in (tmp_path/'raw'/'labelsTr').iterdir()}=={f'{o}.nii.gz' for o in labeled}
    for o in labeled:
        image,mask = (nib.load(tmp_path/'raw'/part/f'{o}{end}.nii.gz')
                      for part,end in (('imagesTr','_0000'), ('labelsTr','')))
        assert image.header.get_zooms()==mask.header.get_zooms()==pytest.approx(slices.where(o).slice_spacing[::-1])
        np.testing.assert_array_equal(np.asarray(image.dataobj).T, slices.image(o, slice(None))[:,0])
        np.testing.assert_array_equal(np.asarray(mask.dataobj).T, slices.mask(o, slice(None)))

def test_committed_evidence_is_whole():
    there = Evidence(results)
    runs,scores,scans = there.runs(),there.scores(),there.scans()
    assert (len(runs)==len({o['id'] for o in runs})
            ==len({json.dumps([o[k] for k in decides], sort_keys=True) for o in runs}))
    ids = {o['id'] for o in runs}
    assert (ids<=set(scores.run)<=ids|{student_of(o) for o in ids}
            and scores.dice.between(0,1).all()
            and not scores.duplicated(['run','scan','class']).any())
    scanned = scores.groupby('run').scan.apply(set)
    splits = {o['split'] for o in runs}
    assert splits==set(scans)-{'subject','scan','content'}
    for split in splits:
        assert (split_name(there.parts(split))==split
                and there.parts(split).groupby('subject').split.nunique().eq(1).all())
    for o in runs:
        parts = there.parts(o['split'])
        assert (scanned[o['id']]==set(parts.scan[parts.split==part_of(o['score'])])
                and len(o['curve']['dice'])==o['settings']['epochs'])
        assert (parts.subject[parts.split=='labeled'].nunique()==o['labeled']
                and {'versions','threads','seconds'}<=set(o))

@pytest.fixture
def leads():
    before = dict(methods)
    yield script('leads')
    for k in methods.keys()-before.keys(): del methods[k]

def test_each_lead_trains(leads, scans, tmp_path):
    study = Study('leads', 'Leads', leads.rows, ours='recommended, valid area', score='valid', draws=True)
    run(study, scans, tmp_path, preset=replace(tiny, settings=replace(small, n_iters=2)))
    assert len(runs:=Evidence(tmp_path).runs())==len(leads.rows)
    terms = {o['settings']['method']:set(o['curve']) for o in runs}
    assert all('deep' in terms[k] for k in ('labels, deep','recommended, deep'))
    assert {'global_mi','local_mi','consistency'}<=terms['valid area']

def test_area_that_T_does_not_mirror_in(leads):
    T = Warps(torch.tensor([[[1.,0,1],[0,1,0]], [[1,0,0],[0,1,0]]])) # half an image to the left; nothing
    area = leads.inside(in_sequence(Flips(torch.tensor([[True,False]]*2)), T), x:=torch.rand(2,3,8,8))
    assert area.shape==(2,1,8,8) and area[0,...,:4].all() and not area[0,...,4:].any() and area[1].all()
    assert torch.equal(T(x)[0,...,:4], x[0,...,4:])

@pytest.mark.parametrize('name', ['why','teacher_or_student'])
def test_scripts_of_the_studies(name, scans, tmp_path, monkeypatch, capsys):
    lit = replace(tiny, settings=replace(small, jitter=.5), weights=presets['cpu-long'].weights)
    monkeypatch.setitem(presets, 'tiny', lit)
    (how:=tmp_path/'recipe.json').write_text(json.dumps(recipe.to_dict()))
    more = dict(seeds=2, parts=2, n_iters=3) if name=='teacher_or_student' else dict(n_iters=25)
    (module:=script(name)).main(data=str(scans), recipe=str(how), preset='tiny', out=str(tmp_path), **more)
    text = (tmp_path/f'{name}.md').read_text(encoding='utf-8')
    assert (f'    python studies/{name}.py DATA --recipe ' in text
            and f"--preset tiny --{'seeds 2 --parts 2 --' if 'seeds' in more else ''}n-iters {more['n_iters']}" in text)
    assert text.strip() in capsys.readouterr().out
    if name=='teacher_or_student':
        assert all(f'| {o} | ' in text for o in module.who) and '| 3 steps | 6 steps |' in text
    else:
        assert all((tmp_path/o).stat().st_size>5000
                   for o in ('why.png','clusters_0.01.png','clusters_0.1.png','clusters_0.1_shift.png'))
        assert text.count('| 0.1, T shifts | ')==9+2

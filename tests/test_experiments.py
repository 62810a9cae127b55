"Studies: rows, columns, arithmetic, and the same figures again"
import importlib.util, json, os, shlex, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from dataclasses import replace
from fastai.callback.core import Callback
from scipy.stats import ttest_rel
from fastmiseg import trial
from fastmiseg.experiments import presets, run_study, studies, _jobs, _made_with
from fastmiseg.scans.cohort import load_cohort, split_cohort
from fastmiseg.trial import Preset, _callbacks, _settings, _train
from fastmiseg.report import Study, study_curves, study_scores, study_table, _markdown, _p
from fastmiseg.scans.phantom import make_phantom
from fastmiseg.scans.recipe import Recipe

tiny = Preset(Recipe(spacing=6., size=32, classes=('background','RV','Myo','LV'), flip='hv'), labeled=1, valid=1, test=2, width=4, epochs=2, n_iters=10, bs=2, unlabeled_bs=2, lr=2e-2, weights=presets['cpu'].weights)

@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    make_phantom(root:=tmp_path_factory.mktemp('scans'), n_subjects=12, seed=0, size=(32,40))
    return root

@pytest.fixture(scope='module')
def out(tmp_path_factory): return tmp_path_factory.mktemp('studies')

def run(name, scans, out, **kw): return run_study(name, scans, out, **{**dict(preset=tiny, seeds=1, processes=2), **kw})

@pytest.mark.parametrize('name', list(studies))
def test_every_row_can_be_made(name):
    for preset in presets.values():
        for row in studies[name].rows.values():
            s = _settings(preset, row)
            assert s==_settings(preset, row) and json.dumps({**s, 'recipe':None})
            _callbacks(s)

def some_rows(name):
    "Rows at 1 and 2 labelled subjects; of the long studies the first and the last two"
    rows = list(studies[name].rows)
    return [k for k in rows if k.endswith((', 1',', 2'))] if studies[name].x else rows if len(rows)<10 else [rows[0],*rows[-2:]]

def check_arithmetic(scores, table, study):
    "Means, deviations, gap closed and p of a table, from the scores by other means"
    t = table.set_index('row')
    classes,seeds = sorted(set(scores['class'])),sorted(set(scores.seed))
    means = {k: np.array([np.mean([g[(g.seed==s)&(g['class']==c)].dice.mean() for c in classes]) for s in seeds]) for k,g in scores.groupby('row')}
    for k,m in means.items():
        assert np.isclose(t['mean'][k], m.mean()) and np.isclose(t.mean_sd[k], m.std(ddof=1) if len(m)>1 else np.nan, equal_nan=True)
    assert ('gap_closed' in t)==({'Partial supervision','Full supervision'}<=set(means))
    if 'gap_closed' in t:
        lo,hi = means['Partial supervision'].mean(),means['Full supervision'].mean()
        for k,m in means.items(): assert np.isclose(t.gap_closed[k], (m.mean()-lo)/(hi-lo) if hi!=lo else np.nan, equal_nan=True)
    by = lambda k: [scores[(scores.row==k)&(scores.subject==s)].dice.mean() for s in sorted(set(scores.subject))]
    for k in set(means)-{study.against(k) for k in means}:
        ours = study.against(k)
        if ours in means: assert np.isclose(t.p[k], ttest_rel(by(ours), by(k), alternative='greater').pvalue, equal_nan=True)

@pytest.mark.parametrize('name', [k for k in studies if k!='table1'])
def test_study_runs(name, scans, out, tmp_path):
    kw,study = dict(rows=some_rows(name)),studies[name]
    score = study.score or 'test'
    found,stem = run(name, scans, out, **kw),out/(name if score=='test' else f'{name}_{score}')
    table = pd.read_csv(stem.with_suffix('.csv'))
    assert list(table.row)==kw['rows'] and set(found.row)==set(table.row)
    assert list(table.columns)[:10]==['row','seeds','RV','RV_sd','Myo','Myo_sd','LV','LV_sd','mean','mean_sd'] and 'hd95' in table
    check_arithmetic(found, table, study)
    text = stem.with_suffix('.md').read_text()
    assert 'test 2 (2 scans)' in text and 'No subject is in two parts' in text and 'final checkpoint' in text and stem.with_suffix('.png').stat().st_size>5000
    assert set(found.subject)==set(pd.read_csv(out/'split_1.csv').query(f"split=='{score}'").subject)
    assert str(scans) not in ''.join(o.read_text() for o in out.rglob('*') if o.suffix in ('.md','.csv','.json') and 'slices' not in o.parts) # results name no folder of this machine
    same_figures(found, run(name, scans, tmp_path, rows=kw['rows'][-1:], store=out/'slices'))

def same_figures(first, again):
    cols = ['row','seed','subject','class','dice','hd95','assd']
    first,again = (o[cols].sort_values(cols[:4]).reset_index(drop=True) for o in (first[first.row.isin(again.row)], again))
    pd.testing.assert_frame_equal(again, first, check_exact=True)

def test_table1_arithmetic_and_repetition(scans, out, tmp_path):
    scores = run('table1', scans, out, seeds=2)
    check_arithmetic(scores, pd.read_csv(out/'table1.csv'), studies['table1'])
    same_figures(scores, run('table1', scans, tmp_path, rows=['All','Mean Teacher'], seeds=2))

def test_what_made_the_runs_is_told(tmp_path):
    jobs = [dict(row=row, seed=seed, path=str(tmp_path/f'{row}{seed}')) for row in ('a','b') for seed in (0,1)]
    for j,v in zip(jobs, ('torch 2','torch 2','torch 2','torch 3')):
        (o:=Path(j['path'])).mkdir(); (o/'config.json').write_text(json.dumps(dict(versions=v)))
    assert _made_with(jobs[:3])==['- torch 2.'] and _made_with(jobs)==['- torch 2: a (0, 1); b (0).', '- torch 3: b (1).']

def test_runs_are_shared_and_kept(scans, out):
    run('teacher', scans, out)
    made = {o:o.stat().st_mtime_ns for o in out.glob('runs/*/scores.csv')}
    run('teacher', scans, out)
    assert made=={o:o.stat().st_mtime_ns for o in out.glob('runs/*/scores.csv')}
    one = next(iter(made)).parent
    assert not list(one.glob('**/*.pt')) and json.loads((one/'config.json').read_text())['settings']['width']==4 and (one/'log.csv').exists()

def test_settings_are_chosen_on_validation_scans(scans, out):
    rows = ['Partial supervision','Mean Teacher: teacher [1.0, 0.4]']
    scores = run('choose', scans, out, rows=rows)
    split = pd.read_csv(out/'split_1.csv')
    assert set(scores.subject)==set(split[split.split=='valid'].subject) and (out/'choose_valid.md').exists()

def test_mistakes(scans, out):
    with pytest.raises(ValueError, match="study: 'table9' is none of table1"): run_study('table9', scans, out)
    with pytest.raises(ValueError, match="preset: 'phone' is none of acdc"): run_study('table1', scans, out, preset='phone')
    with pytest.raises(ValueError, match='rows: Ours: no such row; there are Full supervision'): run('table1', scans, out, rows=['Ours'])
    with pytest.raises(ValueError, match="chooses settings, which is done on valid scans; got 'test'"): run('choose', scans, out, score='test')
    with pytest.raises(ValueError, match="score: the preset has no 'test' scans; there are labeled, unlabeled, valid"): run('table1', scans, out, preset=replace(tiny, test=0), score='test')

def test_a_failed_run_is_named_and_the_others_are_kept(scans, out, tmp_path):
    study = Study('broken', {'Partial supervision': dict(method='partial'), 'Too wide': dict(method='mireg', args=dict(neighborhood={'Upconv3':99,'Upconv2':7}))})
    with pytest.raises(RuntimeError, match=r'(?s)1 of 2 runs failed; call the study again to repeat them:.*Too wide, seed 0: .*neighborhood: 99 is more than the map'): run(study, scans, tmp_path)
    assert len(list(tmp_path.glob('runs/*/scores.csv')))==1

def test_weights_of_a_ramp_are_the_presets():
    for preset in presets.values():
        s,full = (_settings(preset, dict(method='mireg', **o))['weights'] for o in (dict(ramp=.2), dict(ramp=0)))
        assert {k:v[0] for k,v in s.items()}==full and all(v[1]==.2 for v in s.values()) and set(full)=={'global_mi','local_mi','consistency'}

def test_ramp_of_two_weights():
    s = _settings(presets['cpu-shift'], dict(method='mi', ramp=.2))
    assert s['weights']==dict(mi_only=dict(global_mi=[.0003,.2], local_mi=[.1,.2])) and _callbacks(s)

def test_optimiser_and_schedule_of_a_row(scans, tmp_path):
    df = split_cohort(load_cohort(scans), 1, 1, 1, seed=0)
    def hypers(name, **row):
        s = {**_settings(tiny, dict(method='partial', **row)), 'recipe':tiny.recipe.to_dict()}
        learn = _train(s, df, str(tmp_path/'slices'), 0, tmp_path/name)
        return learn.opt.hypers[-1],[getattr(o, 'func', o).__name__ for o in learn.opt.cbs],{k:np.array(o) for k,o in learn.recorder.hps.items()}
    h,steps,hps = hypers('usual')
    assert (h['eps'],h['sqr_mom'])==(1e-8,.99) and 'weight_decay' in steps and np.isclose(hps['mom'].min(), .85, atol=.01)
    h,steps,_ = hypers('torch', adam=dict(sqr_mom=.999, decouple_wd=False))
    assert (h['eps'],h['sqr_mom'],h['wd'])==(1e-8,.999,tiny.wd) and 'l2_reg' in steps and 'weight_decay' not in steps
    assert hypers('fastai', adam=dict(eps=1e-5))[0]['eps']==1e-5
    h,_,hps = hypers('held', one_cycle=False)
    first,n = tiny.lr/tiny.div,tiny.epochs*tiny.n_iters # warm-up over a tenth of 20 steps
    assert set(hps)=={'lr'} and h['mom']==.9 and np.allclose(hps['lr'][:3], [first, (first+tiny.lr)/2, tiny.lr])
    assert np.allclose(hps['lr'][2:], tiny.lr*(1+np.cos(np.pi*np.arange(n-2)/(n-2)))/2)

@pytest.mark.parametrize('one_cycle', [True,False])
def test_an_interrupted_run_goes_on(one_cycle, scans, tmp_path, monkeypatch):
    df = split_cohort(load_cohort(scans), 1, 1, 1, seed=0)
    s = {**_settings(tiny, dict(method='mireg+teacher', one_cycle=one_cycle)), 'recipe':tiny.recipe.to_dict()}
    def go(name): trial._run(dict(path=tmp_path/name, settings=s, seed=0, score='test', df=df, store=str(tmp_path/'slices'), threads=torch.get_num_threads()))
    class PowerCut(Callback):
        def after_batch(self):
            if self.training and self.train_iter==15: raise KeyboardInterrupt
    go('whole')
    with monkeypatch.context() as m:
        m.setattr(trial, '_callbacks', lambda s: [*_callbacks(s), PowerCut()])
        with pytest.raises(KeyboardInterrupt): go('cut')
    assert not (tmp_path/'cut'/'scores.csv').exists() and list((tmp_path/'cut').glob('log/*.pt'))
    go('cut')
    whole,cut = (pd.read_csv(tmp_path/o/'scores.csv').drop(columns='seconds') for o in ('whole','cut'))
    assert cut.equals(whole) and (tmp_path/'cut'/'log.csv').read_text()==(tmp_path/'whole'/'log.csv').read_text()

def test_what_is_as_usual_is_no_setting():
    s = _settings(presets['cpu'], dict(method='mireg'))
    assert s==_settings(presets['cpu'], dict(method='mireg', adam={}, one_cycle=True)) and not {'adam','one_cycle'}&set(s)
    for k in ('acdc','promise12','spleen','mmwhs'):
        s = _settings(presets[k], dict(method='mireg'))
        assert s['one_cycle'] is False and s['adam']==dict(sqr_mom=.999, decouple_wd=False)
        assert _settings(presets[k], dict(method='mireg', adam=dict(eps=1e-5)))['adam']==dict(sqr_mom=.999, decouple_wd=False, eps=1e-5)

def test_flips_of_a_row_are_changes():
    flips = lambda preset, **o: _settings(presets[preset], dict(method='mireg', flips=o))['flips']
    assert flips('cpu-shift', p=.8)==dict(jitter=.5, shift=.5, p=.8)
    assert flips('cpu-shift', shift=0.)==dict(jitter=.5) and flips('cpu', shift=0.)=={}
    assert flips('cpu-shift', p=0.)==dict(jitter=.5, shift=.5, p=0.) and flips('cpu-shift', axes=[])==dict(jitter=.5, shift=.5, axes=[])
    assert _settings(presets['cpu-shift'], studies['views'].rows['Flips and intensity'])['flips']==dict(jitter=.5)

def test_settings_of_rows_are_told(scans, out):
    run('shift', scans, out, rows=['Partial supervision','Consistency only'])
    text = (out/'shift_valid.md').read_text()
    assert '- T: flips along the axes of the recipe.' in text
    assert '- Otherwise in "Consistency only": T flips along the axes of the recipe, jitter 0.5, shift 0.5; consistency_only [5.0, 0.8].' in text
    run('faithful', scans, out, rows=["Both: PyTorch's Adam",'Both: linear warm-up, cosine, momentum held'])
    text = (out/'faithful.md').read_text()
    assert '''- Otherwise in "Both: PyTorch's Adam": Adam with sqr_mom 0.999, decouple_wd False.''' in text
    assert '- Otherwise in "Both: linear warm-up, cosine, momentum held": linear warm-up and cosine (momentum 0.9).' in text
    run('faithful', scans, out, preset=replace(tiny, one_cycle=False, adam=dict(sqr_mom=.999)), rows=['All'])
    assert 'Adam with sqr_mom 0.999, linear warm-up and cosine (momentum 0.9) up to 0.02 from a 400th' in (out/'faithful.md').read_text()

def test_other_scans_of_the_same_names(scans, tmp_path):
    rows = dict(rows=['Partial supervision'])
    run('table1', scans, tmp_path/'s', **rows)
    make_phantom(tmp_path/'other', n_subjects=12, seed=1, size=(32,40))
    with pytest.raises(ValueError, match=r'made with other scans of the same names \(12 of 12 differ, heart000 for one\); choose another folder'): run('table1', tmp_path/'other', tmp_path/'s', **rows)
    run('table1', scans, tmp_path/'s', **rows)

def test_curves_hold_every_epoch(scans, out):
    scores = run('figure7', scans, out, seeds=2)
    jobs = [dict(row=r, seed=s, path=out/'runs'/p) for r,s,p in [('a',0,next((out/'runs').glob('pretrain-*-0-*'))),('b',0,next((out/'runs').glob('partial-*-0-*')))]]
    c = study_curves(jobs)
    assert c.groupby('row').epoch.apply(list).to_dict()=={'a':[1,2],'b':[1,2]} and c.dice.between(0,1).all()

def test_subjects_are_paired():
    s = pd.DataFrame(dict(subject=list('aabbcc'), dice=[.5,.7,.4,.4,.9,.7]))
    assert np.isclose(_p(s, s.assign(dice=s.dice-[.1,.1,.2,.2,.05,.05])), ttest_rel([.6,.4,.8], [.5,.2,.75], alternative='greater').pvalue)

def test_command(scans, tmp_path):
    env = {k:v for k,v in os.environ.items() if k!='FASTMISEG_DATA'}
    (script:=tmp_path/'fastmiseg-compare').write_text('import sys\nfrom fastmiseg.cli import compare\nif __name__=="__main__": sys.exit(compare())\n') # as pip makes it
    cli = lambda *a: subprocess.run([sys.executable, script, *a], capture_output=True, text=True, env=env)
    done = cli('table9', '--data', str(scans))
    assert done.returncode==2 and "fastmiseg-compare: study: 'table9' is none of" in done.stderr
    done = cli('table1')
    assert done.returncode==2 and 'set FASTMISEG_DATA' in done.stderr
    assert 'figure4' in cli('--help').stdout
    rows = 'Partial supervision;Entropy min.'
    done = cli('table1', '--data', str(scans), '--recipe', 'auto', '--out', str(tmp_path/'s'), '--seeds', '1', '--score', 'valid', '--rows', rows, '--epochs', '1', '--n-iters', '1')
    assert done.returncode==2 and 'these are more than the 12 subjects' in done.stderr # the preset wants 56
    done = cli('table1', '--data', str(scans), '--recipe', 'auto', '--out', str(tmp_path/'s'), '--seeds', '1', '--rows', rows, '--epochs', '1', '--n-iters', '1', '--labeled', '1', '--valid', '1', '--test', '1')
    assert done.returncode==0 and '--labeled 1 --valid 1 --test 1' in done.stdout and 'labeled 1 (1 scans), test 1' in done.stdout, done.stderr

def test_readme_says_what_the_table_says():
    root = Path(__file__).parent.parent
    tables = [pd.read_csv(root/'studies'/f'{o}.csv').itertuples() for o in ('table1','table1_cpu-shift','table1_cpu-long')]
    readme = (root/'README.md').read_text(encoding='utf-8')
    names = {'Full supervision':'full supervision', 'Partial supervision':'partial supervision', 'Entropy min.':'entropy minimisation', 'Mean Teacher':'Mean Teacher',
             'MI only':'mutual information only', 'Consistency only':'consistency only', 'All':'all terms of the paper'}
    said = lambda o: f'{o.mean:.3f} ({o.mean_sd:.3f}) | {o.gap_closed:.0%} |'
    for a,b,c in zip(*tables, strict=True): assert a.row==b.row==c.row and f'| {names[a.row]} | {said(a)} {said(b)} {said(c)}' in readme
    last = pd.read_csv(root/'studies'/'table1_cpu-long.csv').set_index('row')
    assert f"above Mean Teacher (p = {last.p['Mean Teacher']:.1g}" in readme and last.p['Consistency only']<.001 and 'above consistency alone (p < 0.001' in readme
    near = {f'{last.hd95[k]:.2f}' for k in ('Mean Teacher','Consistency only')}
    assert len(near)==1 and f"the lowest HD95 but for full supervision ({last.hd95['All']:.2f} mm; {near.pop()} mm" in readme and last.hd95.drop('Full supervision').idxmin()=='All'

def of_command(md):
    "Study, preset, seeds, scored part and rows of a committed table, from the command on top of it"
    words = shlex.split(next(o for o in md.read_text(encoding='utf-8').splitlines() if o.startswith('    fastmiseg-compare ')))
    given = dict(zip(words[2::2], words[3::2]))
    assert set(given)<={'--data','--preset','--recipe','--seeds','--score','--rows'} and given['--recipe']=='hippocampus'
    study = studies[words[1]]
    rows = given['--rows'].split(';') if '--rows' in given else study.rows
    return study,presets[given.get('--preset', 'cpu')],range(int(given.get('--seeds', 3))),given.get('--score') or study.score or 'test',{k:study.rows[k] for k in rows}

results = Path(__file__).parent.parent/'studies'

@pytest.mark.parametrize('csv', [o for o in sorted(results.glob('*.csv')) if o.with_suffix('.md').exists()], ids=lambda o: o.stem)
def test_committed_tables_are_those_of_the_committed_runs(csv):
    study,preset,seeds,score,rows = of_command(csv.with_suffix('.md'))
    parts = {int(o.stem.split('_')[1]): o.read_text(encoding='utf-8') for o in results.glob('split_*.csv')}
    jobs = _jobs(rows, preset, Recipe.hippocampus(), seeds, score, parts, results)
    table,text = study_table(scores:=study_scores(jobs), study),csv.with_suffix('.md').read_text(encoding='utf-8')
    pd.testing.assert_frame_equal(table, pd.read_csv(csv), check_dtype=False)
    minutes = scores.drop_duplicates(['row','seed']).seconds.sum()/60
    assert _markdown(table) in text and f'- {len(jobs)} runs, {minutes:.0f} minutes' in text and all(o in text for o in _made_with(jobs))

@pytest.mark.parametrize('md', sorted(results.glob('*.md')), ids=lambda o: o.stem)
def test_committed_results_have_their_command(md):
    assert md.stem=='README' or any(o in md.read_text(encoding='utf-8') for o in (f'    fastmiseg-compare {md.stem.split("_")[0]} --data DATA', f'    python studies/{md.stem}.py DATA'))
    assert not md.with_suffix('.csv').exists() or md.with_suffix('.png').exists()

def test_committed_runs_have_settings_curves_and_scores_and_no_weights():
    for o in (results/'runs').iterdir():
        assert {f.name for f in o.iterdir()}-{'pretrain.csv'}=={'config.json','log.csv','scores.csv'}, o

@pytest.mark.parametrize('script', ['why','teacher_or_student'])
def test_scripts_of_the_studies(script, scans, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(script, results/f'{script}.py')
    spec.loader.exec_module(module:=importlib.util.module_from_spec(spec))
    monkeypatch.setitem(presets, 'tiny', replace(tiny, flips=dict(jitter=.5), weights=presets['cpu-long'].weights))
    module.main(data=str(scans), preset='tiny', out=str(tmp_path), n_iters=3, **(dict(seeds=2, parts=2) if script=='teacher_or_student' else {}))
    text = (tmp_path/f'{script}.md').read_text(encoding='utf-8')
    assert f'    python studies/{script}.py DATA --preset tiny' in text and '--n-iters 3' in text and text.strip() in capsys.readouterr().out
    if script=='teacher_or_student':
        assert all(f'| {o} | ' in text for o in module.who) and '| 3 steps | 6 steps |' in text

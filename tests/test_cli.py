"""The commands as processes: exit codes, sentences, interruption; and what a run folder survives"""
import errno, json, os, signal, subprocess, sys, tempfile, time
from pathlib import Path

import nibabel as nib, numpy as np, pandas as pd, pytest, torch
import SimpleITK as sitk

import fastmiseg.commands as C
from fastmiseg import cli, run_model
from fastmiseg.files import WriteError, write_text
from fastmiseg.scans.cohort import load_cohort, save_cohort
from fastmiseg.commands import prepare_run, resume_run, train_run
from fastmiseg.run_folder import RunError
from fastmiseg.run_model import evaluate_run, predict_scans
from fastmiseg.segmenter import SegmenterError, load_segmenter
from fastmiseg.scans.messages import VolumeError

tiny = dict(epochs=2, n_iters=8, width=2, bs=2, unlabeled_bs=2)
_tiny = [f'--{k.replace("_","-")}={v}' for k,v in tiny.items()]

def command(name, *args, start=False, **kw):
    script = Path(tempfile.gettempdir())/f'fastmiseg-{name}' # as pip makes it
    script.write_text(f'import sys\nfrom fastmiseg.cli import {name}\nif __name__=="__main__": sys.exit({name}())\n')
    cmd = [sys.executable, script, *map(str, args)]
    env = {**os.environ, 'OMP_NUM_THREADS':'1'}
    return (subprocess.Popen if start else subprocess.run)(cmd, text=True, env=env,
        **(dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) if start else dict(capture_output=True)), **kw)

@pytest.fixture(scope='module')
def prepared(hearts, tmp_path_factory):
    out = tmp_path_factory.mktemp('cli')/'prepared'
    df = hearts.df[:8].drop(columns='split'); df.attrs.update(hearts.df.attrs)
    prepare_run(save_cohort(df, hearts.root/'eight.csv'), out, recipe=hearts.recipe,
                labeled=2, valid=2, test=2, workers=0)
    return out

@pytest.fixture(scope='module')
def run(prepared):
    train_run(prepared, prepared.parent/'run', workers=0, **tiny)
    return prepared.parent/'run'

def weights(run): return {k:v for k,v in load_segmenter(run/'model.safetensors', 'cpu').model.state_dict().items()}

def test_figures_of_a_finished_run(run):
    "Figures 2, 5 and 6 of the paper, the curves, the scores, the worst scans"
    assert {o.name for o in (run/'figures').iterdir()}=={
        'training.png','joints.png','clusters.png','tsne.png','dice.png','hd95.png','worst.png'}
    assert all(o.stat().st_size>5000 for o in (run/'figures').iterdir())

# -- processes ---------------------------------------------------------------------------------------------------------
def test_ctrl_c_and_resume(prepared, tmp_path):
    "An interrupted run says how to go on, and ends with the weights of one that nobody disturbed"
    long = {**tiny, 'epochs':3, 'n_iters':90} # so long that it can be interrupted
    p = command('train', prepared, '--out', tmp_path/'run',
                *[f'--{k.replace("_","-")}={v}' for k,v in long.items()], start=True)
    try:
        for _ in range(3000):
            if list((tmp_path/'run').glob('checkpoints/*.pt')) or p.poll() is not None: break
            time.sleep(.1)
        p.send_signal(signal.SIGINT)
        out,err = p.communicate(timeout=300)
    finally: p.kill()
    assert (p.returncode==130
            and f'fastmiseg-train: interrupted; go on with: fastmiseg-train --out {tmp_path/"run"} --resume' in err
            and 'Traceback' not in err)
    assert not (tmp_path/'run'/'model.safetensors').exists()
    done = command('train', '--out', tmp_path/'run', '--resume', '--workers', 0)
    assert done.returncode==0 and 'RV' in done.stdout, done.stderr
    train_run(prepared, tmp_path/'whole', workers=0, **long)
    a,b = weights(tmp_path/'run'),weights(tmp_path/'whole')
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert (pd.read_csv(tmp_path/'run'/'log.csv').equals(pd.read_csv(tmp_path/'whole'/'log.csv'))
            and len(pd.read_csv(tmp_path/'run'/'log.csv'))==3)

def test_predict_goes_on_after_a_bad_scan(run, hearts, tmp_path):
    (tmp_path/'scans').mkdir()
    for r in hearts.df[:2].itertuples(): os.link(r.image, tmp_path/'scans'/Path(r.image).name)
    (tmp_path/'scans'/'a_broken.nii.gz').write_bytes(Path(hearts.df.image[2]).read_bytes()[:5000])
    r = command('predict', run, tmp_path/'scans', '--out', tmp_path/'segs', '--largest')
    assert (r.returncode==1 and '2 segmentations in' in r.stdout and 'a_broken.nii.gz' in r.stderr
            and '1 of 3 scans could not be used' in r.stderr)
    assert sorted(os.listdir(tmp_path/'segs'))==['.segmented.jsonl','heart000.nii.gz','heart001.nii.gz']
    r = command('predict', run, tmp_path/'scans', '--out', tmp_path/'segs')
    assert (r.returncode==2
            and 'heart000.nii.gz exists, and 1 more; choose another place, or replace with --overwrite' in r.stderr
            and 'Traceback' not in r.stderr)

@pytest.mark.parametrize('name', ['prepare','train','predict','evaluate'])
def test_help(name):
    r = command(name, '--help')
    assert r.returncode==0 and f'usage: fastmiseg-{name}' in r.stdout and 'Exit codes' in r.stdout
    assert command(name, '--nonsense').returncode==2

def test_wrong_calls(tmp_path):
    r = command('train')
    assert r.returncode==2 and r.stderr=='fastmiseg-train: DATA: missing; give a folder or CSV of scans, or --resume\n'
    r = command('prepare', tmp_path/'nothing')
    assert r.returncode==2 and 'does not exist' in r.stderr and 'Traceback' not in r.stderr

@pytest.mark.parametrize('option', ['global_mi','local_mi','consistency','entropy'])
def test_weights_reach_their_terms(prepared, tmp_path, capsys, option):
    "What the command hands on is refused under its own name by a method that has no such term"
    for w in (.1, [5.,.8]):
        with pytest.raises(SystemExit, match='2'):
            cli.train(str(prepared), str(tmp_path/'run'), method='partial', **{option:w})
        assert capsys.readouterr().err==(f"fastmiseg-train: --{option.replace('_','-')}: "
                                         f"the method 'partial' has no {option} term; it has none\n")
    with pytest.raises(SystemExit, match='2'):
        cli.train(str(prepared), str(tmp_path/'run'), method='entropy', entropy=0.)
    assert '--entropy: 0 leaves the unlabelled scans out; for that, take the method partial' in capsys.readouterr().err
    assert not (tmp_path/'run').exists()

# -- run folders -------------------------------------------------------------------------------------------------------
def test_split_is_taken(run, prepared):
    a,b = (load_cohort(o/'split.csv', 'csv') for o in (run, prepared))
    assert a.equals(b) and a.split.value_counts().to_dict()==dict(labeled=2, valid=2, test=2, unlabeled=2)
    assert set(pd.read_csv(run/'metrics.csv').scan)==set(a.scan[a.split=='test'])

@pytest.mark.parametrize('method', ['partial','teacher','mireg+teacher','entropy','consistency','pretrain'])
def test_methods(prepared, tmp_path, method):
    epochs = 2 if method=='pretrain' else 1
    train_run(prepared, tmp_path/'run', method=method, workers=0, **{**tiny, 'epochs':epochs, 'n_iters':3})
    about = load_segmenter(tmp_path/'run'/'model.safetensors').about['provenance']
    assert (about['method']==method
            and len(about['weights'])==dict(partial=0).get(method, method.count('+')+1)
            and 'dice' in about['metrics'])
    logs = ['log.csv', *['pretraining.csv']*(method=='pretrain')]
    assert all(len(pd.read_csv(tmp_path/'run'/o))==1 for o in logs)

def test_folder_moves(run, prepared, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path/'elsewhere')
    assert evaluate_run(tmp_path/'elsewhere', progress=False).equals(evaluate_run(run, progress=False))

def test_other_format(run, tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(
        {**json.loads((run/'config.json').read_text()), 'format':7, 'fastmiseg':'3.1'}))
    for f in (resume_run, evaluate_run, lambda o: predict_scans(o, o, o)):
        with pytest.raises(RunError, match=r'config.json: has format 7 and was written by fastmiseg 3.1, '
                                           'this is fastmiseg .* knows format 1'):
            f(tmp_path)
    (tmp_path/'config.json').write_text('{')
    with pytest.raises(RunError, match='config.json: is not JSON'): resume_run(tmp_path)

def test_overwrite(run, prepared, tmp_path):
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('x')
    with pytest.raises(RunError, match='is not a run folder, but holds thesis.txt'):
        train_run(prepared, tmp_path/'mine', overwrite=True)
    with pytest.raises(FileExistsError, match='there is a run already'): train_run(prepared, run)
    with pytest.raises(RunError, match='is the folder with the prepared slices'):
        train_run(prepared, prepared, overwrite=True)
    with pytest.raises(FileExistsError, match='metrics.csv: exists, with other scores'):
        evaluate_run(run, split='valid', overwrite=False)
    assert os.listdir(tmp_path/'mine')==['thesis.txt'] and (run/'model.safetensors').exists()
    out = tmp_path/'again'
    for method in ('partial','entropy'):
        train_run(prepared, out, method=method, overwrite=True, workers=0, **{**tiny, 'epochs':1, 'n_iters':2})
    assert (load_segmenter(out/'model.safetensors').about['provenance']['method']=='entropy'
            and len(pd.read_csv(out/'log.csv'))==1)

def test_model_for_other_classes(run, hearts, tmp_path):
    df = hearts.df[:2].drop(columns='split'); df.attrs.update(hearts.df.attrs, classes=('background','prostate'))
    with pytest.raises(ValueError, match='masks hold the classes background, prostate, '
                                         'but the model predicts background, RV, Myo, LV'):
        evaluate_run(run, save_cohort(df, tmp_path/'c.csv'), tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_full_disk(run, prepared, tmp_path, monkeypatch):
    "Every file that a run writes, when there is no room for it: a sentence, and what was there stays"
    replace = os.replace
    for name in ('config.json','log.csv','metrics.csv','model.safetensors'):
        def full(a, b):
            if Path(b).name==name: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return replace(a, b)
        with monkeypatch.context() as m:
            m.setattr(os, 'replace', full)
            with pytest.raises((WriteError, SegmenterError),
                               match=rf'{name}: cannot be written .No space left on device'):
                train_run(prepared, tmp_path/name, workers=0, **{**tiny, 'epochs':1, 'n_iters':2})
        left = [o.name for o in (tmp_path/name).iterdir()]
        assert name not in left and not [o for o in left if o.startswith('.')]

def test_a_folder_that_can_only_be_read(tmp_path, monkeypatch):
    "Where nothing can be removed either, the error still says what could not be written"
    def refuse(self, *args, **kwargs): raise OSError(errno.EROFS, 'Read-only file system', str(self))
    for o in ('write_text','unlink'): monkeypatch.setattr(Path, o, refuse)
    with pytest.raises(WriteError, match=r'config.json: cannot be written \(Read-only file system; \d+ MB are free'):
        write_text(tmp_path/'config.json', '{}')

def test_what_is_wrong_with_a_scan_is_said_with_options(run, monkeypatch, capsys):
    problem = 's: holds 2 volumes; choose one with phase=0 to phase=1'
    said = pd.DataFrame(dict(out=[None], problem=[problem]), dtype=object)
    said.attrs.update(trained_on=[], kept=0)
    monkeypatch.setattr(run_model, 'predict_scans', lambda *args, **kwargs: said)
    with pytest.raises(SystemExit, match='1'): cli.predict(str(run), 's', 'out')
    assert 's: holds 2 volumes; choose one with --phase 0 to --phase 1\n' in capsys.readouterr().err

def test_scores_of_a_run_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit, match='2'): cli.evaluate(str(tmp_path/'run'))
    assert 'run: does not exist; expected a run folder' in capsys.readouterr().err

def test_full_disk_for_a_checkpoint(prepared, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple
    def full(handle): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    kw = {**tiny, 'epochs':1, 'n_iters':2}
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        m.setattr(shutil, 'disk_usage', lambda o: namedtuple('usage', 'total used free')(9,9,0))
        with pytest.raises(OSError, match=r'checkpoints/\d+\.pt: cannot be written '
                                          r'\(No space left on device; 0 MB are free there\).*make room'):
            train_run(prepared, tmp_path/'run', workers=0, **kw)
    assert not list((tmp_path/'run'/'checkpoints').iterdir())
    resume_run(tmp_path/'run', 0)

def test_bad_scan_while_preparing(hearts, tmp_path):
    df = hearts.df[:6].drop(columns='split'); df.attrs.update(hearts.df.attrs)
    (tmp_path/'bad.nii.gz').write_bytes(b'x'); df.loc[0,'image'] = str(tmp_path/'bad.nii.gz')
    df['split'] = ['unlabeled','labeled','labeled','valid','valid','test']
    csv = save_cohort(df, tmp_path/'c.csv')
    kw = dict(recipe=hearts.recipe, workers=0)
    with pytest.raises(VolumeError, match='1 of 6 scans cannot be used'): prepare_run(csv, tmp_path/'a', **kw)
    assert list(prepare_run(csv, tmp_path/'b', skip_bad=True, **kw).scan)==['heart000']
    assert len(load_cohort(tmp_path/'b'/'split.csv', 'csv'))==5

def test_interrupted_while_preparing(hearts, tmp_path, monkeypatch):
    "A run that had not got to its training yet is resumable too"
    kw = dict(recipe=hearts.recipe, labeled=2, valid=2, test=2, workers=0, **{**tiny, 'epochs':1, 'n_iters':2})
    csv = save_cohort(hearts.df[:8].drop(columns='split'), tmp_path/'c.csv')
    def stop(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(C.SliceStore, 'prepare', stop)
        with pytest.raises(KeyboardInterrupt): train_run(csv, tmp_path/'run', **kw)
    assert len(resume_run(tmp_path/'run', 0))

def test_bad_scan_while_training(hearts, tmp_path):
    "It is named before the training, or left out and reported at its end"
    df = hearts.df[:6].drop(columns='split'); df.attrs.update(hearts.df.attrs)
    (tmp_path/'bad.nii.gz').write_bytes(b'x'); df.loc[5,'image'] = str(tmp_path/'bad.nii.gz')
    df['split'] = ['unlabeled','labeled','labeled','valid','test','test']
    csv = save_cohort(df, tmp_path/'c.csv')
    kw = dict(recipe=hearts.recipe, workers=0, **{**tiny, 'epochs':1, 'n_iters':2})
    with pytest.raises(VolumeError, match='1 of 6 scans cannot be used'): train_run(csv, tmp_path/'a', **kw)
    assert sorted(o.name for o in (tmp_path/'a').iterdir()) in ([], ['slices'])
    scores = train_run(csv, tmp_path/'a', skip_bad=True, global_mi=.001, consistency=[1.,.5], shift=.5, jitter=.5, **kw)
    assert set(scores.scan)=={'heart004'} and list(scores.attrs['problems'])==['heart005']
    about = load_segmenter(tmp_path/'a'/'model.safetensors', 'cpu').about['provenance']
    assert (about['weights']['MIRegCallback']==dict(global_mi=.001, local_mi=.1, consistency='sigmoid_rampup(1.0, 0.5)')
            and {k:about['training'][k] for k in ('flips','shift','jitter','consistency')}
                ==dict(flips=None, shift=.5, jitter=.5, consistency=[1.,.5]))

# -- real scans --------------------------------------------------------------------------------------------------------
def test_hippocampus(tmp_path):
    "prepare, train, evaluate and predict as processes, on a few real scans"
    data = os.environ.get('FASTMISEG_DATA')
    if not data:
        pytest.skip('FASTMISEG_DATA is not set: the folder of Task04_Hippocampus of the Medical Segmentation Decathlon')
    df = load_cohort(data, 'msd')
    df = df[df['mask'].notna()][:14]
    save_cohort(df, tmp_path/'cohort.csv')
    r = command('prepare', tmp_path/'cohort.csv', '--out', tmp_path/'prepared', '--recipe', 'hippocampus',
                '--labeled', 2, '--valid', 2, '--test', 2, '--workers', 0)
    assert r.returncode==0, r.stderr
    r = command('train', tmp_path/'prepared', '--out', tmp_path/'run', *_tiny, '--lr', .01)
    assert r.returncode==0 and 'Anterior' in r.stdout, r.stderr
    assert {o.name for o in (tmp_path/'run').iterdir()}>={
        'config.json','split.csv','log.csv','checkpoints','model.safetensors','metrics.csv','figures'}
    r = command('evaluate', tmp_path/'run', '--split', 'valid', '--out', tmp_path/'scores')
    assert r.returncode==0 and (tmp_path/'scores'/'figures'/'worst.png').exists(), r.stderr
    r = command('predict', tmp_path/'run'/'model.safetensors', df.image.iloc[0],
                '--out', tmp_path/'segs', '--probabilities')
    assert r.returncode==0, r.stderr
    name = f'{df.scan.iloc[0]}.nii.gz'
    a,b = nib.load(df.image.iloc[0]),nib.load(tmp_path/'segs'/name)
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-4); assert a.shape==b.shape and b.get_data_dtype()==np.uint8
    a,b = sitk.ReadImage(df.image.iloc[0]),sitk.ReadImage(str(tmp_path/'segs'/name))
    for k in ('GetSize','GetSpacing','GetOrigin','GetDirection'):
        np.testing.assert_allclose(getattr(a,k)(), getattr(b,k)(), atol=1e-5)

"Two commands at the same time in one folder, in real processes: one works, the other is told, and nothing is mixed"
import json, os, subprocess, sys
from contextlib import contextmanager

import pandas as pd, pytest

from fastmiseg.commands import prepare_run, resume_run, train_run
from fastmiseg.run_model import evaluate_run, predict_scans
from fastmiseg.lock import FolderInUse
from fastmiseg.scans.cohort import load_cohort, save_cohort
from fastmiseg.scans.recipe import Recipe
from fastmiseg.segmenter import load_segmenter

tiny = dict(epochs=1, n_iters=2, width=2, bs=2, unlabeled_bs=2, method='consistency', workers=0)

# It does one thing after the other, and waits in the middle of each for a line from here
OTHER = """
import sys
from pathlib import Path
from fastai.basics import Callback
import fastmiseg.scan_by_scan as scan_by_scan, fastmiseg.scans.store as store
from fastmiseg.commands import prepare_run, train_run
from fastmiseg.run_model import evaluate_run, predict_scans
from fastmiseg.scans.recipe import Recipe
def pause(what): print(f'\\nin {what}', flush=True); sys.stdin.readline()
def pausing(f, what):
    waited = []
    def g(*args, **kwargs):
        if not waited: waited.append(pause(what))
        return f(*args, **kwargs)
    return g
class Pause(Callback):
    def after_batch(self):
        if self.training and self.train_iter==1: pause('train')
def main(root, tiny, recipe):
    root,ask,jobs = Path(root),scan_by_scan.ask_network,store.run_jobs
    store.run_jobs = pausing(jobs, 'prepare')
    prepare_run(root/'six.csv', root/'prepared', recipe=Recipe.from_dict(recipe), labeled=2, valid=1, test=1, workers=0)
    store.run_jobs = jobs
    train_run(root/'prepared', root/'run', cbs=[Pause()], **tiny)
    scan_by_scan.ask_network = pausing(ask, 'evaluate')
    evaluate_run(root/'run', progress=False)
    scan_by_scan.ask_network = pausing(ask, 'predict')
    predict_scans(root/'run', root/'six.csv', root/'segs', progress=False)
    print('done', flush=True)
"""

def python(script, code, *args, **kw):
    "A process that runs this code, from a file"
    script.write_text(f'import sys\n{code}\n')
    return subprocess.Popen([sys.executable, '-W', 'ignore', str(script), *map(str, args)], text=True,
                            env={**os.environ, 'OMP_NUM_THREADS':'1'},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)

@pytest.fixture(scope='module')
def root(hearts, tmp_path_factory):
    root = tmp_path_factory.mktemp('two')
    df = hearts.df[:6].drop(columns='split')
    df.attrs.update(hearts.df.attrs)
    save_cohort(df, root/'six.csv')
    return root

def test_a_second_command_is_told(root):
    "Whatever the first one does, and whatever the second one wants"
    recipe = Recipe(spacing=4., size=32, classes=load_cohort(root/'six.csv', 'csv').attrs['classes'])
    code = f'{OTHER}\nmain(sys.argv[1], {tiny!r}, {json.loads(json.dumps(recipe.to_dict()))!r})'
    other = python(root/'other.py', code, root, stdin=subprocess.PIPE)
    @contextmanager
    def during(what):
        for line in other.stdout:
            if line.strip()==f'in {what}': break
        else: raise AssertionError(other.stderr.read())
        yield
        other.stdin.write('\n')
        other.stdin.flush()
    def told(folder, f, *args, **kwargs):
        before = {o:o.stat().st_mtime_ns for o in root.rglob('*')}
        with pytest.raises(FolderInUse, match=f'{folder}: is in use by process {other.pid} on .*; '
                                              'wait for it, stop it, or choose another folder'):
            f(*args, **kwargs)
        assert {o:o.stat().st_mtime_ns for o in root.rglob('*')}==before
    try:
        run,prepared = root/'run',root/'prepared'
        with during('prepare'):
            told(prepared, train_run, prepared, root/'r2', **tiny)
            told(prepared, prepare_run, root/'six.csv', prepared, recipe=recipe, overwrite=True, workers=0)
        with during('train'):
            for overwrite in (False, True): told(run, train_run, prepared, run, overwrite=overwrite, **tiny)
            told(run, prepare_run, root/'six.csv', run, recipe=recipe, overwrite=True, workers=0)
            told(run, resume_run, run, 0)
            told(run, evaluate_run, run)
            told(run, predict_scans, run, root/'six.csv', root/'segs') # it has no model yet
        with during('evaluate'):
            told(run, evaluate_run, run)
            told(run, resume_run, run, 0, epochs=2)
            told(run, train_run, prepared, run, overwrite=True, **tiny)
        with during('predict'):
            for overwrite in (False, True):
                told(root/'segs', predict_scans, run, root/'six.csv', root/'segs', overwrite=overwrite, progress=False)
        said,err = other.communicate(timeout=300)
        assert 'done' in said, err
    finally: other.kill()
    assert len(pd.read_csv(run/'log.csv'))==1 and not list(root.rglob('*in-use'))
    notes = '.segmented.jsonl' # of the finished prediction
    assert [o.name for o in root.rglob('*.jsonl')]==[notes]
    assert (sorted(o.name for o in (root/'segs').iterdir())
            ==[notes, *sorted(f'{s}.nii.gz' for s in load_cohort(root/'six.csv', 'csv').scan)])
    load_segmenter(run/'model.safetensors', 'cpu')

def test_two_trainings_started_at_once(root):
    "One trains; the other leaves with an exit code and a sentence, and the run is that of the first"
    code = 'from fastmiseg.cli import train\nif __name__=="__main__": sys.exit(train())'
    options = ['--epochs=1', '--n-iters=3', '--width=2', '--bs=2', '--unlabeled-bs=2', '--workers=0', '--size=32',
               '--labeled=2', '--valid=1', '--test=1']
    both = [python(root/'fastmiseg-train', code, root/'six.csv', '--out', root/'same', '--method', o, *options)
            for o in ('consistency','entropy')]
    ends = [o.communicate(timeout=300) for o in both]
    codes = [o.returncode for o in both]
    assert sorted(codes)==[0,2], ends
    lost = codes.index(2)
    assert 'is in use by process' in ends[lost][1] or 'there is a run already' in ends[lost][1]
    config = json.loads((root/'same'/'config.json').read_text())
    assert config['train']['method']==('consistency','entropy')[1-lost]
    about = load_segmenter(root/'same'/'model.safetensors', 'cpu').about
    assert about['provenance']['training']['method']==config['train']['method'] and (root/'same'/'metrics.csv').exists()

"The command for a CUDA device in its dry form: tiny sizes on the CPU, every part, results found again"
import importlib, json, os, re, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT/'benchmarks'/'gpu.sh').exists(),
                                reason='benchmarks are not part of an installed package')

def run(out, *parts, status=0, **env):
    env = {**os.environ, 'DRY':'1', 'PYTHON':sys.executable, 'OMP_NUM_THREADS':'1', 'BUDGET':'1500', **env}
    res = subprocess.run(['bash', str(ROOT/'benchmarks'/'gpu.sh'), str(out), *parts],
                         env=env, capture_output=True, text=True, timeout=1600)
    assert res.returncode==status, res.stdout[-2000:]+res.stderr[-2000:]
    return res.stdout

PARTS = 'about','right','step','train','turns','mutual_info','waiting','loading','compile','network'

def test_dry(tmp_path):
    run(tmp_path/'out')
    work = tmp_path/'out.work'
    rows = [json.loads(o) for o in (work/'results.jsonl').read_text().splitlines()]
    notes = {o['of']:o['status'] for o in rows if o['part']=='note'}
    log = '\n'.join(o.read_text()[-2000:] for o in work.glob('log-*.txt'))
    assert tuple(notes)==PARTS and not any(notes.values()), (notes, log[-3000:])
    assert not [o for o in rows if 'error' in o], log[-3000:]
    page = (tmp_path/'out'/'gpu.md').read_text()
    for head in ('passed','## Without waiting','## Milliseconds to a step','## Before and after','Reading a batch:',
                 'Tables of joints, forward and backward:',"## At the paper's size"):
        assert head in page
    few_files(tmp_path/'out')
    # a second call, on another machine
    again = run(tmp_path/'there', FROM=str(tmp_path/'out'))
    assert all(f'== {part}: done before' in again for part in PARTS[1:])
    assert (tmp_path/'there'/'gpu.md').read_text().split('## Tests')[1]==page.split('## Tests')[1]

def few_files(out):
    "What can be sent home"
    files = [o for o in out.rglob('*') if o.is_file()]
    assert 2<=len(files)<=8 and all(o.stat().st_size<=16<<20 for o in files)
    assert all(re.fullmatch(r'[\w.-]+(/[\w.-]+){0,2}', str(o.relative_to(out)), re.A) for o in files)

def test_limits():
    "The parts fit in a call of ten minutes, and the most valuable come first"
    text = (ROOT/'benchmarks'/'gpu.sh').read_text()
    limits = {name:int(n) for name,n in re.findall(r'(?:part|tests) (\w+) (\d+) ', text)}
    assert tuple(limits)==(*PARTS,'main') and sum(limits.values())<600
    assert int(re.search(r'BUDGET:-(\d+)', text)[1])<=570

def test_budget(tmp_path):
    "Nothing begins for which there is no time, and what there is is brought all the same"
    said = run(tmp_path/'out', BUDGET='9')
    assert all(f'== {part}: no time left' in said for part in PARTS)
    assert [o.name for o in sorted((tmp_path/'out').iterdir())]==['gpu.md','results.tar.gz']

def test_every_test_for_a_device_is_run():
    text = (ROOT/'benchmarks'/'gpu.sh').read_text()
    marked = [o.stem[5:] for o in (ROOT/'tests').glob('test_*.py')
              if re.search(r'^(pytestmark.*|@)pytest\.mark\.cuda', o.read_text(), re.M)]
    assert len(marked)>=4
    run_there = text[text.index('tests right'):text.index('part step')]
    assert [o for o in marked if o not in run_there]==[]

@pytest.fixture
def bench(monkeypatch, tmp_path):
    "Modules of benchmarks/, which write to tmp_path"
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    for k,v in dict(OUT=str(tmp_path), DRY='1', FASTMISEG_DEVICE='cpu', STEPS='8').items(): monkeypatch.setenv(k, v)
    before = set(sys.modules)
    yield importlib.import_module
    for k in set(sys.modules)-before:
        if k.startswith('gpu'): del sys.modules[k]

def test_where_nothing_reads_scans(bench, tmp_path, monkeypatch):
    "What the device's machine may lack is stood in for, whatever the package imports of it"
    gpu = bench('gpu')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    gpu.stand_ins(tmp_path, ['SimpleITK','pydicom','nibabel'])
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (tmp_path, ROOT)))}
    code = 'import nibabel, fastmiseg.all, fastmiseg.study.run; assert nibabel.Absent'
    res = subprocess.run([sys.executable, '-c', code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode==0, res.stderr[-2000:]

TESTS = '''
import sys
sys.path.insert(0, {stand_ins!r})
def test_fine(): pass
def test_wrong(): assert 0
def test_scan():
    import nibabelle
    nibabelle.load('heart.nii')
'''

def test_tests_again(bench, tmp_path, monkeypatch):
    "What has passed is left out, what failed is run again, what would read scans is skipped"
    gpu = bench('gpu')
    gpu.stand_ins(tmp_path/'stand_ins', ['nibabelle'])
    (tmp_path/'test_some.py').write_text(TESTS.format(stand_ins=str(tmp_path/'stand_ins')))
    env = {**os.environ, 'PYTHONPATH':str(ROOT/'benchmarks')}
    def go(run):
        subprocess.run([sys.executable, '-m', 'pytest', '-p', 'gpu_tests', '-p', 'no:cacheprovider', 'test_some.py'],
                       cwd=tmp_path, env={**env, 'RUN':str(run)}, capture_output=True)
        return {o['test'].split('::')[1]:o['outcome'] for o in gpu.rows(tmp_path, 'test') if o['run']==run}
    assert go(1)==dict(test_fine='passed', test_wrong='failed', test_scan='skipped')
    assert go(2)==dict(test_wrong='failed', test_scan='skipped')
    assert '1 failed, 1 passed, 1 skipped.' in gpu.report(tmp_path) and 'test_wrong failed' in gpu.report(tmp_path)
    assert (tmp_path/'failures.txt').read_text().count('test_wrong (call)')==2

def test_rows_of_several_calls(bench, tmp_path, monkeypatch):
    "Only the last of what was measured twice; a failure is forgotten when it went well"
    gpu = bench('gpu')
    def call(run, device, **rows):
        monkeypatch.setattr(gpu, 'RUN', run)
        gpu.add('about', device=device, cores=1, python='3', versions={})
        for k,ms in rows.items():
            gpu.add('step', **dict(table='Steps', precision='bf16', method=k, ms=ms) if ms else
                    dict(table='Failures', precision='bf16', method=k, error='out of memory'))
    call(1, 'A', fast=1111, slow=2222, broken=None)
    assert 'out of memory' in gpu.report(tmp_path)
    assert not gpu.missing('step', method='fast') and gpu.missing('step', method='broken')
    call(2, 'A', slow=3333, broken=4444)
    page = gpu.report(tmp_path)
    assert 'out of memory' not in page and '2222' not in page and '| device' not in page
    assert all(o in page for o in ('| bf16 | fast | 1111 |','| bf16 | slow | 3333 |','| bf16 | broken | 4444 |'))
    call(3, 'B', slow=5555)
    assert all(o in gpu.report(tmp_path) for o in ('| A | bf16 | fast | 1111 |','| B | bf16 | slow | 5555 |'))
    monkeypatch.setenv('AGAIN', 'step')
    assert gpu.missing('step', method='fast')

def test_checkpoints_travel(bench, tmp_path, monkeypatch, capsys):
    "In pieces, the furthest first, as many as fit; they lie where they lay"
    gpu = bench('gpu')
    monkeypatch.setattr(gpu, 'PIECE', 30000)
    work,out,there = (tmp_path/k for k in ('work','out','there'))
    made = {}
    for name,n in (('labels_only-0-6000',3), ('pseudo-labels_+_teacher-0-6000',12), ('Mean_Teacher-0-6000',7)):
        folder = work/'trainings'/name/'run'
        folder.mkdir(parents=True)
        for i in (n-1,n): (folder/f'{i:06d}.pt').write_bytes(os.urandom(40000))
        made[name,n] = (folder/f'{n:06d}.pt').read_bytes()
    for o in (out,there): o.mkdir()
    (work/'log-train.txt').write_text('so far')
    gpu.bring(work, out, 'checkpoints')
    few_files(out)
    assert 'labels_only-0-6000/run/000003.pt: no room left' in capsys.readouterr().out
    gpu.begin(out, there)
    found = {(o.parts[-3],int(o.stem)):o.read_bytes() for o in there.glob('trainings/*/run/*.pt')}
    assert found=={k:v for k,v in made.items() if k[1]>3} and (there/'log-train.txt').read_text()=='so far'
    with pytest.raises(SystemExit, match='expected results.tar.gz'): gpu.begin(work, tmp_path/'nowhere')

def test_wheels(bench, tmp_path, capsys):
    "Only what is missing is installed; what is to be brought is what we require, and what that requires"
    import zipfile
    gpu = bench('gpu')
    for name in ('missing_here','torch'):
        with zipfile.ZipFile(tmp_path/f'{name}-1-py3-none-any.whl', 'w') as z:
            info = f'{name}-1.dist-info'
            z.writestr(f'{name}/__init__.py', 'x = 1')
            z.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1\n')
            z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
            z.writestr(f'{info}/RECORD', '')
    gpu.install(tmp_path, tmp_path/'site')
    assert {o.name for o in (tmp_path/'site').iterdir() if o.is_dir()}=={'missing_here','missing_here-1.dist-info'}
    wanted = bench('gpu_carry').wanted()
    assert {'fastai','fastcore','fastprogress','fasttransform','plum-dispatch','beartype','pytest'}<=wanted.keys()
    assert not [o for o in wanted if o in ('torch','triton','numpy','simpleitk') or o.startswith('nvidia')]

def test_too_much_to_carry(bench, tmp_path, monkeypatch):
    carry = bench('gpu_carry')
    (tmp_path/'large.whl').write_bytes(bytes(3<<20))
    carry.check(tmp_path)
    monkeypatch.setattr(carry, 'MOST', 2<<20)
    with pytest.raises(SystemExit, match='more than the 2 that can be carried; the largest: large.whl 3.0 MiB'):
        carry.check(tmp_path)

def test_slices_that_are_carried(bench, tmp_path, monkeypatch, capsys):
    "On the recipe's grid, nearly as they were, and without the masks of unlabelled scans"
    import numpy as np
    from fastmiseg.scans.phantom import make_phantom
    from fastmiseg.scans.recipe import Recipe
    from fastmiseg.scans.store import SliceStore
    carry = bench('gpu_carry')
    carry.slices(tmp_path/'slices', None)
    assert 'refuses' in capsys.readouterr().out
    df = make_phantom(tmp_path/'scans', n_subjects=6, seed=0, size=(32,40))
    bench('gpu_slices').pack(tmp_path/'scans', tmp_path/'slices', tmp_path/'store', labeled=2, valid=1, test=1)
    carry.slices(tmp_path/'slices', None)
    assert 'is there' in capsys.readouterr().out
    monkeypatch.setenv('FASTMISEG_SLICES', str(tmp_path/'slices'))
    store,what = bench('gpu_train').open_store()
    assert what=='on the recipe’s grid' and sorted(store.scans.split)==['labeled']*2+['test']+['unlabeled']*2+['valid']
    assert {o.scan for o in store.scans.itertuples() if o.split!='unlabeled'}==set(store.masks)
    whole = SliceStore(tmp_path/'store', Recipe.acdc()).prepare(df.assign(split='valid'), progress=False)
    for scan in df.scan:
        want = whole.image(scan, 0)[...,48:-48,48:-48]
        assert np.abs(store.image(scan, 0)-want).mean()<.01
        if scan in store.masks: assert (store.mask(scan, 0)==whole.mask(scan, 0)[48:-48,48:-48]).all()

@pytest.mark.filterwarnings('ignore')
def test_trainings_that_are_cut_off(bench, tmp_path, monkeypatch):
    "Stopped by its limit, it is scored; killed while scored, it is scored by the next call, with all its steps"
    train = bench('gpu_train')
    def go():
        train.train('labels only')
        rows = [o for o in train.rows(tmp_path, 'train') if o['table'].startswith('dice')]
        return [(o['steps'],o['steps_a_second']>0) for o in rows]
    train.METHODS['labels only'] = lambda: []
    monkeypatch.setattr(train, 'UNTIL', 0)
    assert go()==[(1,True)] and not train.done('labels only', 8)
    monkeypatch.undo()
    with monkeypatch.context() as m:
        def killed(*args): raise KeyboardInterrupt
        m.setattr(train, 'score', killed)
        with pytest.raises(KeyboardInterrupt): train.train('labels only')
    assert list(tmp_path.glob('trainings/*/run/*.pt'))
    assert go()==[(1,True),(8,False)] and train.done('labels only', 8)
    assert not list(tmp_path.glob('trainings/*/run/*.pt'))

def test_steps_that_there_is_time_for(bench, tmp_path, monkeypatch):
    train = bench('gpu_train')
    for k,v in dict(STEPS=0, DRY=False, EPOCH=300).items(): monkeypatch.setattr(train, k, v)
    names = 'labels only','the paper'
    assert train.steps_for(100, names)==2100 # nobody knows
    for k,busy,ms in (('labels only',4,10), ('all terms of the paper',16,40)):
        train.add('step', table='Steps', method=k, precision='bf16', busy_ms=busy, ms=ms)
    assert train.steps_for(100, names)==1500 and train.steps_for(10**4, names)==6000 and train.steps_for(-5, names)==300
    monkeypatch.setattr(train, 'UNTIL', time.time()+140)
    assert train.planned(names)==2100
    monkeypatch.setattr(train, 'UNTIL', time.time()+60)
    assert train.planned(names)==2100 # as in the first call, so that it goes on
    monkeypatch.setenv('FASTMISEG_SLICES', 'somewhere')
    monkeypatch.setattr(train, 'UNTIL', time.time()+5)
    with pytest.raises(SystemExit, match=str(train.UNFINISHED)): train.main()
    monkeypatch.delenv('FASTMISEG_SLICES', raising=False)
    with pytest.raises(SystemExit, match='there are no slices to train on'): train.main()

# -- studies, without the scans ----------------------------------------------------------------------------------------
@pytest.fixture
def gpu_studies(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    import gpu_studies
    return gpu_studies

def test_studies_elsewhere(gpu_studies, tmp_path, capsys):
    "Packed, run at another place without the scans, gone on with, merged, and shown by the usual command"
    import shutil
    from fastmiseg.scans.phantom import make_phantom
    from fastmiseg.study.evidence import Evidence
    from fastmiseg.study.run import compare_study
    make_phantom(tmp_path/'scans', n_subjects=26, seed=0, size=(32,40))
    gpu_studies.pack(tmp_path/'carried', [f"phantom={tmp_path/'scans'}"])
    shutil.rmtree(tmp_path/'scans')
    plan = dict(title='Tiny', score='valid', ours='b', rows=dict(
        a=dict(method='partial', width=4),
        b=dict(method='teacher', width=4, recipe=dict(jitter=.5))))
    (tmp_path/'tiny.json').write_text(json.dumps(plan))
    def go(out, seeds):
        args = SimpleNamespace(epochs=1, n_iters=3, seeds=seeds, score='valid-slices', processes=0, limit=100)
        gpu_studies.run(tmp_path/'carried', tmp_path/out, [f"{tmp_path/'tiny.json'}@phantom:1,2"], args)
        return [o['id'] for o in Evidence(tmp_path/out).runs()]
    first = go('out', 1)
    assert len(first)==4 and sorted(o.name for o in (tmp_path/'out').iterdir())==sorted(gpu_studies.FILES)
    for o in gpu_studies.FILES: shutil.copy(tmp_path/'out'/o, tmp_path/'carried'/o) # a second call
    assert go('more', 2)[:4]==first and 'phantom 2 b, seed 1' in capsys.readouterr().out
    there = Evidence(tmp_path/'studies')
    gpu_studies.merge(there.path, [tmp_path/'out', tmp_path/'more'])
    assert len(there.runs())==8 and len({o['split'] for o in there.runs()})==2
    assert {o['recipe']['jitter'] for o in there.runs() if o['settings']['method']=='teacher'}=={.5}
    kw = dict(preset='phantom', labeled=1, score='valid-slices', seeds=2, epochs=1, n_iters=3)
    page = compare_study(str(tmp_path/'tiny.json'), None, there.path, **kw)
    assert ('Scored: the valid scans on the grid of their slices' in page
            and '- Otherwise in "b": width 4; recipe with jitter 0.5.' in page)
    assert (there.path/'tiny_phantom-1-labelled_valid-slices.csv').exists()

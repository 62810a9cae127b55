"The command for a CUDA device in its dry form: tiny sizes on the CPU, every part, results found again"
import json, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT/'benchmarks'/'gpu.sh').exists(),
                                reason='benchmarks are not part of an installed package')

def run(out, *parts):
    env = {**os.environ, 'DRY':'1', 'PYTHON':sys.executable, 'OMP_NUM_THREADS':'1'}
    res = subprocess.run(['bash', str(ROOT/'benchmarks'/'gpu.sh'), str(out), *parts],
                         env=env, capture_output=True, text=True, timeout=300)
    assert res.returncode==0, res.stderr[-2000:]
    return res.stdout

def test_dry(tmp_path):
    run(tmp_path)
    rows = [json.loads(o) for o in (tmp_path/'results.jsonl').read_text().splitlines()]
    notes = {o['of']:o['status'] for o in rows if o['part']=='note'}
    log = '\n'.join(o.read_text()[-2000:] for o in tmp_path.glob('log-*.txt'))
    assert {'about','right','train','step','waiting','loading','compile'}<=set(notes)
    assert not any(notes.values()), (notes, log[-3000:])
    assert not [o for o in rows if 'error' in o], log[-3000:]
    page = (tmp_path/'gpu.md').read_text()
    for head in ('## Without waiting','## Milliseconds to a step','Reading a batch:',"## At the paper's size"):
        assert head in page
    again = run(tmp_path)
    assert all(f'== {part}: done before' in again for part in notes)

def test_where_nothing_reads_scans(tmp_path, monkeypatch):
    "What the device's machine may lack is stood in for, whatever the package imports of it"
    import importlib.util
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    import gpu
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    gpu.stand_ins(tmp_path, ['SimpleITK','pydicom','nibabel'])
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (tmp_path, ROOT)))}
    code = 'import nibabel, fastmiseg.all, fastmiseg.study.run; assert nibabel.Absent'
    res = subprocess.run([sys.executable, '-c', code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode==0, res.stderr[-2000:]

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

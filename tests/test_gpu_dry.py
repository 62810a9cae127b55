"The command for a CUDA device in its dry form: tiny sizes on the CPU, every part, results found again"
import json, os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT/'benchmarks'/'gpu.sh').exists(), reason='benchmarks are not part of an installed package')

def run(out, *parts):
    env = {**os.environ, 'DRY':'1', 'PYTHON':sys.executable, 'OMP_NUM_THREADS':'1'}
    res = subprocess.run(['bash', str(ROOT/'benchmarks'/'gpu.sh'), str(out), *parts], env=env, capture_output=True, text=True, timeout=300)
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
    for head in ('## Without waiting','## Milliseconds to a step','Reading a batch:',"## At the paper's size"): assert head in page
    again = run(tmp_path)
    assert all(f'== {part}: done before' in again for part in notes)

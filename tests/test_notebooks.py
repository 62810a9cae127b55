"What readers of the notebooks and of the README see"
import json, re
from pathlib import Path
import pytest

root = Path(__file__).parent.parent

@pytest.mark.parametrize('nb', sorted((root/'nbs').glob('*.ipynb')), ids=lambda o: o.stem)
def test_outputs_tell_nothing_of_the_machine_that_made_them(nb):
    for c in json.loads(nb.read_text(encoding='utf-8'))['cells']:
        text = json.dumps([{k:v for k,v in o.items() if k!='data'} | {'text/plain':o.get('data', {}).get('text/plain')}
                           for o in c.get('outputs', [])]).replace('\\n', '\n')
        # an absolute path, or a traceback in colours
        found = re.findall(r'site-packages|(?<![\w./<>:-])(?:/[\w.-]+)+/|\\u001b\[31m', text)
        assert not found, f'{nb.name}: {found[:3]}'

@pytest.mark.parametrize('nb', sorted((root/'nbs').glob('*.ipynb')), ids=lambda o: o.stem)
def test_outputs_are_what_a_reader_wants(nb):
    for i,c in enumerate(json.loads(nb.read_text(encoding='utf-8'))['cells']):
        for o in c.get('outputs', []):
            assert o.get('name')!='stderr', (
                f"{nb.name}, cell {i}: a warning is stored ({''.join(o['text'])[:80]!r}); "
                "silence it in a hidden cell, as the notebook of `training` does, and run the notebook again")
            assert '█' not in json.dumps(o, ensure_ascii=False), (
                f'{nb.name}, cell {i}: a progress bar is stored; '
                'switch it off in a hidden cell, as the notebook of `training` does, and run the notebook again')

"""The house: who may import whom, what is public, how notebooks are numbered. `python tests/test_rooms.py` draws the
picture in CONTRIBUTING.md again"""
import ast, json, re, subprocess, sys
from collections import Counter
from pathlib import Path

import pytest

root = Path(__file__).parents[1]

def room_of(path): return '.'.join(path.relative_to(root/'fastmiseg').with_suffix('').parts)
files = {room_of(o): o for o in sorted((root/'fastmiseg').rglob('*.py')) if o.stem not in ('__init__','_modidx')}
notebooks = sorted((root/'nbs').glob('[0-9]*.ipynb')) # the guides have no number
# a room imports only from rooms above it
order = [o for o in (nb.stem.split('_', 1)[1] for nb in notebooks) if o in files]
trees = {room: ast.parse(o.read_text(encoding='utf-8')) for room,o in files.items()}

def imports(room):
    "(room, name) of each import from another room, those inside functions too"
    package = room.split('.')[:-1]
    for node in ast.walk(trees[room]):
        if isinstance(node, ast.Import):
            for o in node.names:
                if o.name.startswith('fastmiseg.'): yield o.name.split('.', 1)[1], ''
        if not isinstance(node, ast.ImportFrom): continue
        if node.level: where = [*package[:len(package)+1-node.level], *(node.module or '').split('.')]
        elif (node.module or '').split('.')[0]=='fastmiseg': where = node.module.split('.')[1:]
        else: continue
        where = '.'.join(o for o in where if o)
        for o in node.names:
            inner = f'{where}.{o.name}'.strip('.')
            yield (inner, '') if inner in files else (where, o.name)

def imported(room):
    "The rooms that a room imports from, in their order"
    return sorted({o for o,_ in imports(room) if o in files}, key=order.index)

def picture():
    "A line for each room, in the order of imports: what it is, and from where it imports"
    rows = ['| room | what lives there | imports |', '|---|---|---|']
    for room in order:
        what = ast.get_docstring(trees[room]).rstrip('.')
        from_where = 'all that users type' if room=='all' else ', '.join(f'`{o}`' for o in imported(room))
        rows.append(f'| `{room}` | {what} | {from_where} |')
    return '\n'.join(rows)

begin,end = '<!-- rooms: made by python tests/test_rooms.py -->\n','\n<!-- end of rooms -->'

def homeless():
    "A sentence for each module that no notebook is named after"
    return [f'{files[o].relative_to(root)}: has no notebook nbs/NN_{o}.ipynb; its number is the place among the rooms'
            for o in files if o not in order]

def test_every_room_has_its_notebook(): assert not homeless()

@pytest.mark.parametrize('room', files)
def test_imports_come_from_above(room):
    below = [o for o in imported(room) if order.index(o)>=order.index(room)]
    assert not below, f'{room} imports {below}, which are not above it'

def test_the_picture_is_true():
    text = (root/'CONTRIBUTING.md').read_text(encoding='utf-8')
    assert text.split(begin)[1].split(end)[0]==picture(), 'draw it again: python tests/test_rooms.py'

def test_study_is_a_wing_of_its_own():
    "Only the command compare, inside its function, needs the studies"
    assert {o for o in files if not o.startswith('study.')
            and any(p.startswith('study.') for p in imported(o))}=={'cli'}
    at_the_top = {o.module for o in trees['cli'].body if isinstance(o, ast.ImportFrom)}
    assert not any((o or '').startswith('study') for o in at_the_top)

def test_scans_need_neither_torch_nor_fastai():
    rooms = [f'fastmiseg.{o}' for o in files if o.startswith('scans.')]
    code = (f'import importlib, sys\nfor o in {rooms}: importlib.import_module(o)\n'
            "print([o for o in sys.modules if o.split('.')[0] in ('torch','fastai')])")
    said = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, timeout=300)
    assert said.stdout.strip()=='[]', said.stdout[-500:] + said.stderr[-2000:]

def test_private_names_stay_at_home():
    assert not [f'{room}: {where}.{name}' for room in files for where,name in imports(room) if name.startswith('_')]

@pytest.mark.parametrize('room', files)
def test_one_list_of_public_names(room):
    "Made by nbdev; `all` passes on what it imports, so its list is computed beside nbdev's empty one"
    lists = [o for o in trees[room].body if isinstance(o, ast.Assign) and getattr(o.targets[0], 'id', '')=='__all__']
    assert len(lists)==(2 if room=='all' else 1)

def test_each_number_once():
    n = Counter(o.stem.split('_')[0] for o in notebooks)
    assert not [o for o,k in n.items() if k>1]
    assert all(o.isdigit() for o in n)

def test_titles_follow_modules():
    "The file and its first heading have the name of the module"
    odd = []
    for nb in notebooks:
        cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
        sources = [''.join(c['source']) for c in cells]
        room = next((m[1] for o in sources if (m := re.search(r'^#\|\s*default_exp (\S+)', o, re.M))), None)
        if room is None: continue
        title = next(o for o in sources if o.startswith('# ')).splitlines()[0][2:].strip()
        if nb.stem.split('_', 1)[1]!=room or title!=room.split('.')[-1]: odd.append(nb.stem)
    assert not odd

if __name__=='__main__':
    if homeless(): sys.exit('\n'.join(homeless()))
    page = root/'CONTRIBUTING.md'
    before,rest = page.read_text(encoding='utf-8').split(begin)
    page.write_text(before + begin + picture() + end + rest.split(end)[1], encoding='utf-8')

"The site is whole and needs no network, and every public name is documented"
import importlib, inspect, os, re, sys
from pathlib import Path

import plum, pytest

root = Path(__file__).parents[1]
sys.path.insert(0, str(root/'docs'))
reference = pytest.importorskip('reference')

names = [n for module,file in reference.module_files().items() for n in reference.public_names(module, file)]

@pytest.fixture(scope='module')
def undocumented():
    found = {f'{n.module}.{n.name}': reference.undocumented(n) for n in names}
    return {k: o for k,o in found.items() if o}

def test_every_public_name_is_documented(undocumented):
    "A docstring, and a comment beside each parameter"
    assert not undocumented, f'public, but not documented: {undocumented}'

def functions(n):
    "(name, function) of a public function that does not dispatch, or of the constructor and public methods of a class"
    o = n.value()
    if isinstance(o, plum.Function): return
    if inspect.isfunction(inspect.unwrap(o)): yield n.name,inspect.unwrap(o)
    for k in vars(o) if inspect.isclass(o) else ():
        m = getattr(o, k, None)
        m = inspect.unwrap(getattr(m, '__func__', m))
        inherits = any(k in vars(base) for base in o.__mro__[1:])
        if inspect.isfunction(m) and (k=='__init__' or k[0]!='_' and not inherits): yield f'{n.name}.{k}',m

def takes_anything(comment, module):
    "Does it say so? Or is it of a class that its room does not know? Nothing is imported for an annotation alone"
    unknown = [o for o in re.findall(r'`([A-Z]\w+)`', comment) if not hasattr(module, o)]
    return bool(unknown or re.search(r'\b(anything|object|items)\b', comment, re.I))

def untyped(n):
    """Parameters without a type, of one public name. Left out are methods that a base class has too, which says the
    types, and annotations that do something: those of commands convert options, those of transforms dispatch"""
    module = importlib.import_module(f'fastmiseg.{n.module}')
    for name,f in functions(n):
        if n.module=='cli' or f.__name__ in ('encodes','decodes'): continue
        said = reference.documented(f)
        for k,p in inspect.signature(f).parameters.items():
            bare = p.annotation is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            comment = said[k].docment or '' if k in said else ''
            if bare and k not in ('self','cls') and not takes_anything(comment, module): yield f'{n.module}.{name}: {k}'

def test_parameters_of_public_functions_have_types():
    found = [o for n in names for o in untyped(n)]
    assert not found, 'no type: '+'; '.join(found)

@pytest.mark.parametrize('comment,anything', [
    ('anything', True), ('an object', True), ('items or a `DataLoader`', True), ('a `Segmenter`', True),
    ('a `Tensor`', False), ('of anyone', False), ('', False)])
def test_what_takes_anything_says_so(comment, anything):
    from types import SimpleNamespace
    assert takes_anything(comment, SimpleNamespace(Tensor=1))==anything

def test_a_parameter_without_a_type_is_found(monkeypatch):
    from fastmiseg import files
    def read_json(path, depth:int=20): pass
    monkeypatch.setattr(files, 'read_json', read_json)
    assert list(untyped(next(n for n in names if n.module=='files' and n.name=='read_json')))==['files.read_json: path']

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    pytest.importorskip('smalldocs')
    pytest.importorskip('latex2mathml')
    import build
    out = tmp_path_factory.mktemp('docs')
    faults = build.build(out/'_proc', out/'_site')
    return out/'_site',faults

def test_the_site_is_whole(built):
    "Every link leads somewhere, every public name has its entry, every page is in the sidebar, nothing needs a network"
    assert not built[1], '\n'.join(built[1])

def test_readers_see_what_is_for_them(built):
    "Formulas are drawn, names lead to the reference; directives and hidden cells stay in the notebooks"
    lesson = next(built[0].glob('*_mutual_info.html')).read_text(encoding='utf-8')
    first = (built[0]/'first.html').read_text(encoding='utf-8')
    assert '<math' in lesson and '\\frac' not in re.sub(r'<pre.*?</pre>', '', lesson, flags=re.S)
    assert 'href="api/learner.html#miseg_learner"' in first
    for o in built[0].glob('*.html'):
        text = re.sub('<[^>]+>', '', o.read_text(encoding='utf-8'))
        assert not re.search(r'^#\s?\| ?(hide|export)', text, re.M), o.name

def test_search_works_from_a_disk(built):
    "Pages that were opened as files may not fetch; the index is a script too"
    assert (built[0]/'search.js').read_text(encoding='utf-8').startswith('window.searchIndex = [')
    assert 'MIRegCallback' in (built[0]/'search.js').read_text(encoding='utf-8')
    for o in built[0].rglob('*.html'):
        page = o.read_text(encoding='utf-8')
        assert page.index('search-from-disk.js')>page.index('smalldocs:offset') # it reads the offset

def test_entries_say_what_a_caller_needs(built):
    page = (built[0]/'api'/'inference.html').read_text(encoding='utf-8')
    entry = page.split('>predict_volume</h2>')[1].split('<h2')[0]
    assert '../source/inference.html#L-' in entry
    line = int(re.search(r'source/inference\.html#L-(\d+)', entry)[1])
    assert 'predict_volume' in (root/'fastmiseg'/'inference.py').read_text(encoding='utf-8').splitlines()[line-1]
    assert entry.count('<tr>')>3 and 'returns' in entry

@pytest.mark.parametrize('body,fault', [
    ('<a href="b.html">', 'links to b.html, which is not there'), ('<a href="#no">', 'has no such place'),
    ('<img src="no.png">', 'no.png, which is not there'), ('<a href="c.html#no">', 'has no such place'),
    ('<script src="https://x.y/z.js"></script>', 'from the network')])
def test_broken_links_are_found(tmp_path, body, fault):
    import finish
    (tmp_path/'a.html').write_text(f'<p id="yes"><a href="#yes"><a href="c.html#there"><a href="https://x.y">{body}')
    (tmp_path/'c.html').write_text('<p id="there">')
    said = finish.broken_links(tmp_path)
    assert len(said)==1 and fault in said[0]

def test_a_name_without_an_entry_is_found(tmp_path):
    import finish
    (tmp_path/'api').mkdir()
    (tmp_path/'api'/'files.html').write_text('<h2 id="read_json">')
    of_files = [n for n in names if n.module=='files' and n.name in ('read_json','digest')]
    assert finish.missing_names(tmp_path, of_files)==['files.digest']

def test_defaults_in_the_reference_are_readable():
    from fastmiseg.methods import Method
    assert 'usual=...)' in reference.signature(Method, 'Method')
    assert reference._row('a < b', '= `<x>`')=='| a &lt; b | = `<x>` |'

def test_what_is_returned_is_not_said_of_a_parameter_nor_the_other_way_round():
    from fastmiseg.callback.copypaste import CopyPasteCallback
    from fastmiseg.callback.mireg import MIRegCallback
    one_line = reference.documented(CopyPasteCallback.pseudo_label)
    assert one_line['step'].docment is None and one_line['return'].docment=='(N,H,W)'
    several = reference.documented(MIRegCallback.paper)
    assert several['kwargs'].docment=='other arguments' and several['return'].docment is None

def test_the_reference_shows_what_a_person_wrote(built):
    from fastmiseg.learner import LossOnDevice, paper_adam
    from fastmiseg.settings import Settings
    assert not [o.name for o in (built[0]/'api').glob('*.html') if ' at 0x' in o.read_text(encoding='utf-8')]
    assert reference._type(reference.documented(Settings)['global_mi'].anno)=='float | list'
    assert not reference.parameters(LossOnDevice) # its base has one for each event
    assert reference.doc_of(paper_adam)=='' and reference._default(paper_adam)=='partial(Adam, eps=1e-08)'

def test_methods_of_a_class_are_there_and_lead_there(built):
    "Class methods too, which fastcore patches in: the reference had no Recipe.auto"
    page = (built[0]/'api'/'scans.recipe.html').read_text(encoding='utf-8')
    assert all(f'id="Recipe.{o}"' in page for o in ('auto','acdc','named','slices')) and 'max_scans' in page
    assert 'href="api/scans.recipe.html#Recipe.auto"' in (built[0]/'your_scans.html').read_text(encoding='utf-8')

def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    "Every line of it, on a small cohort of which half is annotated, with a small network"
    import matplotlib, shutil
    from fastmiseg.all import make_phantom
    matplotlib.use('Agg')
    monkeypatch.chdir(tmp_path)
    df = make_phantom('scans', n_subjects=8, size=(40,48), seed=0)
    for o in df['mask'][4:]: Path(o).unlink()
    shutil.copy(df.image[0], 'newscan.nii.gz')
    text = (root/'README.md').read_text(encoding='utf-8')
    code = re.search(r'```python\n(.*?)```', text, re.S)[1]
    for usual,small in (('unlabeled_bs=4)', 'unlabeled_bs=4, n_iters=2)'), ('metrics=', 'width=2, metrics='),
                        ('lr_find()', 'lr_find(num_it=20, show_plot=False)'), ('(10, 1e-3', '(1, 1e-3')):
        assert code.count(usual)==1
        code = code.replace(usual, small)
    exec(code, {})
    assert (tmp_path/'newscan_mask.nii.gz').exists() and (tmp_path/'heart.safetensors').exists()
    assert len(text.splitlines())<=150

@pytest.mark.parametrize('page', ['CONTRIBUTING.md', 'README.md', 'CHANGELOG.md'])
def test_files_that_a_page_names_are_there(page):
    "Notebooks get other numbers"
    named = set(re.findall(r'\b(?:nbs|tests|docs|studies|benchmarks)/[\w./]*\w\.\w+',
                           (root/page).read_text(encoding='utf-8')))
    assert not [o for o in named if not (root/o).exists()]

def examples(file):
    "The Python examples of a page, by heading"
    text = (root/file).read_text(encoding='utf-8')
    parts = re.split(r'^## (.*)$', text, flags=re.M)
    return {h: m[1] for h,o in zip(parts[1::2], parts[2::2]) if (m := re.search(r'```python\n(.*?)```', o, re.S))}

@pytest.fixture
def contributing():
    names = {}
    exec('from fastmiseg.all import *', names)
    return lambda heading: (exec(examples('CONTRIBUTING.md')[heading], names), names)[1]

def test_names_live_where_the_page_says():
    found = re.findall(r'`(\w+)` \(in `([\w.]+)`\)', (root/'CONTRIBUTING.md').read_text(encoding='utf-8'))
    assert len(found)>2
    for name,room in found:
        assert getattr(importlib.import_module(f'fastmiseg.{room}'), name).__module__==f'fastmiseg.{room}'

def test_the_example_of_a_method_runs(contributing):
    import torch
    from types import SimpleNamespace
    cb = contributing('Adding a method')['SameSizeCallback']()
    from fastmiseg.warps import RandomWarps
    p,T = torch.rand(2,3,4,4).softmax(1),RandomWarps().draw(2)
    assert cb.penalty(SimpleNamespace(target=p, T=T, probs=lambda name: T(p).flip(-1)))<1e-8
    assert cb.penalty(SimpleNamespace(target=p, T=T, probs=lambda name: 1-T(p)))>.01

def test_a_package_of_ones_own_registers_a_method(tmp_path):
    "As the page says: found by its entry point, by commands and studies, with a term that nothing here knows"
    import subprocess
    code,info = examples('CONTRIBUTING.md'),tmp_path/'own-1.dist-info'
    info.mkdir()
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: own\nVersion: 1\n')
    (info/'entry_points.txt').write_text('[fastmiseg]\nown = own_methods\n')
    own = tmp_path/'own_methods.py'
    own.write_text(f"from fastmiseg.all import *\n{code['Adding a method']}{code['Without changing this package']}")
    script = tmp_path/'fastmiseg-train'
    script.write_text("from fastmiseg.study.preset import presets, settings_of\n"
                      "from fastmiseg.training import callbacks_of\n"
                      "from fastmiseg.cli import train\n"
                      "s = settings_of(presets['cpu'], dict(method='same-size'))\n"
                      "print(s.weights, [type(o).__name__ for o in callbacks_of(s)])\n"
                      "if __name__=='__main__': train()\n")
    def run(*args):
        env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (tmp_path, root)))}
        return subprocess.run([sys.executable, '-W', 'ignore', *args],
                              env=env, capture_output=True, text=True, timeout=300)
    done = run(script, '--help')
    said = ' '.join(done.stdout.split())
    assert said.startswith("{'same_size': 1.0} ['SameSizeCallback'] usage: fastmiseg-train"), done.stderr[-2000:]
    assert 'same-size: structures keep their size' in said
    own.write_text('import no_such_module')
    said = run('-c', 'import fastmiseg.methods').stderr
    assert 'own_methods: cannot be imported, and own names it in its entry points' in said

def test_the_example_of_a_transformation_changes_images(contributing):
    "On the images alone; maps stay where they are, and the pool can be added to others"
    import torch
    from fastmiseg.transforms import RandomFlips
    pool = contributing('Adding a transformation T')['RandomNegatives']
    x,T = torch.rand(8,1,4,4),pool(1.).draw(8)
    assert torch.equal(T.images(x), 1-x) and torch.equal(T(x), x)
    both = (RandomFlips()+pool(1.)).draw(8)
    assert torch.equal(both.images(x), 1-both(x)) and torch.equal(both.inverse(both(x)), x)
    assert torch.equal(both[2:5].images(x[2:5]), both.images(x)[2:5])

def test_the_example_of_a_reader_reads(contributing, tmp_path, monkeypatch):
    from fastmiseg.scans import layout
    from fastmiseg.scans.cohort import load_cohort
    monkeypatch.setattr(layout, 'layouts', layout.layouts.copy())
    monkeypatch.setattr('fastmiseg.scans.cohort.layouts', layout.layouts)
    (tmp_path/'scans').mkdir()
    for o in ('anna','anna_seg','bert'): (tmp_path/'scans'/f'{o}.nii.gz').touch()
    contributing('Adding a reader')
    df = load_cohort(tmp_path, layout='mydata')
    assert df.scan.tolist()==['anna','bert'] and df['mask'].notna().tolist()==[True,False]

def test_the_example_of_a_recipe_is_read_back(contributing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contributing('Adding a recipe')

def test_the_example_of_a_metric_counts(contributing):
    metric = contributing('Adding a metric')['VolumeJaccard']()
    assert metric.ratio(3, 4, 5)==(3, 6)

@pytest.mark.parametrize('css', [
    '@import url(https://x.y/css2?family=A:wght@300;400&display=swap);',
    "@import 'https://x.y/a.css';",
    '@import url("https://x.y/a;b.css") screen;'])
def test_fonts_from_elsewhere_go_and_the_theme_stays(css):
    "An address may hold semicolons; what follows it is the theme"
    import finish
    assert finish.fonts_elsewhere.sub('', f'@charset "UTF-8";{css}:root{{--a:1}}')=='@charset "UTF-8";:root{--a:1}'

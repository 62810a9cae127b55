"From notebooks, Markdown files and modules to a folder that Quarto and smalldocs render alike"
import ast, json, os, re, shutil
from fnmatch import fnmatch
from pathlib import PurePosixPath

import yaml

import reference

root = reference.root
markdown = ['CONTRIBUTING.md', 'CHANGELOG.md', *sorted(str(o.relative_to(root)) for d in ('studies', 'benchmarks')
                                                      for o in (root/d).rglob('*.md'))]
link = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(<?([^)\s>]+)>?\)')

def place_of(path):
    "Where a file of the repository is in the site's folder"
    parts = path.parts
    if parts[0]=='nbs': return PurePosixPath(*parts[1:])
    if parts[0]=='fastmiseg' and path.suffix=='.py' and path.stem!='__init__':
        return PurePosixPath('source', '.'.join(path.with_suffix('').parts[1:]) + '.qmd')
    if path.name=='README.md': return path.with_name('index.md') # site generators skip files of that name
    if str(path) in markdown or path.suffix in ('.png', '.csv', '.json', '.jsonl'): return path
    return PurePosixPath('files')/path

class Stage:
    "The folder that is rendered, and what it needs from the repository"
    def __init__(self, out): self.out,self.needed = out,set()

    def write(self, place, text):
        path = self.out/place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')

    def links(self, text, source):
        "Links of a page of the repository, as they are in the site"
        def changed(m):
            bang,words,href = m.groups()
            if re.match(r'[a-z]+:|#', href): return m[0]
            path,_,anchor = href.partition('#')
            found = [o for base in (source.parent, PurePosixPath('.'))
                     if (root/(o := PurePosixPath(os.path.normpath(base/path)))).exists()]
            if not found: return m[0] # the check of links names it
            target = found[0]
            if (root/target).is_dir():
                if not (root/target/'README.md').exists(): return words
                target = target/'README.md'
            place = place_of(target)
            self.needed.add((target, place))
            away = os.path.relpath(place, place_of(source).parent)
            return f"{bang}[{words}]({away}{'#' + anchor if anchor else ''})"
        parts = re.split(r'(```.*?```)', text, flags=re.S)
        return ''.join(o if o.startswith('```') else link.sub(changed, o) for o in parts)

    def copy_needed(self):
        "Pictures, tables and files that pages link to"
        for source,place in self.needed:
            if place.suffix in ('.qmd', '.ipynb', '.md'): continue
            (self.out/place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root/source, self.out/place)

def only_imports(code):
    try: body = ast.parse(code).body
    except SyntaxError: return False
    return all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in body)

def module_of(cells):
    text = '\n'.join(''.join(o['source']) for o in cells)
    m = re.search(r'^#\|\s*default_exp (\S+)', text, re.M)
    return m and m[1]

def lesson(path, stage):
    "A notebook as a reader wants it: no hidden cells, no directives, no imports of the module itself"
    nb = json.loads(path.read_text(encoding='utf-8'))
    place = PurePosixPath(path.relative_to(root))
    cells,module = [],module_of(nb['cells'])
    for c in nb['cells']:
        text = ''.join(c['source'])
        flags = re.findall(r'^#\|\s*(.*)$', text, re.M)
        if any(o.startswith(('hide', 'default_exp')) for o in flags): continue
        text = re.sub(r'^#\|.*\n?', '', text, flags=re.M)
        if c['cell_type']=='markdown': text = stage.links(text, place)
        elif not text.strip() or ('export' in flags and only_imports(text)): continue
        cells.append(c | dict(source=text))
    first = next((o for o in cells if o['cell_type']=='markdown'), None)
    if module and first and module!='all':
        first['source'] += (f'\n\n[Reference of `fastmiseg.{module}`](api/{module}.qmd) · '
                            f'[Source](source/{module}.qmd)')
    stage.write(path.name, json.dumps(nb | dict(cells=cells)))
    return module

def configuration(modules):
    "nbs/_quarto.yml, with the modules that no section of the sidebar names in a section of their own"
    config = yaml.safe_load((root/'nbs'/'_quarto.yml').read_text(encoding='utf-8'))
    named = []
    def collect(items):
        for o in items:
            if isinstance(o, str): named.append(o)
            elif isinstance(o, dict): collect(o.get('contents', []))
    sidebar = config['website']['sidebar']['contents']
    collect(sidebar)
    others = [p for p in (f'api/{o}.qmd' for o in modules) if not any(fnmatch(p, n) for n in named)]
    section = next(o for o in sidebar if isinstance(o, dict) and o['section']=='Reference')
    if others: section['contents'].append(dict(section='Other modules', contents=others))
    return yaml.safe_dump(config, sort_keys=False)

def stage_all(out):
    "Write every page of the site to `out`"
    from fastai.callback.core import event
    shutil.rmtree(out, ignore_errors=True)
    stage = Stage(out)
    stage.write('styles.css', (root/'nbs'/'styles.css').read_text(encoding='utf-8'))
    lessons = {}
    for i,o in enumerate(sorted((root/'nbs').glob('*.ipynb'))):
        if module := lesson(o, stage): lessons[module] = (i, o.name)
    modules = reference.module_files()
    modules = dict(sorted(modules.items(), key=lambda o: lessons.get(o[0], (999, ''))))
    modules = reference.readers_order(modules)
    stage.write('_quarto.yml', configuration(modules))
    events = {k for k in vars(event) if k.startswith(('before_', 'after_'))}
    for i,(module,file) in enumerate(modules.items(), 1):
        name = lessons.get(module, (0, None))[1]
        stage.write(f'api/{module}.qmd', reference.module_page(module, file, name, i, events))
        stage.write(f'source/{module}.qmd', reference.source_page(module, file))
    stage.write('api/index.qmd', reference.index_page(modules))
    stage.write('_symbols.json', json.dumps(reference.symbols(modules)))
    for o in map(PurePosixPath, markdown):
        stage.write(place_of(o), stage.links((root/o).read_text(encoding='utf-8'), o))
    stage.copy_needed()
    return modules

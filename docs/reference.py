"""The reference: a page for each module, with signature, parameters and source of each public name, and a page
for each source file, so that every link works without a network"""
import ast, importlib, inspect, pprint, re, textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, get_args, get_origin

from fastcore.docments import docments
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

root = Path(__file__).parents[1]
empty = inspect.Parameter.empty
# What a reader looks for first; other modules follow in the order of the house
first = '''scans.cohort scans.split scans.recipe scans.volume scans.masks scans.layout scans.challenges scans.readers
scans.standards scans.phantom scans.store
data augment transforms warps
callback.mireg callback.baselines callback.teacher callback.pseudo callback.copypaste
learner training metrics surface models inference evaluation scores segmenter plots commands run_model cli demo
callback.resume callback.log callback.method callback.step mutual_info losses projectors'''.split()
plumbing = '''scans.prepared scans.workers callback.stream callback.heads callback.guard callback.paired
callback.install callback.state callback.plan callback.place run_folder scan_by_scan scans.recipe_settings'''.split()

inherited = 'args', 'kwargs' # what a class passes on to the one that it is made of

@dataclass
class Name:
    "A public name: where it is defined, and what its source says about it"
    module: str     # as `callback.mireg`
    name: str       # as `MIRegCallback`
    line: int       # of its definition
    comment: str    # beside or above the definition: what a constant is for
    @property
    def page(self): return f'api/{self.module}'
    def value(self): return getattr(importlib.import_module(f'fastmiseg.{self.module}'), self.name)

def module_files():
    "Modules by name, without those that only collect others"
    files = sorted((root/'fastmiseg').rglob('*.py'))
    names = {'.'.join(o.relative_to(root/'fastmiseg').with_suffix('').parts): o for o in files}
    return {k: o for k,o in names.items() if o.stem not in ('__init__', '_modidx') and k!='all'}

def _targets(node):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [o.id for t in targets for o in ast.walk(t) if isinstance(o, ast.Name)]
    return []

def _comment(lines, line):
    "The comment at the end of a line, or else the lines of comment above it"
    if m := re.search(r'#\s(.*)$', lines[line-1]): return m[1].strip()
    above = []
    for o in reversed(lines[:line-1]):
        if not o.startswith('# ') or o.startswith('# %%'): break
        above.insert(0, o[2:].strip())
    return ' '.join(above)

def public_names(module, file):
    "Every name of a module's `__all__`, read from its source"
    text = file.read_text(encoding='utf-8')
    lines,body = text.splitlines(),ast.parse(text).body
    found,wanted = {},[]
    for node in body:
        for name in _targets(node):
            if name=='__all__': wanted = ast.literal_eval(node.value)
            first = min([node.lineno, *(o.lineno for o in getattr(node, 'decorator_list', []))])
            found.setdefault(name, (first, node.lineno))
    where = lambda o: found.get(o, (1, 1))
    return [Name(module, o, where(o)[0], _comment(lines, where(o)[1])) for o in sorted(wanted, key=where)]

def _type(anno):
    if anno in (empty, None, type(None)): return ''
    if anno is MappingProxyType: return 'dict'
    if inspect.isfunction(anno): return _type(inspect.signature(anno).return_annotation) # reads what a command is given
    text = anno if isinstance(anno, str) else inspect.formatannotation(anno)
    return re.sub(r'\b(?:[a-z_]\w*\.)+(?=[A-Za-z])', '', text)

def _given(o): return [*map(repr, o.args), *(f'{k}={v!r}' for k,v in o.keywords.items())]

def _default(o):
    if isinstance(o, MappingProxyType): o = dict(o)
    if isinstance(o, partial): return f"partial({', '.join([o.func.__name__, *_given(o)])})"
    text = getattr(o, '__name__', None) if callable(o) and not inspect.isclass(type(o).__call__) else None
    text = text or re.sub(r' at 0x[0-9a-f]+', '', repr(o))
    if text=='<factory>': return '...' # a field of a dataclass, made anew for each object
    return text if len(text)<60 else text[:57] + '...'

def signature(o, name):
    "As a caller writes it, over several lines where it is long"
    try: params = [p for p in inspect.signature(o).parameters.values() if p.name not in ('self', 'cls')]
    except (ValueError, TypeError): return name
    parts,star = [],False
    for p in params:
        if p.kind is p.KEYWORD_ONLY and not star: parts.append('*')
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        text = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '') + p.name
        parts.append(text if p.default is empty else f'{text}={_default(p.default)}')
    line = f"{name}({', '.join(parts)})"
    if len(line)<=88: return line
    return f'{name}(\n' + textwrap.fill(', '.join(parts), 84, initial_indent='    ', subsequent_indent='    ',
                                        break_long_words=False, break_on_hyphens=False) + ')'

def _cell(text):
    text = str(text).replace('|', '\\|').replace('\n', ' ')
    return re.sub('(`[^`]*`)|<', lambda m: m[1] or '&lt;', text) # code is shown as it is
def _row(*cells): return '| ' + ' | '.join(map(_cell, cells)) + ' |'

def documented(o):
    "Parameters as fastcore reads them, by name; `return` among them"
    try: said = docments(o, full=True)
    except (ValueError, TypeError, SyntaxError, OSError): return {}
    comments = _line_comments(o, said)
    for k,p in said.items():
        if get_origin(p.anno) is Annotated: # as commands have it
            p.anno,*notes = get_args(p.anno)
            p.docment = p.docment or next((o for o in notes if isinstance(o, str)), None)
        p.docment = p.docment or comments.get(k)
    back = said.get('return')
    if back is not None and 'return' not in comments and back.docment in comments.values(): back.docment = None
    return said

def _line_comments(o, said):
    """Comments beside `**kwargs`, and beside several parameters of one line, which fastcore passes over; beside `->`
    they are of what is returned, which fastcore says of the last parameter too, or the other way round"""
    if inspect.isclass(o): o = o.__dict__.get('__init__', o)
    try: text = inspect.getsource(inspect.unwrap(o))
    except (TypeError, OSError): return {}
    found = {}
    for line in text.split('"')[0].splitlines():
        code,_,comment = line.partition('#')
        names = re.findall(r'(?<![\w.])([A-Za-z_]\w*)(?=\s*(?:[:=,)]|$))', code)
        names = ['return'] if '->' in code else names
        found.update({k: comment.strip() for k in names if comment and k in said})
    return found

def own_parameters(o):
    "Names of the parameters that somebody wrote for this object, not for a class that it is made of"
    if inspect.isclass(o):
        fields = [k for k in getattr(o, '__dataclass_fields__', {}) if k in o.__dict__.get('__annotations__', {})]
        if fields: return fields
        if '__init__' not in o.__dict__ or issubclass(o, BaseException): return []
        o = o.__init__
    try: params = inspect.signature(inspect.unwrap(o)).parameters
    except (ValueError, TypeError): return []
    return [k for k in params if k not in ('self', 'cls', *inherited)]

def _typed(p):
    "Type and default in small letters"
    kind = f'`{_type(p.anno)}`' if _type(p.anno) else ''
    default = '' if p.default is empty else f'= `{_default(p.default)}`'
    both = f'{kind} {default}'.strip()
    return f'[{both}]{{.type}}' if both else ''

def parameters(o):
    "A table of parameters: type and default, and what it is"
    rows,said,own = [],documented(o),own_parameters(o)
    for k,p in said.items():
        if k in ('self', 'cls', 'return'): continue
        if p.docment or k in own: rows.append(_row(f'`{k}` {_typed(p)}', p.docment or ''))
    back = said.get('return')
    if back is not None and (back.docment or (_type(back.anno) and not inspect.isclass(o))):
        rows.append(_row(f'**returns** {_typed(back)}', back.docment or ''))
    return ['| | |', '|:------|:--------------|', *rows] if rows else []

def doc_of(o):
    if isinstance(o, partial): return '' # it has that of `partial`
    return inspect.cleandoc(o.__doc__) if isinstance(getattr(o, '__doc__', None), str) else ''

def is_code(o): return inspect.isfunction(o) or inspect.isclass(o)

def _function(o):
    "What was written of a method: also of a class method, Python's or one that fastcore patched in"
    return o.fget if isinstance(o, property) else getattr(o, '__func__', None) or getattr(o, 'f', o)

def _methods(cls, events=()):
    for k,o in vars(cls).items():
        f = o if isinstance(o, property) else _function(o)
        if k.startswith('_') or not (inspect.isfunction(f) or isinstance(o, property)): continue
        if k in events and not doc_of(f): continue
        yield k,o

def entry(n, events=()):
    "What the page says about one name, as Markdown"
    o = n.value()
    o = getattr(o, '__wrapped__', o) if not inspect.isclass(o) else o
    kind = 'class ' if inspect.isclass(o) else ''
    source = f"[source](../source/{n.module}.qmd#L-{n.line}){{.source-link}}"
    out = [f'## {n.name} {{#{n.name}}}', source]
    if not is_code(o) and not callable(o):
        text = pprint.pformat(o, width=88, compact=True, sort_dicts=False)
        text = re.sub(r' at 0x[0-9a-f]+', '', text)
        out += [f'```python\n{n.name} = {text if len(text)<1500 else text[:1500] + " ..."}\n```', n.comment]
        return '\n\n'.join(x for x in out if x)
    out += [f'```python\n{kind}{signature(o, n.name)}\n```', doc_of(o) or n.comment, '\n'.join(parameters(o))]
    for k,m in _methods(o, events) if inspect.isclass(o) else ():
        f = _function(m)
        call = f'{n.name}.{k}' if isinstance(m, property) else signature(f, f'{n.name}.{k}')
        table = [] if isinstance(m, property) else parameters(f)
        out += [f'### {n.name}.{k} {{#{n.name}.{k}}}', f'```python\n{call}\n```', doc_of(f)]
        if any(p.docment for p in documented(f).values()): out.append('\n'.join(table))
    return '\n\n'.join(x for x in out if x)

def module_page(module, file, lesson, order, events=()):
    "The reference page of a module"
    what = ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or ''
    names = public_names(module, file)
    links = f'[Source](../source/{module}.qmd)'
    if lesson: links = f'[How it works: the lesson that this module is exported from](../{lesson}) · ' + links
    head = f'---\ntitle: "{module}"\norder: {order}\n---'
    names = [n for n in names if n.name!='_']
    listed = [_row(f'[`{n.name}`](#{n.name})', summary(n)) for n in names]
    index = '\n'.join(['| | |', '|---|---|', *listed]) if len(names)>3 else ''
    return '\n\n'.join([head, what, links, index, *(entry(n, events) for n in names)]) + '\n'

def summary(n):
    "The first line of what a name is for"
    o = n.value()
    return (doc_of(o) if is_code(o) else n.comment).split('\n')[0].replace('*', '\\*')

def readers_order(modules):
    "Modules that people use first, the house's inside last"
    rank = lambda o: first.index(o) if o in first else len(first)+(o in plumbing)
    return dict(sorted(modules.items(), key=lambda o: rank(o[0])))

def index_page(modules):
    "All public names, by module"
    head = ['---', 'title: Reference', 'order: 0', '---', '',
            '`from fastmiseg.all import *` brings what notebooks need; everything can be imported from its module too.']
    for module,file in modules.items():
        what = ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or ''
        names = public_names(module, file)
        if not names: continue
        head += ['', f'## [{module}]({module}.qmd) {{#{module}}}', '', what, '', '| | |', '|---|---|']
        head += [_row(f'[`{n.name}`]({module}.qmd#{n.name})', summary(n)) for n in names]
    return '\n'.join(head) + '\n'

def source_page(module, file):
    "A module's source with numbered lines that can be linked to"
    how = HtmlFormatter(linenos='inline', lineanchors='L', cssclass='sourceCode', anchorlinenos=True)
    code = highlight(file.read_text(encoding='utf-8'), PythonLexer(), how)
    head = f'---\ntitle: "fastmiseg/{module.replace(".", "/")}.py"\nsearch: false\ntoc: false\n---'
    return f'{head}\n\n[Reference](../api/{module}.qmd)\n\n``````{{=html}}\n{code}\n``````\n'

def symbols(modules):
    "Where a name in backticks leads to"
    index = {}
    for module,file in modules.items():
        index[f'fastmiseg.{module}'] = f'/api/{module}.qmd'
        for n in public_names(module, file):
            where = f'/{n.page}.qmd#{n.name}'
            index.setdefault(n.name, where)
            index[f'fastmiseg.{module}.{n.name}'] = where
            for k,_ in _methods(n.value()) if inspect.isclass(n.value()) else ():
                if doc_of(getattr(n.value(), k)): index.setdefault(f'{n.name}.{k}', f'{where}.{k}')
    return index

def undocumented(n):
    "What a reader would miss about a public name: its docstring, its parameters"
    o = n.value()
    if not is_code(o) and not callable(o): return [] if n.comment else ['what it is for']
    if not is_code(o): return [] if doc_of(o) or n.comment else ['docstring']
    faults = [] if doc_of(o) else ['docstring']
    said = documented(o)
    return faults + [k for k in own_parameters(o) if k not in said or not said[k].docment]

"What a rendered site lacks to be read from a disk: formulas, search, and the certainty that every link leads somewhere"
import json, re
from html import unescape
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

from latex2mathml.converter import convert

formula = re.compile(r'(<(span|p|div)[^>]*class="math (inline|display)"[^>]*>)\\[(\[](.*?)\\[)\]]', re.S)
# an address may hold semicolons
fonts_elsewhere = re.compile(r'''@import\s+(?:url\(\s*)?["']?https?://[^"')\s]*["']?\s*\)?[^;]*;''')
needs_network = re.compile(r'\s*<(?:link|script)[^>]*="https?://[^>]*>(?:</script>)?')

def _mathml(m):
    how = 'block' if m[3]=='display' else 'inline'
    return m[1] + convert(unescape(m[4]).strip(), display=how)

def formulas(page):
    "LaTeX as MathML, which browsers draw by themselves"
    return formula.sub(_mathml, page)

# A page that was opened from a disk may not fetch; it may run a script that lies beside it
loader = '''(() => {
  const here = document.querySelector('meta[name="smalldocs:offset"]').content;
  const fetched = window.fetch;
  window.fetch = (url, ...rest) => !String(url).endsWith('search.json') ? fetched(url, ...rest)
    : new Promise((resolve, reject) => {
        const script = document.createElement('script');
        script.src = here + 'search.js';
        script.onload = () => resolve({ok: true, json: () => window.searchIndex});
        script.onerror = reject;
        document.head.append(script);
      });
})();'''

def finish(site):
    "Formulas and search without a network, on every page"
    index = json.loads((site/'search.json').read_text(encoding='utf-8'))
    script = f'window.searchIndex = {json.dumps(index, ensure_ascii=False)};'
    (site/'search.js').write_text(script, encoding='utf-8')
    (site/'site_libs'/'search-from-disk.js').write_text(loader, encoding='utf-8')
    for o in site.rglob('*.css'):
        o.write_text(fonts_elsewhere.sub('', o.read_text(encoding='utf-8')), encoding='utf-8')
    for o in site.rglob('*.html'):
        page = needs_network.sub('', formulas(o.read_text(encoding='utf-8')))
        up = '../'*(len(o.relative_to(site).parts)-1)
        page = page.replace('</head>', f'<script src="{up}site_libs/search-from-disk.js"></script>\n</head>', 1)
        o.write_text(page, encoding='utf-8')

class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids,self.links,self.loaded = set(),[],[]
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        if tag=='a' and attrs.get('href'): self.links.append(attrs['href'])
        for k in ('src', 'href'):
            if tag in ('img', 'script', 'link') and attrs.get(k): self.loaded.append(attrs[k])

def links_of(page):
    o = _Links()
    o.feed(page.read_text(encoding='utf-8'))
    return o

def broken_links(site):
    "Each link to a file or a place in a page that is not there, and each thing that is loaded from a network"
    pages = {o.resolve(): links_of(o) for o in site.rglob('*.html')}
    faults = [f'{o.relative_to(site)} loads something from the network' for o in site.rglob('*.css')
              if re.search(r'(?:@import|url\()\s*["\'(]*https?://', o.read_text(encoding='utf-8'))]
    for page,found in pages.items():
        name = page.relative_to(site.resolve())
        for href in found.loaded:
            if re.match('(https?:)?//', href): faults.append(f'{name} loads {href} from the network')
        for href in dict.fromkeys(found.links + found.loaded):
            url = urlsplit(href)
            if url.scheme or url.netloc: continue
            target = (page.parent/unquote(url.path)).resolve() if url.path else page
            if target.is_dir(): target = target/'index.html'
            if not target.exists() or site.resolve() not in target.parents:
                faults.append(f'{name} links to {href}, which is not there')
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids:
                faults.append(f'{name} links to {href}: the page has no such place')
    return faults

def missing_names(site, names):
    "Public names without an entry in the reference"
    ids = {}
    for n in names:
        page = site/f'{n.page}.html'
        if page not in ids: ids[page] = links_of(page).ids if page.exists() else set()
    return [f'{n.module}.{n.name}' for n in names if n.name not in ids[site/f'{n.page}.html']]

def unlisted(site):
    "Pages of lessons and of the reference that the sidebar does not lead to"
    home = links_of(site/'index.html').links
    listed = {(site/unquote(urlsplit(o).path)).resolve() for o in home}
    wanted = [*site.glob('*.html'), *(site/'api').glob('*.html')]
    return sorted(str(o.relative_to(site)) for o in wanted if o.resolve() not in listed and o.stem!='404')

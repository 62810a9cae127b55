"""Builds the site into `_site/`, without a network: `python docs/build.py`. Notebooks are rendered as they are stored;
none is run. `_proc/` is then a Quarto project: who has Quarto can run `quarto render _proc`"""
import argparse, sys, warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
root = Path(__file__).parents[1]
sys.path.insert(0, str(root))

def faults_of(site, modules):
    "What a reader would stumble over, a line each"
    import finish, reference
    names = [n for module,file in modules.items() for n in reference.public_names(module, file)]
    return [*finish.broken_links(site),
            *(f'{o} is public and has no entry in the reference' for o in finish.missing_names(site, names)),
            *(f'{o} is in no section of the sidebar: add it to nbs/_quarto.yml' for o in finish.unlisted(site))]

def build(stage=root/'_proc', site=root/'_site'):
    "Stage, render, finish, check; returns the faults"
    import shutil
    import finish, pages
    try: from smalldocs.site import build as render
    except ImportError:
        raise SystemExit('the site needs smalldocs, which needs Python 3.11: pip install -e .[dev]') from None
    modules = pages.stage_all(stage)
    shutil.rmtree(site, ignore_errors=True)
    rendered = render(stage, quiet=True)
    if rendered.out!=site.resolve():
        raise SystemExit(f'{stage}/_quarto.yml: output-dir leads to {rendered.out}, not to {site}')
    finish.finish(site)
    return faults_of(site, modules)

if __name__=='__main__':
    argparse.ArgumentParser(description=__doc__).parse_args()
    warnings.simplefilter('ignore')
    faults = build()
    print('\n'.join(faults))
    if faults: sys.exit(f'{len(faults)} faults')
    print('_site/index.html')

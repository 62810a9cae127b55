"""Writes the tables and figures of this folder again, from the evidence in it, by the command on top of each

    python studies/all_tables.py"""
import os, shlex
from pathlib import Path

from fastmiseg.study.run import compare_study

here = Path(__file__).parent

def command_of(md):
    "Study and options of a page, from its command; None where it has none"
    lines = [o for o in md.read_text(encoding='utf-8').splitlines() if o.startswith('    fastmiseg-compare ')]
    if not lines: return None
    _,study,*words = shlex.split(lines[0])
    given = {k[2:].replace('-', '_'):v for k,v in zip(words[::2], words[1::2])}
    numbers = {'seeds','labeled','valid','test','epochs','n_iters'}
    assert set(given)<=numbers|{'data','preset','recipe','score','rows'}, f'{md}: {set(given)}'
    del given['data']
    for k in numbers&set(given): given[k] = int(given[k])
    if 'rows' in given: given['rows'] = given['rows'].split(';')
    return study,given

if __name__=='__main__':
    os.environ.pop('FASTMISEG_DATA', None) # nothing is trained here
    os.chdir(here.parent)
    for md in sorted(here.glob('*.md')):
        if found := command_of(md):
            study,given = found
            compare_study(study, None, here.name, **given)
            print(md.name)

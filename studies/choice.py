"""What the recommended settings were chosen by: one training of each row, scored on validation scans.

    python studies/choice.py   # writes studies/choice/README.md from runs.jsonl and scores.csv beside it

The trainings were made by `python benchmarks/gpu_studies.py run CARRIED OUT --epochs 2 PLAN@acdc-64:1,3 PLAN@hippocampus:2` (the last one
on a CPU), with the settings in runs.jsonl, slices of 70 hearts and 46 people that are not among the test subjects of these presets, and the
presets' `test` set to 0: what is not carried cannot be looked at.
"""
import json
from pathlib import Path
import pandas as pd

here = Path(__file__).parent
columns = {('acdc',1):'ACDC, 1 patient', ('acdc',3):'ACDC, 3 patients', ('hippocampus',2):'Hippocampus, 2 subjects'}
about = '''# How the recommended settings were chosen

Mean Dice (and HD95) of 20 validation subjects after 1,000 steps; final checkpoint, of the teacher where there is one; **one training each**, so
that differences of .02 mean little. Cross-entropy and Dice unless said otherwise; labelled images in a pass of their own unless said otherwise;
U-Net of width 16, 8 + 8 slices, ACDC at 64×64 (steps of 2.5 pixels, about 3.9 mm: the spacings of its headers were not yet read; HD95 in pixels
there), Hippocampus at 64×48 and 1 mm. Made by `python studies/choice.py`; every setting is in `runs.jsonl`. What is empty was not run.
'''

def table():
    runs = [json.loads(l) for l in (here/'choice/runs.jsonl').read_text().splitlines()]
    scores = pd.read_csv(here/'choice/scores.csv').groupby('run')[['dice','hd95']].mean()
    cells = {(o['row'], columns[o['cohort'],o['labeled']]): scores.loc[o['id']] for o in runs}
    rows = list(dict.fromkeys(k for k,_ in cells))
    first = lambda row: -max((v.dice for (k,c),v in cells.items() if k==row and c.startswith('ACDC, 1')), default=0)
    lines = ['| | '+' | '.join(columns.values())+' |', '|---|'+'---|'*len(columns)]
    for row in sorted(rows, key=first):
        found = [cells.get((row, c)) for c in columns.values()]
        lines.append(f'| {row} | '+' | '.join('' if o is None else f'{o.dice:.3f} ({o.hd95:.1f})' for o in found)+' |')
    made = sorted({o['versions'] for o in runs})
    return '\n'.join([about, *lines, '', 'Made with '+'; '.join(made)+'.', ''])

if __name__=='__main__': (here/'choice'/'README.md').write_text(table(), encoding='utf-8')

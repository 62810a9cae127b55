"""What the recommended settings were chosen by: trainings of each row, scored on validation scans.

    python studies/choice.py   # writes studies/choice/README.md from runs.jsonl and scores.csv beside it

The trainings were made by `python benchmarks/gpu_studies.py run CARRIED OUT --epochs 2 PLAN@acdc-64:1,3
PLAN@hippocampus:2` (some on a CPU), with the settings in runs.jsonl; those of `plans/default.json` without
`--epochs` and at phantom:4 and acdc-64:7 too; those of the fourth round one by one, with the same presets, some by
`leads.py`. In the first round the presets' `test` was set to 0 and their test subjects were not there; in the second they were, and
nothing was scored on them.
"""
import json
from pathlib import Path
import numpy as np, pandas as pd

here = Path(__file__).parent
columns = {('acdc',1):'ACDC, 1 patient', ('acdc',3):'ACDC, 3 patients', ('hippocampus',2):'Hippocampus, 2 subjects'}
cohorts = {**dict(list(columns.items())[:2]), ('acdc',7):'ACDC, 7 patients',
           ('hippocampus',2):'Hippocampus, 2 subjects', ('phantom',4):'phantom hearts, 4'}
about = '''# How the recommended settings were chosen

Mean Dice (and HD95) of 20 validation subjects (phantom: 8) after 1,000 steps, unless another number stands there;
final checkpoint, of the teacher where there is one. Cross-entropy and Dice unless said otherwise; labelled images in
a pass of their own unless said otherwise; U-Net of width 16, 8 + 8 slices, ACDC at 64×64, Hippocampus at 64×48 and 1
mm. Made by `python studies/choice.py`; every setting is in `runs.jsonl`. What is empty was not run, or not in all
draws where draws are compared. In the rounds **one training to a number**, and one seed differs from the next by .02
to .1 where each has annotated subjects of its own, so that differences of .02 mean little.
'''
rounds = {2: '''
## Second round

ACDC at true steps of 2.5 mm, T warps; HD95 in mm. Several numbers are draws 0, 1 and 2 of the annotated subjects.
What followed: consistency with a weight of 15 for a teacher, pseudo-labels and copy-paste with a ramp; strong
augmentation of the labelled slices stays a choice; between mutual information in balance and consistency alone these
trainings show no difference.
''', 1: '''
## First round

ACDC in steps of 2.5 pixels, about 3.9 mm (the spacings of its headers were not yet read; HD95 in pixels there).
What followed: T that warps, Dice beside cross-entropy, labelled images in a pass of their own, mutual information in
balance.
'''}

drawn = '''
## Three draws of the annotated subjects

Mean Dice and its standard deviation over the draws, for what seemed best in the second round. What followed: nothing
changed. The recommended method gains with one heart (0.08) and with two hippocampi (0.03); a teacher beside it,
at a third of the weight, is no better; Mean Teacher gains as much. Draws differ by more than methods.
'''

never_below = '''
## The default beside labels alone

Labels only → `MIRegCallback()`, mean of the draws; then what it added in each draw. Plan: `plans/default.json`. On
average it is nowhere below labels only (of the 48 draws six are); with seven patients and 500 steps, which has six
draws, they are level (+0.005 in the first three; p = 0.5 over patients). It has the slow heads of the next section. Fast heads had, in the order of the
rows, 0.724, 0.738, 0.761, 0.665 and 0.848 after 500 steps, 0.762, 0.802, 0.827, 0.745 and 0.878 after 1,000, and
0.763, 0.815, 0.855, 0.768 and 0.906 after 2,000. Most trainings of labels alone ran on a GPU, those of the method on
CPUs; in the benchmark that moved labels alone by 0.018 at most.
'''

one_change = '''
## One thing changed

Validation Dice after 1,000 steps, mean of draws 0, 1 and 2 of the annotated subjects (and each); a row differs in one
setting from *labels only* or *recommended*. All made with the same versions on CPUs. Here and in the section above the
heads of global mutual information move slowly (`GlobalProjector`), in the first section and below they do not: some of
those trainings ended with all images in one global cluster. In Dice that makes a small difference: 0.761 and 0.762
with one heart, 0.809 and 0.802 with three, 0.741 and 0.745 with two hippocampi. Without the global term, 0.770 with
one heart and 0.797 with three (p = 0.0035 and 0.02 over patients, two-sided, in opposite directions; of both together
0.5): it stays. Memory, weight of the marginals and balance were chosen together. With three hearts the memory pays
(without it 0.794, p = 0.007 and over draws 0.1), the weight of the marginals too (1 instead of 1.5: 0.803, p = 0.007
and 0.5), and so does the balance (without it 0.800, p = 0.018 and 0.1); with one heart, draw 0 and fast heads a
memory made no difference (0.799, without it 0.795).

Rows that are not settings are callbacks in `../leads.py`, whose command made them, with three hearts only. What
followed, p two-sided over the 20 patients and over the three draws, not corrected for the number of things that were
tried:

- **Deep supervision** (the masks teach two coarser maps of the decoder) gives labels only 0.014 (p = 0.01 and 0.08) and
  takes 0.007 from the recommended method (0.2 and 0.3): left out.
- **Dropped features** (the pseudo-labels also teach the decoder with half of the encoder's channels missing, as in
  UniMatch: `PseudoLabelCallback(dropped=.5)`) give pseudo-labels 0.007 (p = 0.02 and 0.2) and leave them 0.016 below
  the recommended method (0.02 and 0.2): an option, not the default. Dropped within the encoder, so that each stage lacks
  what the one before it lost too, they gave nothing (draw 1: 0.774; the deepest stage alone 0.769; without 0.773).
- **The valid area** (what T mirrors in counts neither in the local joints nor in the consistency): 0.003 below (p = 0.4
  and 0.3), left out.
- **Clusters of patches across scans** (the joint of whole images replaced by one of patches of 20 mm, `Upconv5`): 0.019
  below (p = 0.0001 and 0.08), left out.
- **Twice as many unlabelled slices to a step** (16 instead of 8): 0.007 below (p = 0.1 and 0.3), left out.
- **An adapted weight of the marginals** (λ = 1 + log K − H, the larger the fewer clusters are in use): 0.009 below
  (p = 0.09 and 0.4), left out.
'''
# rows of the last three rounds: without the method, and with it
_default = {'labels only':0, 'recommended':1}

def cell(found):
    of_seed = {seed: f'{o.dice:.3f} ({o.hd95:.1f})' for seed,o in found}
    return ' '.join(of_seed.get(i, '–') for i in range(max(of_seed, default=-1)+1))

def one_round(runs, scores):
    found = {}
    for o in runs:
        at = o['row'],columns[o['cohort'],o['labeled']]
        found.setdefault(at, []).append((o['settings']['seed'], scores.loc[o['id']]))
    rows = list(dict.fromkeys(k for k,_ in found))
    def first(row):
        return -max((v[0][1].dice for (k,c),v in found.items() if k==row and c.startswith('ACDC, 1')), default=0)
    lines = ['| | '+' | '.join(columns.values())+' |', '|---|'+'---|'*len(columns)]
    for row in sorted(rows, key=first):
        lines.append(f'| {row} | '+' | '.join(cell(found.get((row, c), [])) for c in columns.values())+' |')
    return '\n'.join(lines)

def draws(runs, scores, text):
    "What `text` says of the three draws of each row, where a column has all three"
    found = {}
    for o in sorted(runs, key=lambda o: o['settings']['seed']):
        found.setdefault((o['row'], cohorts[o['cohort'],o['labeled']]), []).append(scores.dice[o['id']])
    found = {k:v for k,v in found.items() if len(v)==3}
    rows = [k for k in dict.fromkeys(o['row'] for o in runs) if any(k==row for row,_ in found)]
    shown = [c for c in cohorts.values() if any(c==k for _,k in found)]
    lines = ['| | '+' | '.join(shown)+' |', '|---|'+'---|'*len(shown)]
    def cell(row, c): return text(v) if (v := found.get((row, c))) else ''
    return '\n'.join([*lines, *(f'| {row} | '+' | '.join(cell(row, c) for c in shown)+' |' for row in rows)])

def mean_and_sd(v): return f'{np.mean(v):.3f} ({np.std(v, ddof=1):.3f})'
def mean_and_each(v): return f"{np.mean(v):.3f} ({' '.join(f'{o:.3f}' for o in v)})"

def default(runs, scores):
    "Dice without and with the default method, by cohort and number of steps"
    found = {}
    for o in runs:
        s,at = o['settings'],_default.get(o['row'])
        key = cohorts.get((o['cohort'],o['labeled'])),s['epochs']*s['n_iters']
        if at is not None: found.setdefault(key, ({},{}))[at][s['seed']] = scores.dice[o['id']]
    numbers = sorted({n for _,n in found})
    def shown(cohort, n):
        a,b = found.get((cohort, n), ({},{}))
        both = sorted(a.keys() & b.keys())
        if len(both)<3: return ''
        mean = [np.mean([o[i] for i in both]) for o in (a, b)]
        return f"{mean[0]:.3f} → {mean[1]:.3f} ({' '.join(f'{b[i]-a[i]:+.3f}' for i in both)})"
    head = ['| | '+' | '.join(f'{n:,} steps' for n in numbers)+' |', '|---|'+'---|'*len(numbers)]
    return '\n'.join([*head, *(f"| {c} | {' | '.join(shown(c, n) for n in numbers)} |" for c in cohorts.values())])

def table():
    runs = [json.loads(l) for l in (here/'choice/runs.jsonl').read_text().splitlines()]
    scores = pd.read_csv(here/'choice/scores.csv').groupby('run')[['dice','hd95']].mean()
    def of(*numbers): return [o for o in runs if o['round'] in numbers]
    changed = sorted(of(4), key=lambda o: o['row'])
    by_round = sorted(of(2, 3, 4), key=lambda o: o['round']) # the last one counts
    parts = [f"{drawn}\n{draws(of(2), scores, mean_and_sd)}\n", f"{never_below}\n{default(by_round, scores)}\n",
             f"{one_change}\n{draws(changed, scores, mean_and_each)}\n",
             *(f"{text}\n{one_round(of(n), scores)}\n" for n,text in rounds.items())]
    made = sorted({o['versions'] for o in runs})
    return about + ''.join(parts) + '\nMade with ' + '; '.join(made) + '.\n'

if __name__=='__main__': (here/'choice'/'README.md').write_text(table(), encoding='utf-8')

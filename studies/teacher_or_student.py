"""Whom to validate: the teacher with averaged statistics of batch norm, the teacher with those of
its own passes, or the student. Writes teacher_or_student.md

    python studies/teacher_or_student.py DATA --recipe hippocampus"""
import time, warnings
from pathlib import Path

import pandas as pd, torch
from fastai.basics import get_model
from fastcore.script import call_parse
from torch.func import functional_call

from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.evaluation import evaluate_cohort
from fastmiseg.scans.cohort import load_cohort
from fastmiseg.scans.split import split_cohort
from fastmiseg.scans.recipe import Recipe
from fastmiseg.study.preset import presets, settings_of
from fastmiseg.study.report import markdown
from fastmiseg.study.work import versions
from fastmiseg.training import callbacks_of, fit

who = ('Teacher, statistics averaged','Teacher, statistics of its own passes','Student')

def clone(tensors): return {k:v.detach().clone() for k,v in tensors.items()}

class Kept(EMATeacherCallback):
    "The teacher's passes move statistics of its own, as in the published code; what there is after each epoch is kept"
    own = None

    def answer(self, x):
        model = get_model(self.model)
        if self.own is None: self.own,self.kept = clone(dict(model.named_buffers())),[]
        with torch.no_grad(): return functional_call(model, {**self.average.tensors, **self.own}, (x,))

    def after_train(self):
        average,student = self.average.tensors,get_model(self.model).state_dict()
        self.kept.append(dict(zip(who, map(clone, (average, {**average, **self.own}, student)))))

@call_parse
def main(
    data:str,             # Folder or CSV of scans
    recipe:str='auto',    # How a scan becomes slices
    preset:str='cpu-long',# Budget and weights
    out:str='studies',    # Folder
    seeds:int=3,          # How many trainings
    parts:int=4,          # How often to look in a training
    n_iters:int=None      # Steps between two looks, instead of the preset's steps over `parts`
):
    "Train with all terms and a teacher, and score teacher and student on validation scans while the training goes on"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    p,begun,rows = presets[preset],time.perf_counter(),[]
    n = n_iters or p.settings.epochs*p.settings.n_iters//parts
    row = dict(method='mireg+teacher', epochs=parts, n_iters=n)
    df = split_cohort(load_cohort(data), p.labeled, p.valid, p.test, seed=p.split_seed)
    valid,how = df[df.split=='valid'],Recipe.named(recipe, df)
    for seed in range(seeds):
        s = settings_of(p, row, seed)
        mireg,_ = callbacks_of(s)
        teacher = Kept(s.decay, 0., evaluate='student')
        learn,_ = fit(s, df, how, Path(out)/'slices', quiet=True, cbs=[mireg, teacher])
        for i,kept in enumerate(teacher.kept, 1):
            for k,tensors in kept.items():
                learn.model.load_state_dict(tensors)
                dice = evaluate_cohort(learn, valid, progress=False).groupby('class').dice.mean().mean()
                rows.append(dict(who=k, seed=seed, step=i*n, dice=dice))
    def said(o): return f"{o.mean():.3f} ({', '.join(map('{:.3f}'.format, o))})"
    table = pd.DataFrame(rows).groupby(['who','step']).dice.agg(said).unstack('step').loc[list(who)]
    given = dict(recipe=(recipe,'auto'), preset=(preset,'cpu-long'), seeds=(seeds,3), parts=(parts,4),
                 n_iters=(n_iters,None))
    options = [f"--{k.replace('_','-')} {v}" for k,(v,usual) in given.items() if v!=usual]
    page = '\n'.join([
        '# Whom to validate', '',
        ' '.join(['    python studies/teacher_or_student.py DATA', *options]), '',
        f"All terms with a teacher: U-Net of width {s.width}, {parts*n} steps of {s.bs} labelled and "
        f"{s.unlabeled_bs} unlabelled slices, weights {', '.join(f'{k} {w}' for k,w in s.weights.items())} "
        f"([a, b] is reached after b of the steps), jitter {s.jitter}, shift {s.shift}, decay of the teacher "
        f"{s.decay:g}; {p.labeled} labelled subjects. Dice of the validation scans "
        f"({valid.subject.nunique()} subjects), mean (and each) of {seeds} seeds; the three values of a seed "
        f"and a step are of one training. {(time.perf_counter()-begun)/60:.0f} minutes of one core. "
        f"{versions()}.", '',
        markdown(['', *(f'{k} steps' for k in table.columns)],
                 ([k, *o] for k,o in zip(table.index, table.values))), ''])
    (Path(out)/'teacher_or_student.md').write_text(page, encoding='utf-8')
    print(page)

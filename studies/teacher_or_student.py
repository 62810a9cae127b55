"""Whom to validate: the teacher with averaged statistics of batch norm, the teacher with those of its own passes, or the student. Writes teacher_or_student.md

    python studies/teacher_or_student.py DATA --recipe hippocampus"""
import tempfile, time, warnings; warnings.filterwarnings('ignore')
from dataclasses import replace
from pathlib import Path

import pandas as pd, torch
from fastai.basics import get_model
from fastcore.script import call_parse
from torch.func import functional_call

from fastmiseg.callback.teacher import EMATeacherCallback, _tensors
from fastmiseg.scans.cohort import load_cohort
from fastmiseg.commands import _recipe_of
from fastmiseg.experiments import presets, _splits, _T
from fastmiseg.inference import evaluate_cohort
from fastmiseg.report import _lines
from fastmiseg.scans.store import SliceStore
from fastmiseg.trial import _callbacks, _settings, _train, _versions

who = ('Teacher, statistics averaged','Teacher, statistics of its own passes','Student')

class Kept(EMATeacherCallback):
    "The teacher's passes move statistics of its own, as in the published code; what there is after each epoch is kept"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, 'evaluate':'student'})
        self.own,self.kept = None,[]

    def see(self, x):
        if self.own is None: self.own = {k: v.detach().clone() for k,v in get_model(self.model).named_buffers()}
        with torch.no_grad(): return functional_call(get_model(self.model), {**self.average, **self.own}, (x,))

    def after_train(self):
        copy = lambda o: {k: v.detach().clone() for k,v in o.items()}
        self.kept.append(dict(zip(who, map(copy, (self.average, {**self.average, **self.own}, _tensors(get_model(self.model)))))))

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
    torch.set_num_threads(1)
    (out:=Path(out)).mkdir(parents=True, exist_ok=True)
    p,begun,row = presets[preset],time.perf_counter(),dict(method='mireg+teacher')
    p = replace(p, epochs=parts, n_iters=n_iters or p.epochs*p.n_iters//parts)
    df = _splits(load_cohort(data), p, [row], 'valid', 0, out)[p.labeled]
    command = ' '.join(['python studies/teacher_or_student.py DATA', *(f'--{k.replace("_","-")} {o}' for k,o,usual in (('recipe',recipe,'auto'),('preset',preset,'cpu-long'),('seeds',seeds,3),('parts',parts,4),('n_iters',n_iters,None)) if o!=usual)])
    recipe = _recipe_of(recipe, df)
    SliceStore(str(out/'slices'), recipe).prepare(df[df.split!='test'])
    s,rows = {**_settings(p, row), 'recipe':recipe.to_dict()},[]
    for seed in range(seeds):
        _,teacher = cbs = _callbacks(s, Teacher=Kept)
        with tempfile.TemporaryDirectory() as tmp: learn = _train(s, df, str(out/'slices'), seed, Path(tmp), cbs)
        for i,kept in enumerate(teacher.kept, 1):
            for k,tensors in kept.items():
                learn.model.load_state_dict(tensors)
                scores = evaluate_cohort(learn, df[df.split=='valid'], progress=False)
                rows.append(dict(who=k, seed=seed, step=i*p.n_iters, dice=scores.groupby('class').dice.mean().mean()))
        print(pd.DataFrame(rows).query('seed==@seed').pivot(index='who', columns='step', values='dice').round(3).to_string(), flush=True)
    rows = pd.DataFrame(rows)
    said = lambda o: f"{o.mean():.3f} ({', '.join(map('{:.3f}'.format, o))})"
    table = rows.groupby(['who','step']).dice.agg(said).unstack('step').loc[list(who)]
    (out/'teacher_or_student.md').write_text('\n'.join(['# Whom to validate', '', '    '+command, '',
        f'All terms with a teacher: U-Net of width {s["width"]}, {parts*p.n_iters} steps of {s["bs"]} labelled and {s["unlabeled_bs"]} unlabelled slices, weights {", ".join(f"{k} {w}" for k,w in s["weights"].items())} ([a, b] is reached after b of the steps), T {_T(s["flips"])}, decay of the teacher {s["decay"]:g}; {p.labeled} labelled subjects. '
        f'Dice of the validation scans ({df[df.split=="valid"].subject.nunique()} subjects), mean (and each) of {seeds} seeds; the three values of a seed and a step are of one training. {(time.perf_counter()-begun)/60:.0f} minutes of one core. {_versions()}.', '',
        _lines(['', *(f'{k} steps' for k in table.columns)], ([k, *o] for k,o in zip(table.index, table.values))), '']), encoding='utf-8')
    print((out/'teacher_or_student.md').read_text(encoding='utf-8'))

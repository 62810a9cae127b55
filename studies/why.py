"""Why a term helps or harms: its gradient beside the supervised one, and what its clusters follow.
Writes why.md, why.png, clusters_*.png

    python studies/why.py DATA --recipe hippocampus"""
import warnings
from pathlib import Path

import numpy as np, pandas as pd, torch
from fastai.callback.hook import hook_outputs
from fastcore.script import call_parse
from matplotlib.figure import Figure

from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.models import find_stages
from fastmiseg.plots import plot_clusters
from fastmiseg.scans.cohort import load_cohort
from fastmiseg.scans.split import split_cohort
from fastmiseg.scans.recipe import Recipe
from fastmiseg.show import palette
from fastmiseg.study.preset import presets, settings_of
from fastmiseg.study.report import markdown
from fastmiseg.study.work import versions
from fastmiseg.settings import schedule
from fastmiseg.training import fit

stages = ('Conv5','Upconv3','Upconv2')

class Watched(MIRegCallback):
    "Notes, every 40 steps, how hard each weighted term pulls at each stage beside the supervised loss, and which way"
    seen = ()

    def weighted(self, step):
        if self.train_iter%40==0: self.watch(step)
        return super().weighted(step)

    def watch(self, step):
        params = {n: list(self.model.get_submodule(n).parameters()) for n in stages}
        def grads(loss):
            of = lambda p: torch.autograd.grad(loss, p, retain_graph=True, materialize_grads=True)
            return {n: torch.cat([g.flatten() for g in of(p)]) for n,p in params.items()}
        supervised = grads(self.loss_grad)
        for k,o in self.penalty(step).items():
            w = self.weights[k]
            for n,g in grads((w(step.pct) if callable(w) else w)*o).items():
                pull = dict(ratio=float(g.norm()/supervised[n].norm()),
                            cosine=float(torch.cosine_similarity(g, supervised[n], dim=0)))
                self.seen = [*self.seen, dict(step=self.train_iter, term=k, stage=n, **pull)]

def shared(a, b):
    "Mutual information of two integer maps, as a share of the entropy of `b`"
    n = torch.stack([a,b]).flatten(1)
    P = torch.zeros(int(n[0].max())+1, int(n[1].max())+1, dtype=torch.float64)
    P.index_put_((n[0],n[1]), torch.ones(n.shape[1], dtype=torch.float64), accumulate=True)
    P /= P.sum()
    entropy = lambda p: -torch.xlogy(p, p).sum()
    return float((entropy(P.sum(0))+entropy(P.sum(1))-entropy(P))/entropy(P.sum(0)))

def full_slices(dls, n):
    "Validation slices with much on them, and their masks"
    x,y = (torch.cat([torch.Tensor(o).cpu() for o in part]) for part in zip(*dls.valid))
    most = (y>0).flatten(1).sum(1).argsort(descending=True, stable=True)
    most = most[:max(n, len(most)//2)]
    chosen = most[torch.linspace(0, len(most)-1, min(n, len(most))).long()]
    return x[chosen],y[chosen]

def maps_of(model, x, names):
    "Maps of the named stages, and nothing else"
    found = find_stages(model, list(names))
    with hook_outputs([model.get_submodule(s.module) for s in found.values()]) as hooks, torch.no_grad():
        model.eval()(x.to(next(model.parameters()).device))
        return dict(zip(found, hooks.stored))

def clusters(learn, cb):
    "For each decoder stage: how evenly the clusters are used, and what they tell of the image (means over heads)"
    x,y = full_slices(learn.dls, 64)
    rows = []
    for stage,f in maps_of(learn.model, x, cb.local_layers).items():
        with torch.no_grad(): p = cb.projector(stage)(f)
        small = lambda o: torch.nn.functional.interpolate(o.float(), p.shape[-2:], mode='nearest')
        light = small(x)[:,0]
        edges = torch.quantile(light.flatten()[::7], torch.linspace(0,1,11)[1:-1])
        marginal,k = p.double().mean((0,3,4)),p.argmax(2) # (S,K), (N,S,h,w)
        tells = lambda b: np.mean([shared(k[:,s], b.expand(k[:,s].shape)) for s in range(k.shape[1])])
        band = lambda n: torch.arange(n)*10//n # ten bands from one side of the map to the other
        entropy = -torch.xlogy(marginal, marginal).sum(1)
        rows.append(dict(stage=stage, evenness=float((entropy/np.log(marginal.shape[1])).mean()),
            clusters_that_win=np.mean([len(k[:,s].unique()) for s in range(k.shape[1])]),
            confidence=float(p.max(2).values.mean()), tells_of_class=tells(small(y[:,None])[:,0].long()),
            tells_of_intensity=tells(torch.bucketize(light, edges)),
            tells_of_row=tells(band(k.shape[-2])[:,None]), tells_of_column=tells(band(k.shape[-1]))))
    return rows

def plot_pulls(pulls, file):
    fig = Figure(figsize=(9,7.5), layout='constrained')
    for row,(w,g) in zip(fig.subplots(3, 3, sharex=True, sharey=True), pulls.groupby('weight', sort=False)):
        for ax,n in zip(row, stages):
            for i,(k,o) in enumerate(g[g.stage==n].groupby('term')):
                smooth = o.ratio.where(o.ratio>0).rolling(5, min_periods=1).median()
                ax.semilogy(o.step, smooth, color=palette[(7,1,4)[i]], label=k)
            ax.axhline(1, color='k', lw=.6)
            ax.set_title(f'{n}, MI weight {w}', fontsize=9)
            ax.grid(alpha=.3)
    row[0].set(xlabel='step', ylabel='gradient / supervised')
    row[0].legend(fontsize=8)
    fig.savefig(file, dpi=110)

def as_text(df):
    "A DataFrame as a Markdown table"
    texts = df.map(lambda v: v if isinstance(v, str) else f'{v:.3g}')
    return markdown([' '.join(filter(None, c)) if isinstance(c, tuple) else c for c in df], texts.values.tolist())

@call_parse
def main(
    data:str,           # Folder or CSV of scans
    recipe:str='auto',  # How a scan becomes slices
    preset:str='cpu-shift', # Budget and weights
    out:str='studies',  # Folder
    seed:int=0,         # Of the trainings
    n_iters:int=None    # Steps to an epoch, instead of the preset's
):
    """Watch trainings with all terms: mutual information at 0.01, at the paper's 0.1,
    and at 0.1 with a T that also shifts"""
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    out,p,pulls,used = Path(out),presets[preset],[],[]
    df = split_cohort(load_cohort(data), p.labeled, p.valid, p.test, seed=p.split_seed)
    how = Recipe.named(recipe, df)
    for name,w,shift in (('0.01',.01,0.), ('0.1',.1,0.), ('0.1, T shifts',.1,.5)):
        row = dict(method='mireg', global_mi=w, local_mi=w, shift=shift)
        s = settings_of(p, {**row, 'n_iters':n_iters} if n_iters else row, seed)
        cb = Watched(s.global_mi, s.local_mi, schedule(s.consistency), T=s.T, **s.mireg)
        learn,_ = fit(s, df, how, out/'slices', quiet=True, cbs=[cb])
        pulls.append(pd.DataFrame(cb.seen).assign(weight=name))
        dice = float(learn.recorder.values[-1][learn.recorder.metric_names[1:-1].index('dice')])
        used += [dict(weight=name, valid_dice=dice, **o) for o in clusters(learn, cb)]
        plot_clusters(learn, cb, out=out/f'clusters_{w}{"_shift" if shift else ""}.png')
    pulls = pd.concat(pulls)
    when = pd.cut(pulls.step/pulls.step.max(), [-.1,.25,.75,1], labels=['first quarter','half','last quarter'])
    table = pulls.assign(training=when).groupby(['weight','term','stage','training'], observed=True)
    table = table[['ratio','cosine']].median().unstack('training').reset_index()
    given = dict(recipe=(recipe,'auto'), preset=(preset,'cpu-shift'), seed=(seed,0), n_iters=(n_iters,None))
    options = [f"--{k.replace('_','-')} {v}" for k,(v,usual) in given.items() if v!=usual]
    page = '\n'.join([
        '# What the terms pull at, and what the clusters follow', '',
        ' '.join(['    python studies/why.py DATA', *options]), '',
        'Gradient of each weighted term over that of the supervised loss (norms, parameters of a stage; '
        'median over the steps), and the cosine between the two. Three trainings with all terms, '
        f'seed {seed}: U-Net of width {s.width}, {s.epochs*s.n_iters} steps, consistency {s.consistency} '
        f'([a, b] is reached after b of the steps), T with jitter {s.jitter}, in the last one with shift '
        f'{s.shift} too. {versions()}.', '',
        as_text(table), '',
        'Clusters on 64 validation slices, means over the heads. Evenness: entropy of the marginal over '
        'log K. Tells of: mutual information with the class of the mask, with ten steps of intensity, or '
        'with the place in the image (ten bands of rows or of columns), as a share of their entropy.', '',
        as_text(pd.DataFrame(used)), ''])
    (out/'why.md').write_text(page, encoding='utf-8')
    plot_pulls(pulls, out/'why.png')
    print(page)

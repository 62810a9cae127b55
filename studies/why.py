"""Why a term helps or harms: its gradient beside the supervised one, and what its clusters follow. Writes why.md, why.png, clusters_*.png

    python studies/why.py DATA --recipe hippocampus"""
import tempfile, warnings; warnings.filterwarnings('ignore')
from pathlib import Path

import numpy as np, pandas as pd, torch
from fastcore.script import call_parse
from matplotlib.figure import Figure

from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.regularizer import _at
from fastmiseg.scans.cohort import load_cohort
from fastmiseg.commands import _recipe_of
from fastmiseg.show import palette
from fastmiseg.experiments import presets, _splits
from fastmiseg.trial import _callbacks, _settings, _train, _versions
from fastmiseg.plots import plot_clusters, _features, _images
from fastmiseg.report import _lines
from fastmiseg.scans.store import SliceStore

stages = ('Conv5','Upconv3','Upconv2')

class Watched(MIRegCallback):
    "Notes, every 40 steps, how hard each weighted term pulls at the parameters of each stage, beside the supervised loss, and in which direction"
    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs); self.seen = []
    def weighted(self, v):
        if self.train_iter%40: return super().weighted(v)
        params = {n: list(self.model.get_submodule(n).parameters()) for n in stages}
        def grads(loss): return {n: torch.cat([g.flatten() for g in torch.autograd.grad(loss, p, retain_graph=True, materialize_grads=True)]) for n,p in params.items()}
        sup = grads(self.loss_grad)
        for k,o in self.penalty(v).items():
            for n,g in grads(_at(self.weights[k], v.pct)*o).items():
                self.seen.append(dict(step=self.train_iter, term=k, stage=n, ratio=float(g.norm()/sup[n].norm()), cosine=float(torch.cosine_similarity(g, sup[n], dim=0))))
        return super().weighted(v)

def shared(a, b):
    "Mutual information of two integer maps, as a share of the entropy of `b`"
    n = torch.stack([a,b]).flatten(1)
    P = torch.zeros(int(n[0].max())+1, int(n[1].max())+1, dtype=torch.float64)
    P.index_put_((n[0],n[1]), torch.ones(n.shape[1], dtype=torch.float64), accumulate=True)
    P /= P.sum()
    entropy = lambda p: -torch.xlogy(p, p).sum()
    return float((entropy(P.sum(0))+entropy(P.sum(1))-entropy(P))/entropy(P.sum(0)))

def clusters(learn, cb):
    "For each decoder stage: how evenly the clusters are used, and what they tell of tissue class and intensity (means over heads)"
    x,y = _images(learn, None, 64)
    rows = []
    for l,f in _features(learn, x, cb.local_layers).items():
        with torch.no_grad(): p = cb.projectors[l](f)
        small = lambda o: torch.nn.functional.interpolate(o.float(), p.shape[-2:], mode='nearest')
        light = small(x)[:,0]
        edges = torch.quantile(light.flatten()[::7], torch.linspace(0,1,11)[1:-1])
        marginal = p.double().mean((0,3,4)) # (S,K)
        k = p.argmax(2)
        of = lambda b: np.mean([shared(k[:,s], b) for s in range(k.shape[1])])
        band = lambda n: torch.arange(n)*10//n # ten bands from one side of the map to the other
        row,column = torch.broadcast_tensors(band(k.shape[-2])[:,None], band(k.shape[-1]))
        rows.append(dict(stage=l, evenness=float((-(marginal*marginal.log()).sum(1)/np.log(marginal.shape[1])).mean()),
                         clusters_that_win=np.mean([len(k[:,s].unique()) for s in range(k.shape[1])]),
                         confidence=float(p.max(2).values.mean()), tells_of_class=of(small(y[:,None])[:,0].long()), tells_of_intensity=of(torch.bucketize(light, edges)),
                         tells_of_row=of(row.expand(len(k), *row.shape)), tells_of_column=of(column.expand(len(k), *row.shape))))
    return rows

@call_parse
def main(
    data:str,           # Folder or CSV of scans
    recipe:str='auto',  # How a scan becomes slices
    preset:str='cpu-shift', # Budget and weights
    out:str='studies',  # Folder
    seed:int=0,         # Of the trainings
    n_iters:int=None    # Steps to an epoch, instead of the preset's
):
    "Watch trainings with all terms: with mutual information at 0.01, at the paper's 0.1, and at 0.1 with a T that also shifts"
    torch.set_num_threads(1)
    (out:=Path(out)).mkdir(parents=True, exist_ok=True)
    p = presets[preset]
    df = _splits(load_cohort(data), p, [dict(method='mireg')], 'valid', 0, out)[p.labeled]
    command = ' '.join(['python studies/why.py DATA', *(f'--{k.replace("_","-")} {o}' for k,o,usual in (('recipe',recipe,'auto'),('preset',preset,'cpu-shift'),('seed',seed,0),('n_iters',n_iters,None)) if o!=usual)])
    recipe = _recipe_of(recipe, df)
    SliceStore(str(out/'slices'), recipe).prepare(df[df.split!='test'])
    pulls,used = [],[]
    for name,w,shift in (('0.01',.01,0.), ('0.1',.1,0.), ('0.1, T shifts',.1,.5)):
        s = {**_settings(p, dict(method='mireg', weights=dict(global_mi=w, local_mi=w), flips=dict(shift=shift))), 'recipe':recipe.to_dict()}
        if n_iters: s['n_iters'] = n_iters
        cb, = cbs = _callbacks(s, MIReg=Watched)
        with tempfile.TemporaryDirectory() as tmp:
            learn = _train(s, df, str(out/'slices'), seed, Path(tmp), cbs)
            dice = pd.read_csv(Path(tmp)/'log.csv').dice.iloc[-1]
        pulls.append(pd.DataFrame(cb.seen).assign(weight=name))
        used += [dict(weight=name, valid_dice=dice, **o) for o in clusters(learn, cb)]
        plot_clusters(learn, cb, out=out/f'clusters_{w}{"_shift" if shift else ""}.png')
    pulls = pd.concat(pulls)
    last = pulls.assign(training=pd.cut(pulls.step/pulls.step.max(), [-.1,.25,.75,1], labels=['first quarter','half','last quarter']))
    table = last.groupby(['weight','term','stage','training'], observed=True)[['ratio','cosine']].median().unstack('training')
    md = lambda o: _lines(list(o.columns), o.map(lambda v: v if isinstance(v, str) else f'{v:.3g}').values.tolist())
    flat = table.reset_index(); flat.columns = [' '.join(filter(None, c)) for c in flat.columns]
    (out/'why.md').write_text('\n'.join([f'# What the terms pull at, and what the clusters follow', '', '    '+command, '',
        f'Gradient of each weighted term over that of the supervised loss (norms, parameters of a stage; median over the steps), and the cosine between the two. Three trainings with all terms, seed {seed}: U-Net of width {s["width"]}, {s["epochs"]*s["n_iters"]} steps, consistency {s["weights"]["consistency"]} ([a, b] is reached after b of the steps), T with jitter {s["flips"]["jitter"]}, in the last one with shift {s["flips"]["shift"]} too. {_versions()}.', '', md(flat), '',
        'Clusters on 64 validation slices, means over the heads. Evenness: entropy of the marginal over log K. Tells of: mutual information with the class of the mask, with ten steps of intensity, or with the place in the image (ten bands of rows or of columns), as a share of their entropy.', '', md(pd.DataFrame(used)), '']), encoding='utf-8')
    fig = Figure(figsize=(9,7.5), layout='constrained')
    for row,(w,g) in zip(fig.subplots(3, 3, sharex=True, sharey=True), pulls.groupby('weight', sort=False)):
        for ax,n in zip(row, stages):
            for i,(k,o) in enumerate(g[g.stage==n].groupby('term')): ax.semilogy(o.step, o.ratio.where(o.ratio>0).rolling(5, min_periods=1).median(), color=palette[(7,1,4)[i]], label=k)
            ax.axhline(1, color='k', lw=.6); ax.set_title(f'{n}, MI weight {w}', fontsize=9); ax.grid(alpha=.3)
    row[0].set(xlabel='step', ylabel='gradient / supervised'); row[0].legend(fontsize=8)
    fig.savefig(out/'why.png', dpi=110)
    print((out/'why.md').read_text(encoding='utf-8'))

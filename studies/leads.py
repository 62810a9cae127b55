"""Ideas beside the recommended method, each written as a user would write it, on validation scans.

    python benchmarks/gpu_studies.py pack CARRIED acdc-64=ACDC
    python studies/leads.py CARRIED/acdc-64.slices.npz OUT                        # three draws of three patients
    python studies/leads.py CARRIED/acdc-64.slices.npz OUT --labeled 1 --seeds 0 "valid area"

Adds to the evidence in OUT what is not there. What came of it is in `choice/README.md`, "One thing changed".
"""
import argparse, math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from fastmiseg.all import *
from fastmiseg.losses import CrossEntropyDiceLoss
from fastmiseg.methods import Method, methods
from fastmiseg.mutual_info import local_mi_loss
from fastmiseg.study.plans import Study, strong
from fastmiseg.study.preset import presets
from fastmiseg.study.run import missing_runs
from fastmiseg.study.work import make_runs
from fastmiseg.warps import Warps

class DeepSupervisionCallback(SemiSupCallback):
    "The masks teach coarser maps of the decoder too, at half the weight each (nnU-Net, Isensee et al. 2021)"
    def __init__(self, layers=('Upconv3','Upconv4')):
        super().__init__(deep=1.)
        self.layers = layers

    def views(self, step): pass

    def make_projectors(self, found):
        return nn.ModuleDict({k: nn.Conv2d(o.channels, self.dls.c, 1) for k,o in found.items()})

    def penalty(self, step):
        def loss(name, weight):
            logits = self.projectors[name](step.feats['l'][name])
            y = F.interpolate(step.y_l[:,None].float(), logits.shape[2:])[:,0].long()
            return weight*CrossEntropyDiceLoss()(logits, y)
        return sum(loss(name, .5**i) for i,name in enumerate(self.layers, 1))

def inside(T, x):
    "Where T(x) shows what was in the image, not what is mirrored in: (N,1,H,W), at the resolution of `x`"
    mask = x.new_ones(len(x), 1, *x.shape[2:])
    for part in T._parts():
        if not isinstance(part, Warps): mask = part(mask)
        else:
            places = part._places(mask.shape[2:], x.device)
            mask = F.grid_sample(mask, places, 'nearest', 'zeros', align_corners=False)
    return mask

class ValidAreaCallback(MIRegCallback):
    "What T mirrors in at the border counts neither in the local joints nor in the consistency"
    def _local_loss(self, step, name):
        f,g = self._maps(step, 'local_mi', name)
        area,head = inside(step.T, f.detach())[:,None],self.projector(name)
        return local_mi_loss(head(f)*area, head(step.T(g))*area, self.neighborhood.get(name, 1), marginal=self.marginal)

    def penalty(self, step):
        res,area = super().penalty(step),inside(step.T, step.x_u)
        apart = (step.probs('tx')-step.T(step.target).detach()).square().mean(1, keepdim=True)
        return {**res, 'consistency': (apart*area).sum()/area.sum()}

class AdaptedMarginalCallback(MIRegCallback):
    "The fewer clusters are in use, the more their entropy weighs: λ = 1 + log K − H, 1 where all are of a size"
    def _weight(self, sizes): # (...,K), that sum to 1
        entropy = -(sizes*sizes.clamp_min(1e-12).log()).sum(-1).mean()
        return 1+math.log(sizes.shape[-1])-entropy.item()

    def _global_loss(self, step, name):
        f,g = self._maps(step, 'global_mi', name)
        head = self.projector(name)
        weight = self._weight(head.memory.joint.sum(-1)) if head.memory.steps else 1.
        return head.loss(f, g, marginal=weight)

    def _local_loss(self, step, name):
        f,g = self._maps(step, 'local_mi', name)
        with torch.no_grad(): sizes = self.projector(name)(f).mean((0,3,4))
        return self.projector(name).loss(f, step.T(g), self.neighborhood.get(name, 1), marginal=self._weight(sizes))

def _as(cls): return lambda s, w: [cls(w['global_mi'], w['local_mi'], w['consistency'], T=s.T)]
def _deep(name): return lambda s, w: [*methods[name].callbacks(s, w), DeepSupervisionCallback()]

own = {
    'labels, deep': Method('labels only, with deep supervision', {}, _deep('partial'), uses_T=False),
    'recommended, deep': Method('with deep supervision', methods['recommended'].weights, _deep('recommended')),
    'valid area': Method('without what T mirrors in', methods['recommended'].weights, _as(ValidAreaCallback)),
    'adapted': Method("with a weight of the clusters' sizes that follows them", methods['recommended'].weights,
                      _as(AdaptedMarginalCallback)),
}
methods.update(own)

def recommended(**kwargs): return dict(strong, method='recommended', **kwargs)
rows = {
    'labels only, deep supervision': dict(strong, method='labels, deep'),
    'recommended, deep supervision': dict(strong, method='recommended, deep'),
    'pseudo-labels + teacher': dict(strong, method='pseudo+teacher'),
    'pseudo-labels + teacher, dropped features': dict(strong, method='pseudo+teacher', labels=dict(dropped=.5)),
    'recommended, marginal=1': recommended(mireg=dict(marginal=1.)),
    'recommended, memory=0': recommended(mireg=dict(memory=0.)),
    'recommended, balance=False': recommended(mireg=dict(balance=False)),
    'recommended, unlabeled_bs=16': recommended(unlabeled_bs=16),
    'recommended, valid area': dict(strong, method='valid area'),
    'recommended, clusters of patches across scans': recommended(
        global_mi=0., mireg=dict(local_layers=['Upconv5','Upconv3','Upconv2'])),
    'recommended, adapted marginal': dict(strong, method='adapted'),
}

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('slices')
    p.add_argument('out')
    p.add_argument('rows', nargs='*', help='default: all')
    p.add_argument('--labeled', type=int, default=3)
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    args = p.parse_args()
    study = Study('leads', 'Leads', rows, score='valid', draws=True).only(args.rows or list(rows))
    preset = replace(presets['acdc-64'], labeled=args.labeled)
    _,jobs = missing_runs(study, args.slices, args.out, preset, args.seeds, 'valid-slices')
    make_runs(jobs, 0)

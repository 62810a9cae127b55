"Scores against medpy, monai and surface-distance; metrics under any sharding, in several processes"
import os, pickle, subprocess, sys, textwrap
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.ndimage import gaussian_filter

from toy import peak_of

from fastmiseg.metrics import VolumeDice, VolumePrecision, VolumeSensitivity, count_pixels
from fastmiseg.surface import VolumeASSD, VolumeHD95, assd, dice, hd95, score_volume, surface_distances


def _blob(rng, shape, share):
    x = gaussian_filter(rng.standard_normal(shape), 2)
    return x > np.quantile(x, 1-share)

def _cases():
    """50 pairs of masks with their spacing: random, touching the border, flat, thin, single voxels, equal, disjoint,
    nested"""
    rng, out = np.random.default_rng(0), []
    for i in range(38):
        shape = tuple(int(o) for o in rng.integers(6, 20, 3))
        sp = tuple(float(o) for o in rng.uniform(.5, [10, 2, 2]))
        a = _blob(rng, shape, rng.uniform(.02, .6))
        b = (_blob(rng, shape, rng.uniform(.02, .6)), np.roll(a, int(rng.integers(1, 4)), int(rng.integers(0, 3))))[i%2]
        out.append((f'random{i}', a, b, sp))
    z = lambda: np.zeros((8,9,10), bool)
    def put(*at):
        m = z(); m[at] = True
        return m
    one, far, full = put(0,0,0), put(7,8,9), ~z()
    box, inner, line, plane = (put(*o) for o in (
        (slice(2,6),)*3, (slice(3,5),)*3, (3,4,slice(0,10)), (4,slice(None),slice(None))))
    hollow = box & ~inner
    pairs = dict(single_voxels=(one,far), equal_voxel=(one,one), full_voxel=(full,one), full_full=(full,full),
                 nested=(box,inner), hollow=(hollow,box), line_plane=(line,plane), corner_box=(one,box),
                 equal_box=(box,box), far_box=(far,box), plane_box=(plane,box), line_voxel=(line,far))
    return out + [(k,a,b,(7.,1.4,1.25)) for k,(a,b) in pairs.items()]

cases = _cases()
ids = [o[0] for o in cases]

def test_there_are_50_cases(): assert len(cases)==50 and all(a.any() and b.any() for _,a,b,_ in cases)

def _cls(a): return torch.tensor(np.stack([~a, a])[None])

@pytest.mark.parametrize('name,a,b,spacing', cases, ids=ids)
def test_medpy(name, a, b, spacing):
    medpy = pytest.importorskip('medpy.metric.binary')
    assert abs(dice(a, b)-medpy.dc(a, b)) < 1e-12
    assert abs(hd95(a, b, spacing)-medpy.hd95(a, b, spacing)) < 1e-6
    assert abs(hd95(a, b, spacing, percentile=100)-medpy.hd(a, b, spacing)) < 1e-6
    assert abs(assd(a, b, spacing)-medpy.assd(a, b, spacing)) < 1e-6     # of medpy 0.5
    # of medpy 0.4
    assert abs(assd(a, b, spacing, pooled=False)-(medpy.asd(a, b, spacing)+medpy.asd(b, a, spacing))/2) < 1e-6

@pytest.mark.parametrize('name,a,b,spacing', cases, ids=ids)
def test_monai(name, a, b, spacing):
    monai = pytest.importorskip('monai.metrics')
    kw = dict(include_background=False, spacing=list(spacing))
    theirs = monai.compute_dice(_cls(a).double(), _cls(b).double(), include_background=False).item()
    assert abs(dice(a, b)-theirs) < 1e-6 # float32
    scale = float(np.linalg.norm(np.multiply(a.shape, spacing)))     # monai computes in float32
    theirs = monai.compute_hausdorff_distance(_cls(a), _cls(b), percentile=95, **kw).item()
    assert abs(hd95(a, b, spacing, pooled=False)-theirs) < 1e-6*scale
    theirs = monai.compute_average_surface_distance(_cls(a), _cls(b), symmetric=True, **kw).item()
    assert abs(assd(a, b, spacing)-theirs) < 1e-6*scale

@pytest.mark.parametrize('name,a,b,spacing', cases, ids=ids)
def test_surface_distance(name, a, b, spacing):
    """DeepMind's surface elements lie between voxels, within half a voxel's diagonal of ours, so no distance can differ
    by more than one diagonal"""
    sd = pytest.importorskip('surface_distance')
    assert abs(dice(a, b)-sd.compute_dice_coefficient(a, b)) < 1e-12
    d = sd.compute_surface_distances(a, b, spacing)
    assert abs(hd95(a, b, spacing, percentile=100)-sd.compute_robust_hausdorff(d, 100)) <= np.linalg.norm(spacing)+1e-9

def test_medpy_and_monai_disagree_on_some():
    "The two definitions of HD95 are not the same: `pooled` matters"
    assert any(abs(hd95(a, b, s)-hd95(a, b, s, pooled=False))>.1 for _,a,b,s in cases)

# how fastai calls a metric

@pytest.mark.parametrize('axis', range(3))
def test_a_scan_of_one_slice_is_measured_in_its_plane(axis):
    "Its voxels do not all lie on the outline, for a slice has nothing above it and below"
    a,b = np.zeros((2,40,40), bool)
    a[10:30,10:30] = b[10:30,14:34] = True
    flat = [np.expand_dims(o, axis) for o in (a, b)]
    spacing = np.insert([2.,.5], axis, 9.)
    for f in (hd95, assd): assert f(*flat, spacing)==f(a, b, (2.,.5))
    assert hd95(a, b)==4 and assd(a, b)==2
    assert hd95(a[:1], b[:1], missed='diagonal')==0 and np.isnan(hd95(flat[0], flat[0]&False))
    voxel = np.ones((1,1,1), bool)
    assert hd95(voxel, voxel)==assd(voxel, voxel)==0
    scores = score_volume(*[o.astype(int) for o in flat], spacing)
    assert scores.hd95[0]==hd95(a, b, (2.,.5)) and scores.assd[0]==assd(a, b, (2.,.5))

def test_distances_in_a_large_scan_take_the_memory_of_a_few_masks():
    z,y,x = np.ogrid[-1:1:90j,-1:1:90j,-1:1:90j]
    a = z**2+y**2+x**2 < .8
    b = np.roll(a, 2, (0,1,2))
    assert peak_of(lambda: surface_distances(a, b)) < 16*a.size

def _feed(metric, preds, masks, scan, order, bs, C=3, marks=True):
    metric.reset()
    n = int(scan.max())+1
    dl = SimpleNamespace(scans=[f's{i}' for i in range(n)], spacings=[(5.,1.,2.)]*n)
    for i in torch.as_tensor(order).split(bs):
        y = masks[i].clone()
        if marks: y.scan, y.index = scan[i], i
        pred = torch.nn.functional.one_hot(preds[i], C).movedim(-1,1).float()
        metric.accumulate(SimpleNamespace(pred=pred, y=y, dl=dl, dls=None))
    return metric.to_frame()

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 7), st.integers(0, 10**6), st.booleans())
def test_any_batches_any_order_same_values(sizes, bs, seed, repeat):
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    p, y = torch.randint(0, 3, (2,n,6,7), generator=g)
    scan = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.randperm(n, generator=g)
    if repeat: order = torch.cat([order, order[:2]])
    want = [score_volume(p[scan==k].numpy(), y[scan==k].numpy(), (5.,1.,2.), ['bg','1','2']) for k in range(len(sizes))]
    for cls,col in ((VolumeDice,'dice'), (VolumeSensitivity,'sensitivity'), (VolumePrecision,'precision'),
                    (VolumeHD95,'hd95'), (VolumeASSD,'assd')):
        got = _feed(cls(), p, y, scan, order, bs)
        assert (list(got.scan)==[f's{k}' for k in range(len(sizes)) for _ in '12']
                and list(got['class'])==['1','2']*len(sizes))
        np.testing.assert_allclose(got[col], np.concatenate([w[col] for w in want]), rtol=1e-12)

def test_slices_between_which_some_are_missing():
    "Distances are those of the scan, not of its slices on top of each other"
    p,t = torch.zeros(2, 10, 8, 8).long()
    p[0,2:6,2:6],t[9,2:6,2:6] = 1,1
    scan = torch.zeros(10).long()
    for cls,distance in ((VolumeHD95,hd95), (VolumeASSD,assd)):
        got = _feed(cls(), p, t, scan, torch.tensor([9,0]), 2)
        assert got[cls.base].tolist()==[distance(p.numpy()==1, t.numpy()==1, (5.,1.,2.)), 0.]

@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_counts(C, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, C, 5, 4, generator=g).mul(2).round()
    y = torch.randint(-1, C+2, (3,5,4), generator=g)
    p = logits.max(1)[1]
    assert (p==logits.argmax(1)).all() # ties go to the lower class in both
    want = torch.stack([torch.stack([((p==c)&(y==c)).flatten(1).sum(1), (p==c).flatten(1).sum(1),
                                     (y==c).flatten(1).sum(1)], 1) for c in range(1, C)], 2)
    assert (count_pixels(p, y, C)==want).all()

def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r'Predictions of shape \(2, 3, 4, 4\) do not fit masks of shape \(2, 8, 8\)'):
        VolumeDice().accumulate(SimpleNamespace(pred=torch.zeros(2,3,4,4), y=torch.zeros(2,8,8).long(),
                                                dl=None, dls=None))

def test_predictions_of_one_channel():
    with pytest.raises(ValueError, match='have one channel; expected one for each class, the background included'):
        VolumeDice().accumulate(SimpleNamespace(pred=torch.zeros(2,1,4,4), y=torch.zeros(2,4,4).long(),
                                                dl=None, dls=None))

def test_a_metric_can_be_exported():
    import pickle
    m = VolumeDice.per_class(['bg','a','b'])[1]
    p, y = torch.randint(0, 3, (2,4,8,8))
    _feed(m, p, y, torch.tensor([0,0,1,1]), range(4), 2)
    m.value
    assert pickle.loads(pickle.dumps(m)).value==m.value and len(pickle.dumps(m))<2000

# several processes

_worker = textwrap.dedent('''
    import sys, torch, torch.distributed as dist
    from types import SimpleNamespace
    from fastai.distributed import DistributedDL
    from fastai.data.load import DataLoader
    from fastmiseg.metrics import VolumeDice
    from fastmiseg.surface import VolumeHD95
    rank, world, init = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group('gloo', rank=rank, world_size=world, init_method=init)
    DistributedDL._broadcast = lambda self, t, rank: t  # fastai's goes through CUDA
    g = torch.Generator().manual_seed(0)
    n = 11                                              # not a multiple of the world: a slice comes twice
    p, y = torch.randint(0, 3, (2,n,6,7), generator=g)
    scan = torch.tensor([0]*5 + [1]*4 + [2]*2)
    class DL(DataLoader):
        scans, spacings, device = ['a','b','c'], [(5.,1.,2.)]*3, torch.device('cpu')
    for marks in (True, False):
        dl = DistributedDL(DL(list(range(n)), bs=2, num_workers=0), rank=rank, world_size=world)
        dice, hd = VolumeDice(), VolumeHD95()
        for i in dl:
            t = y[i].clone()
            if marks: t.scan, t.index = scan[i], i
            learn = SimpleNamespace(pred=torch.nn.functional.one_hot(p[i], 3).movedim(-1,1).float(), y=t,
                                    dl=dl, dls=None)
            dice.accumulate(learn); hd.accumulate(learn)
        print('RESULT', dice.value, hd.value, len(dice.to_frame()), dice.to_frame().scan[0], flush=True)
    dist.destroy_process_group()
''')

def test_processes_agree(tmp_path):
    "Two processes share the slices, one slice comes twice: the values are those of one process"
    pytest.importorskip('accelerate') # fastai.distributed needs it
    g = torch.Generator().manual_seed(0)
    p, y = torch.randint(0, 3, (2,11,6,7), generator=g)
    scan = torch.tensor([0]*5 + [1]*4 + [2]*2)
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'CUDA_VISIBLE_DEVICES':''}
    ps = [subprocess.Popen([sys.executable, '-c', _worker, str(r), '2', f'file://{tmp_path}/init'], env=env,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for o in ps:
        out, err = o.communicate(timeout=300)
        lines = [l for l in out.splitlines() if l.startswith('RESULT')]
        assert len(lines)==2, err[-2000:]
        for line,marks,first in zip(lines, (True,False), ('a','image')):
            want = [_feed(cls(), p, y, scan, range(11), 11, marks=marks) for cls in (VolumeDice, VolumeHD95)]
            d, h, rows, name = line.split()[1:5]
            assert (int(rows), name)==(len(want[0]), first)
            assert abs(float(d)-_mean(want[0])) < 1e-12 and abs(float(h)-_mean(want[1])) < 1e-9

def _mean(df): return df.groupby('class', sort=False)[df.columns[-1]].mean().mean()

def test_learners_do_not_disturb_each_other():
    "Two learners validate in turns, batch by batch; each metric has the value of its learner alone"
    g = torch.Generator().manual_seed(0)
    p, y = torch.randint(0, 3, (2,2,8,6,7), generator=g)
    scan = torch.tensor([0]*5 + [1]*3)
    many = [[VolumeDice(), VolumePrecision(), VolumeHD95()] for _ in range(2)]
    counted = []
    for i in torch.arange(8).split(3):
        for k,metrics in enumerate(many):
            t = y[k][i].clone()
            t.scan, t.index = scan[i], i
            dl = SimpleNamespace(scans=['s0','s1'], spacings=[(5.,1.,2.)]*2)
            learn = SimpleNamespace(pred=torch.nn.functional.one_hot(p[k][i], 3).movedim(-1,1).float(), y=t, dl=dl,
                                    dls=None, metrics=metrics)
            for m in metrics: m.accumulate(learn)
            counted.append(metrics[0].counted(learn))
            assert metrics[1].counted(learn) is counted[-1] and metrics[2].counted(learn) is counted[-1]
    assert len({id(o) for o in counted})==len(counted)
    for k,metrics in enumerate(many):
        for m in metrics:
            alone = _feed(type(m)(), p[k], y[k], scan, range(8), 3)
            pd.testing.assert_frame_equal(m.to_frame(), alone)

def test_a_metric_can_be_saved_in_the_middle_of_an_epoch():
    "What is shared of the last batch stays behind"
    m = VolumeDice()
    p, y = torch.randint(0, 3, (2,2,6,7))
    learn = SimpleNamespace(pred=torch.nn.functional.one_hot(p, 3).movedim(-1,1).float(), y=y, dl=None, dls=None)
    m.accumulate(learn)
    assert pickle.loads(pickle.dumps(m)).value==m.value

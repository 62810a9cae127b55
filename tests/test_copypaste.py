"""The largest piece of each class on the device, and batches of any sizes for copy-paste"""
import numpy as np, pytest, torch
from scipy import ndimage
from torch.nn import functional as F
from fastmiseg.callback.copypaste import CopyPasteCallback, largest_pieces
from fastmiseg.callback.step import Step
from fastmiseg.transforms import RandomFlips

def with_scipy(y, n_classes):
    res = np.zeros_like(y)
    for image,out in zip(y, res):
        for c in range(1, n_classes):
            pieces,n = ndimage.label(image==c, np.ones((3,3)))
            if n: out[pieces==1+np.argmax(np.bincount(pieces.flat)[1:])] = c
    return res

def only_one(y, n_classes):
    "Whether no class of an image has two largest pieces, of which either may stay"
    def sizes(image, c): return sorted(np.bincount(ndimage.label(image==c, np.ones((3,3)))[0].flat)[1:])
    return [all(len(o)<2 or o[-1]>o[-2] for o in (sizes(image, c) for c in range(1, n_classes))) for image in y]

@pytest.mark.parametrize('size', [(16,16), (64,48), (33,130)])
@pytest.mark.parametrize('smooth', [.5, 2, 8])
def test_largest_pieces_are_scipys(size, smooth):
    rng = np.random.default_rng(int(10*smooth))
    blobs = ndimage.gaussian_filter(rng.standard_normal((5,*size)), (0,smooth,smooth))
    y = np.digitize(blobs/blobs.std(), [-.3,.5,1.2])
    y = y[only_one(y, 4)]
    assert len(y) and (largest_pieces(torch.from_numpy(y), 4).numpy()==with_scipy(y, 4)).all()

def test_pieces_of_odd_shapes():
    "Touching at a corner, filling the image, a class that is not there, a winding river"
    y = torch.zeros(4,20,20, dtype=torch.long)
    y[0,2:5,2:5] = y[0,5:8,5:8] = 1; y[0,10:14,10:14] = 1
    y[1] = 2
    y[3,::4] = 1; y[3,:4,-1] = 1; y[3,4:8,0] = 1; y[3,8:12,-1] = 1; y[3,12:16,0] = 1
    want = y.clone()
    want[0,10:14,10:14] = 0
    assert torch.equal(largest_pieces(y, 3), want)

@pytest.mark.parametrize('labelled,unlabelled', [(1,1), (1,4), (4,1), (3,5), (5,3), (2,8)])
@pytest.mark.parametrize('pct', [0., .5])
def test_any_sizes(labelled, unlabelled, pct):
    "What is pasted is pasted with its mask; each pixel comes from one of the two images of its pair"
    x_l,x_u = torch.rand(labelled,2,18,12),torch.rand(unlabelled,2,18,12)+1
    cb = CopyPasteCallback(start=.2, largest=False)
    step = Step(x_l, torch.ones(labelled,18,12).long(), x_u, RandomFlips().draw(unlabelled), pct)
    cb.views(step)
    x,(i,) = step.images['copypaste'],[cb._partner]
    assert x.shape==x_u.shape and i.max()<labelled
    where = cb._from_labelled.expand_as(x)
    assert torch.equal(x[where], x_l[i][where])
    inside = cb._from_labelled.flatten(1).sum(1)
    assert set(inside.tolist())<={12*8, 18*12-12*8} and inside[0]==12*8
    assert (x<1).all() if pct<.2 else torch.equal(x[~where], x_u[~where])
    logits = torch.randn(unlabelled,3,18,12, requires_grad=True)
    step.logits.update(x=torch.randn(unlabelled,3,18,12), copypaste=logits)
    cb.penalty(step).backward()
    assert logits.grad.isfinite().all() and (logits.grad!=0).any()

@pytest.mark.parametrize('n,side', [(4,2/3), (1,2/3), (3,.25), (5,.9)])
def test_weights_of_both_parts(n, side):
    "The mean over what has a mask plus half the mean over what has not, as in the paper; for an odd number too"
    torch.manual_seed(0)
    x_l,x_u,y_l = torch.rand(n,1,18,18),torch.rand(n,1,18,18),torch.randint(3, (n,18,18))
    cb = CopyPasteCallback(dice=0., largest=False, side=side)
    step = Step(x_l, y_l, x_u, RandomFlips().draw(n))
    cb.views(step)
    step.logits.update(x=torch.randn(n,3,18,18), copypaste=torch.randn(n,3,18,18))
    where = cb._from_labelled[:,0]
    y = torch.where(where, y_l, step.logits['x'].argmax(1))
    ce = F.cross_entropy(step.logits['copypaste'], y, reduction='none')
    torch.testing.assert_close(cb.penalty(step), ce[where].mean() + ce[~where].mean()/2)

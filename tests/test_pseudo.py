"""The strong view and its labels: any number of images, shares of what is changed, and what is paid where"""
import pytest, torch
from fastai.data.transforms import Normalize
from torch.nn import functional as F
from fastmiseg.callback.pseudo import PseudoLabelCallback, blur, light_from
from fastmiseg.callback.step import Step
from fastmiseg.losses import soft_dice_loss
from fastmiseg.transforms import RandomFlips

def some_step(n, size=(16,12), channels=1, **kw):
    return Step(torch.rand(2,channels,*size), None, torch.rand(n,channels,*size), RandomFlips().draw(n), **kw)

@pytest.mark.parametrize('n', [1, 2, 3, 6])
def test_any_number_of_images(n):
    "Of an odd number, the last has no neighbour and keeps its image"
    cb,step = PseudoLabelCallback(light=0., blurred=0., cutmix=1.),some_step(n, channels=2)
    cb.views(step)
    i = torch.arange(n)
    of = step.moved('strong', i.view(-1,1,1,1).expand(-1,1,16,12)) # of which image each pixel is
    neighbour = torch.where((i^1)<n, i^1, i).view(-1,1,1,1)
    boxed = of==neighbour
    assert ((of==i.view(-1,1,1,1)) | boxed).all() and boxed.flatten(1).any(1).all()
    torch.testing.assert_close(step.images['strong'], torch.where(boxed, step.x_u[neighbour.flatten()], step.x_u))
    step.logits.update(x=10*torch.randn(n,3,16,12), strong=torch.randn(n,3,16,12))
    assert cb.penalty(step).isfinite()

def test_shares_of_what_is_changed():
    "8 in 10 images in another light, 5 in 10 blurred, 5 in 10 with a box of 2 to 40 % of the area"
    n = 4000
    step = some_step(n, size=(20,20), generator=torch.Generator().manual_seed(0))
    cb = PseudoLabelCallback()
    u = step.rand(6)
    assert (light_from(u[:,:4]).amounts!=torch.tensor([0.,1.,1.])).any(1).float().mean()==pytest.approx(.8, abs=.03)
    blurred = (blur(step.x_u, u[:,4:], .5)-step.x_u).abs().amax((1,2,3))>1e-5
    assert blurred[u[:,5]>.2].float().mean()==pytest.approx(.5, abs=.03) # a narrower blur changes next to nothing
    cb.views(step)
    i = torch.arange(n).view(-1,1,1,1)
    area = (step.moved('strong', i.expand(-1,1,20,20))!=i).float().mean((1,2,3))
    assert (area>0).float().mean()==pytest.approx(.5, abs=.03)
    assert .01<=area[area>0].min() and area.max()<=.5 and area[area>0].mean()==pytest.approx(.21, abs=.03)

def test_light_is_that_of_the_image_before_normalisation():
    mean,std = torch.tensor([.3]).view(1,1,1,1),torch.tensor([.2]).view(1,1,1,1)
    x,views = torch.rand(4,1,16,16),[]
    for normalize,x_u in ((None,x), (Normalize.from_stats([.3], [.2], cuda=False),(x-mean)/std)):
        step = Step(x_u[:1], None, x_u, RandomFlips().draw(4), normalize=normalize,
                    generator=torch.Generator().manual_seed(1))
        PseudoLabelCallback().views(step)
        views.append(step.images['strong'])
    torch.testing.assert_close((views[0]-mean)/std, views[1], rtol=1e-4, atol=1e-4)

def test_only_what_is_sure_is_paid_for():
    "Cross-entropy over all pixels and Dice over the sure ones; no gradient goes to the label"
    cb,step = PseudoLabelCallback(threshold=.9, cutmix=0.),some_step(3)
    cb.views(step)
    x = torch.zeros(3,3,16,12); x[:,1,:8] = 10.; x[:,2,8:] = .5 # sure of class 1 above, unsure below
    x,strong = x.requires_grad_(),torch.randn(3,3,16,12, requires_grad=True)
    step.logits.update(x=x, strong=strong)
    loss = cb.penalty(step)
    loss.backward()
    assert x.grad is None and (strong.grad[:,:,8:]==0).all() and (strong.grad[:,:,:8]!=0).all()
    label,sure = torch.ones(3,16,12).long(),torch.zeros(3,16,12); sure[:,:8] = 1
    want = F.cross_entropy(strong[:,:,:8], label[:,:8])/2 + soft_dice_loss(strong.softmax(1), label, sure)
    torch.testing.assert_close(loss, want)

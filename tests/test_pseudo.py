"""The strong view and its labels: any number of images, shares of what is changed, and what is paid where"""
import pytest, torch
from fastai.data.transforms import Normalize
from torch.nn import functional as F
from fastmiseg.callback.pseudo import PseudoLabelCallback, blur, light_from
from fastmiseg.callback.step import StageMaps, Step
from fastmiseg.losses import soft_dice_loss
from fastmiseg.models import UNet, create_unet, find_stages
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

def test_T_that_would_move_nothing():
    with pytest.raises(ValueError, match='T: moves the strongly changed copy only with moved=True'):
        PseudoLabelCallback(T=RandomFlips())

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

# -- dropped features ------------------------------------------------------------------------------------------------
def dropped_step(net, n=6, again=True, **kwargs):
    "A step of the network up to the penalty, in which x is segmented without half of the encoder's channels too"
    cb = PseudoLabelCallback(threshold=.5, dropped=.5, **kwargs)
    found = find_stages(net, list(cb.layers))
    maps = StageMaps(net, found)
    cb.make_projectors(found)
    step = some_step(n, size=(64,64), generator=torch.Generator().manual_seed(0))
    cb.views(step)
    maps.listen()
    step.receive(['x','strong'], net(torch.cat([step.images[k] for k in ('x','strong')])), maps.take())
    (name,(of,changes)), = step.again.items()
    if again:
        given = {stage: f(step.feats[of][stage]) for stage,f in changes.items()}
        with maps.given(given): step.logits[name] = net(step.x_u)
    maps.remove()
    return cb,step,{stage: f(torch.ones_like(step.feats[of][stage])) for stage,f in changes.items()}

def test_the_decoder_goes_on_without_dropped_features():
    "As if it had been run by hand; statistics of batch norm, which count in validation, are those of whole features"
    net = UNet(1, 3, width=4)
    cb,step,kept = dropped_step(net)
    net.eval()
    cb,step,kept = dropped_step(net)
    assert list(step.images)==['x','strong']
    c1,c2,c3,c4,c5 = (step.feats['x'][k]*kept[k] for k in cb.layers)
    logits = net.head(net.Upconv2(net.Upconv3(net.Upconv4(net.Upconv5(c5, c4), c3), c2), c1))
    torch.testing.assert_close(logits, step.logits['dropped'])

@pytest.mark.parametrize('arch', ['unet','dynamic_unet','resnet18'])
def test_statistics_of_batch_norm_are_those_of_whole_features(arch):
    found = []
    for again in (True, False):
        torch.manual_seed(0)
        net = create_unet(arch, 1, 3, (64,64), **({} if arch=='resnet18' else dict(width=4)))
        dropped_step(net, again=again)
        found.append(net)
    for a,b in zip(*(o.buffers() for o in found)): assert torch.equal(a, b)
    assert all('forward' not in vars(m) and getattr(m, 'track_running_stats', True) for m in found[0].modules())

def test_one_stage_may_be_given_as_a_name():
    assert PseudoLabelCallback(dropped=.5, encoder='Conv5').layers==('Conv5',)

def test_a_further_answer_has_its_own_name():
    step = some_step(2)
    with pytest.raises(ValueError, match="see_again: nobody asked for 'x', of which 'half' is to be"):
        step.see_again('half', 'x', {})
    step.see('x')
    step.see_again('half', 'x', {})
    for name in ('half','x'):
        with pytest.raises(ValueError, match=f"see_again: somebody asked for '{name}' already"):
            step.see_again(name, 'x', {})

def test_dropped_channels_are_drawn_for_each_image_and_stage():
    _,_,kept = dropped_step(UNet(1, 3, width=8), n=40)
    assert all((o==o[:,:,:1,:1]).all() and set(o.unique().tolist())=={0.,2.} for o in kept.values())
    gone = {k: o[:,:,0,0]==0 for k,o in kept.items()}
    assert torch.cat(list(gone.values()), 1).float().mean()==pytest.approx(.5, abs=.02)
    assert all(len(o.unique(dim=0))==40 for k,o in gone.items() if k!='Conv1')

def test_dropped_features_of_skip_connections():
    "fastai's `DynamicUnet` takes them by hooks of its own, which see what is left"
    net = create_unet('resnet18', 1, 3, (64,64)).eval()
    cb,step,kept = dropped_step(net)
    stored = [h.stored for h in net.sfs]
    skips = [k for k in cb.layers if any(o.shape==kept[k].shape for o in stored)]
    assert len(skips)==len(stored)==4
    for k in skips: assert any(o.shape==kept[k].shape and torch.equal(o, step.feats['x'][k]*kept[k]) for o in stored)
    assert (step.logits['dropped']-step.logits['x']).abs().mean()>.01

def test_both_answers_are_paid_for_alike():
    cb,step,_ = dropped_step(UNet(1, 3, width=4))
    parts = []
    for k in ('strong','dropped'):
        sure,label = step.moved(k, step.target.detach()).max(1)
        counts,logits = (sure>=.5).float(),step.logits[k]
        parts.append((F.cross_entropy(logits, label, reduction='none')*counts).mean()
                     + soft_dice_loss(logits.softmax(1), label, counts))
    torch.testing.assert_close(cb.penalty(step), sum(parts)/2)

@pytest.mark.parametrize('dropped', [1., -.1])
def test_a_share_of_channels(dropped):
    with pytest.raises(ValueError, match=f'dropped: {dropped} is not in .0,1'): PseudoLabelCallback(dropped=dropped)

"Changes of a batch against libraries that make them for one image at a time; what is off, and nobody waits"
import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.torch_core import TensorImage, TensorMask
from scipy.ndimage import gaussian_filter
from fastmiseg.augment import Augment, _blur, _changes, _factor, _low_resolution, _matrix
from fastmiseg.scans.recipe import Recipe
from fastmiseg.transforms import RandomFlips, RandomLight, RandomShifts
from fastmiseg.warps import RandomWarps

def images(n=6, channels=2, size=(20,28), seed=0):
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(seed))

def test_blur_is_scipys():
    x,sigma = images(),torch.linspace(.5, 1, 6).view(-1,1,1,1)
    want = [[gaussian_filter(c.numpy(), s.item(), mode='nearest', radius=3) for c in o] for o,s in zip(x, sigma)]
    np.testing.assert_allclose(_blur(x, sigma), want, atol=1e-5)

@pytest.mark.parametrize('share', [.5,.6,.75,1.])
def test_low_resolution_is_a_smaller_image_enlarged_again(share):
    x = images(size=(20,40))
    small = [round(o*share) for o in x.shape[2:]]
    want = F.interpolate(F.interpolate(x, small, mode='nearest-exact'), x.shape[2:], mode='bilinear')
    np.testing.assert_allclose(_low_resolution(x, torch.full((6,1,1,1), share)), want, atol=1e-5)

def test_each_image_has_its_own_resolution():
    x,shares = images(),torch.tensor([.5,.55,.6,.7,.9,1.]).view(-1,1,1,1)
    alone = torch.cat([_low_resolution(o[None], s[None]) for o,s in zip(x, shares)])
    assert torch.equal(_low_resolution(x, shares), alone)

def test_noise_has_the_variance_that_is_said():
    x = images(4, 1, (200,200))
    y = _changes['noise'][0](x, torch.tensor([0.,.05,.1,.1]).view(-1,1,1,1), seed=3)
    assert torch.equal(y[0], x[0]) and not torch.equal(y[2]-x[2], y[3]-x[3])
    got = (y-x).flatten(1).var(1)/x.flatten(1).var(1)
    np.testing.assert_allclose(got, [0,.05,.1,.1], atol=.003)

def test_gamma_and_its_negative_mirror_each_other():
    x,g = images(),torch.linspace(.7, 1.5, 6).view(-1,1,1,1)
    np.testing.assert_allclose(_changes['inverted_gamma'][0](x, g), 1-_changes['gamma'][0](1-x, g), atol=1e-6)

def test_ranges_around_one_are_drawn_on_both_sides_alike():
    torch.manual_seed(0)
    f = _factor(20000, .7, 1.5)
    assert f.min()>=.7 and f.max()<=1.5 and abs((f<1).float().mean()-.5)<.02
    assert abs(f[f<1].mean()-.85)<.01 and abs(f[f>1].mean()-1.25)<.01

@pytest.mark.parametrize('name', _changes)
def test_shares(name):
    "As many images are changed as is said, the others are what they were, and masks stay"
    x,y = TensorImage(images(2000, 1, (6,6))),TensorMask(torch.zeros(2000,6,6).long())
    torch.manual_seed(1)
    a,b = Augment(**{name:.3})((x,y), split_idx=0)
    share = (a!=x).flatten(1).any(1).float().mean()
    assert .2<share<.4 and torch.equal(b, y) and 0<=a.min() and a.max()<=1 # a low resolution of 1 changes nothing

def test_turned_and_zoomed():
    torch.manual_seed(2)
    m = _matrix(4000, (30,40), (30,40), 0, '', 0., turn=.2, zoom=.25)[:,:,:2]
    size = torch.linalg.det(m).rsqrt()
    assert abs(((size-1).abs()>1e-4).float().mean()-.25)<.03 and .69<size.min() and size.max()<1.41
    angle = torch.atan2(m[:,1,0], m[:,0,0]).rad2deg()
    assert abs((angle!=0).float().mean()-.2)<.03 and angle.min()<-170 and angle.max()>170

def test_what_is_off_draws_nothing_and_changes_nothing():
    x,y = TensorImage(images()),TensorMask(torch.zeros(6,20,28).long())
    state = torch.get_rng_state()
    a,b = Augment.from_recipe(Recipe())((x,y), split_idx=0)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(a, x) and torch.equal(b, y)

@pytest.mark.parametrize('moves', [dict(elastic=1.), dict(scale=.2, elastic=1.),
                                   dict(scale=.2, rotate=20., flip='hv', crop=16)])
def test_image_and_mask_move_alike(moves):
    "A mask that is the image itself: each pixel of the one lies where it does in the other"
    y = F.interpolate(images(8, 1, (3,4)).round(), scale_factor=8)[:,0].long()
    x = TensorImage(y[:,None].float())
    torch.manual_seed(9)
    a,b = Augment.from_recipe(Recipe(**moves))((x,y:=TensorMask(y)), split_idx=0)
    a,b = a[:,0].as_subclass(torch.Tensor),b.as_subclass(torch.Tensor)
    if a.shape==y.shape: assert (b!=y).flatten(1).any(1).all() # every one of them moved,
    assert len({o.numpy().tobytes() for o in b})==8 # each in its own way
    certain = (a==0)|(a==1) # where bilinear reading sees one class alone
    assert certain.float().mean()>.6 and torch.equal(a[certain], b[certain].float())
    assert (a.round()==b).float().mean()>.99

def test_light_recipes_draw_as_before():
    "With the same seed, whether or not there are stronger changes that nobody asked for"
    x = TensorImage(images())
    def go(r):
        torch.manual_seed(4)
        return Augment.from_recipe(r)(x, split_idx=0)
    plain = Recipe(rotate=20., flip='hv', jitter=.3, crop=16)
    zeros = dict.fromkeys(plain.shares, 0)
    assert torch.equal(go(plain), go(Recipe(**{**plain.to_dict(), **zeros})))
    assert not torch.equal(go(plain), go(Recipe(**{**plain.to_dict(), 'augment':'strong'})))

def test_the_same_numbers_for_the_same_seed():
    x = TensorImage(images())
    def go():
        torch.manual_seed(5)
        return Augment.from_recipe(Recipe(augment='strong', noise=1, flip='h'))(x, split_idx=0)
    assert torch.equal(go(), go())

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_nobody_waits():
    aug = Augment.from_recipe(Recipe(augment='strong', rotate=20., flip='hv', jitter=.3, elastic=1.,
                                     **dict.fromkeys(Recipe().shares, .5)))
    x,y = TensorImage(images(16).cuda()),TensorMask(torch.zeros(16,20,28).long().cuda())
    torch.manual_seed(6)
    aug((x,y), split_idx=0) # kernels are loaded
    torch.cuda.set_sync_debug_mode('error')
    try:
        torch.manual_seed(7)
        a,_ = aug((x,y), split_idx=0)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert a.is_cuda and 0<=a.min() and a.max()<=1
    still = Augment.from_recipe(Recipe(augment='strong', noise=0, blur=1., gamma=1., low_resolution=1., rotate=20.))
    def go(x):
        torch.manual_seed(8)
        return still(TensorImage(x), split_idx=0).as_subclass(torch.Tensor).cpu()
    torch.testing.assert_close(go(images(16).cuda()), go(images(16)), atol=1e-3, rtol=0)

@pytest.mark.parametrize('make,said', [
    (lambda: RandomFlips(p=50), r'RandomFlips: p=50, expected a probability in 0\.\.1'),
    (lambda: RandomFlips(-1), r'RandomFlips: axes=-1, expected axes counted from the end, as in \(-2,-1\)'),
    (lambda: RandomFlips((2,3)), r'RandomFlips: axes=\(2, 3\), expected axes counted from the end'),
    (lambda: RandomShifts(20), r'RandomShifts: most=20, expected shares of height and width'),
    (lambda: RandomShifts((.5,20)), r'RandomShifts: most=\(0\.5, 20\), expected shares'),
    (lambda: RandomLight(5.), r'RandomLight: jitter=5\.0, expected a strength in 0\.\.1'),
    (lambda: RandomWarps(20, shift=10), 'RandomWarps: shift=10, expected a share of height and width'),
    (lambda: RandomWarps(20, 1.2), r'RandomWarps: scale=1\.2, expected a relative change of size'),
    (lambda: RandomWarps(-20), 'RandomWarps: rotate=-20, expected degrees in 0..180')])
def test_numbers_that_a_T_cannot_have(make, said):
    "Pixels, percents and axes counted from the front are told, and not taken for shares"
    with pytest.raises(ValueError, match=said): make()

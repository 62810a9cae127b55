"Several models as one: what is averaged, how far they disagree, and what cannot go together"
import nibabel as nib, numpy as np, pandas as pd, pytest, torch
from torch import nn

from fastmiseg.evaluation import evaluate_cohort, predict_cohort
from fastmiseg.inference import mean_opinion
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.volume import Volume, read_volume, write_volume
from fastmiseg.segmenter import Ensemble, Segmenter, SegmenterError, _together

class Says(nn.Module):
    "The same probabilities everywhere"
    def __init__(self, *p):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p).log())
    def forward(self, x): return self.p[None,:,None,None].expand(len(x), -1, *x.shape[-2:])

recipe = Recipe(spacing=2., size=(16,16), classes=('background','a'))

def segmenter(*p, recipe=recipe):
    return Segmenter(Says(*p), recipe, dict(arch=dict(arch='unet'), training={}, provenance={}))

@pytest.fixture
def scan(tmp_path):
    "Oblique, of another spacing than the recipe's"
    turn = np.array([[.96,-.28,0],[.28,.96,0],[0,0,1]])
    x = np.random.default_rng(0).random((3,20,24)).astype(np.float32)
    vol = Volume(x, (5.,1.5,1.25), (3.,-7.,11.), tuple(turn.ravel()))
    return write_volume(vol, tmp_path/'scan.nii.gz')

def entropy(*p): return -sum(o*np.log(o) for o in p)

def test_mean_and_disagreement_in_the_geometry_of_the_scan(scan, tmp_path):
    both = _together([segmenter(.9,.1), segmenter(.3,.7)], ['x','y'])
    seg = both.predict(scan, out=tmp_path/'s.nii.gz', probabilities=tmp_path/'p.nii.gz',
                       uncertainty=tmp_path/'u.nii.gz')
    p,u = nib.load(tmp_path/'p.nii.gz'),nib.load(tmp_path/'u.nii.gz')
    np.testing.assert_allclose(u.affine, nib.load(scan).affine, atol=1e-4)
    assert u.shape==nib.load(scan).shape and u.get_data_dtype()==np.float32 and (seg.array==0).all()
    middle = (slice(8,16), slice(8,16), 1)
    np.testing.assert_allclose(p.get_fdata()[middle], np.broadcast_to([.6,.4], (8,8,2)), atol=1e-5)
    want = entropy(.6,.4)-(entropy(.9,.1)+entropy(.3,.7))/2
    np.testing.assert_allclose(u.get_fdata()[middle], want, atol=1e-5)

@pytest.mark.parametrize('n,k', [(2,2), (2,5), (5,2), (4,4)])
def test_disagreement_has_a_largest_value(n, k):
    p = np.eye(k)[np.arange(n)%k][:,None]
    assert mean_opinion(p, True)[1][0]<=np.log(min(n, k))+1e-9
    if n<=k or n%k==0: assert mean_opinion(p, True)[1][0]==pytest.approx(np.log(min(n, k)))

def test_models_of_one_mind(scan, tmp_path):
    both = _together([segmenter(.6,.4), segmenter(.6,.4)], ['x','y'])
    both.predict(scan, uncertainty=tmp_path/'u.nii.gz')
    assert read_volume(tmp_path/'u.nii.gz').array.max()<1e-6

def test_one_module_as_the_mean(scan):
    x = torch.rand(2,1,16,16)
    p = Ensemble([Says(.9,.1), Says(.3,.7)])(x).softmax(1)
    torch.testing.assert_close(p[:,1], torch.full((2,16,16), .4))

def test_cohorts(scan, tmp_path):
    mask = write_volume(read_volume(scan).like(np.ones((3,20,24), np.uint8)), tmp_path/'m.nii.gz')
    df = pd.DataFrame([dict(subject='s', scan='s', image=str(scan), mask=str(mask))])
    both = _together([segmenter(.1,.9), segmenter(.3,.7)], ['x','y'])
    done = predict_cohort(both, df, tmp_path/'out', uncertainty=True, progress=False)
    assert done.problem[0] is None and (tmp_path/'out'/'s_uncertainty.nii.gz').exists()
    assert evaluate_cohort(both, df, progress=False).sensitivity[0]>.5

def test_one_model_cannot_disagree(scan, tmp_path):
    with pytest.raises(ValueError, match='uncertainty: is how much several networks disagree'):
        segmenter(.5,.5).predict(scan, uncertainty=tmp_path/'u.nii.gz')

@pytest.mark.parametrize('change,say', [
    (dict(spacing=3.), 'x and y: their recipes differ in spacing'),
    (dict(classes=('background','b')), 'differ in classes'),
    (dict(size=(32,32)), 'differ in size')])
def test_models_that_do_not_go_together(change, say):
    other = Recipe(**{**recipe.to_dict(), **change})
    with pytest.raises(SegmenterError, match=say):
        _together([segmenter(.5,.5), segmenter(.5,.5, recipe=other)], ['x','y'])

def test_augmentation_may_differ():
    other = Recipe(**{**recipe.to_dict(), 'flip':'h', 'rotate':10.})
    assert len(_together([segmenter(.5,.5), segmenter(.5,.5, recipe=other)], ['x','y']).model.members)==2

"""Whole scans in and out: other geometries, two independent readers, faults"""
import errno, os, warnings
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib, numpy as np, pandas as pd, pytest, torch
import SimpleITK as sitk

from fastai.data.transforms import Normalize, Transform
from fastai.learner import load_learner
from fastai.vision.augment import aug_transforms
from fastai.vision.core import TensorImage

import fastmiseg.scan_by_scan as E, fastmiseg.scans.volume as V
from fastmiseg.augment import Augment
from fastmiseg.data import MISegDataLoaders
from fastmiseg.evaluation import evaluate_cohort, predict_cohort
from fastmiseg.inference import ask_network, predict_volume
from fastmiseg.learner import miseg_learner
from fastmiseg.scans.recipe import Recipe
from fastmiseg.segmenter import SegmenterError, export_onnx, export_segmenter
from fastmiseg.surface import dice
from fastmiseg.scans.messages import VolumeError, VolumeWarning
from fastmiseg.scans.volume import Volume, choose_volume, read_volume, resample, write_volume

def agreement(a, b): return [dice(a==c, b==c) for c in (1,2,3)]

@pytest.fixture
def scan(heart): return heart.df[heart.df.split=='test'].image.iloc[0]

# -- the scan's own grid -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('ext', ['.nii','.nii.gz','.mha','.nrrd'])
def test_opens_over_the_scan(heart, scan, tmp_path, ext):
    out,prob = tmp_path/f'seg{ext}',tmp_path/'p.nii.gz'
    seg = predict_volume(heart.learn, scan, out=out, probabilities=prob)
    a,b = sitk.ReadImage(str(scan)),sitk.ReadImage(str(out))
    assert b.GetPixelID()==sitk.sitkUInt8 and a.GetSize()==b.GetSize()
    for k in ('GetSpacing','GetOrigin','GetDirection'):
        np.testing.assert_allclose(getattr(b,k)(), getattr(a,k)(), atol=1e-5)
    assert np.array_equal(sitk.GetArrayFromImage(b), seg.array)
    if 'nii' in ext: # the second reader
        a,b,p = nib.load(scan),nib.load(out),nib.load(prob)
        assert (b.get_data_dtype()==np.uint8 and p.get_data_dtype()==np.float32 and a.shape==b.shape
                and p.shape==(*a.shape,4))
        for o in (b,p): np.testing.assert_allclose(o.affine, a.affine, atol=1e-4)
        assert np.array_equal(np.asarray(b.dataobj).T, seg.array)
        assert np.array_equal(np.asarray(p.dataobj).argmax(-1).T, seg.array)

def headers(kind, A, zooms):
    "A NIfTI header as others write it, for a grid at `A` (RAS) with spacings `zooms`"
    h = nib.Nifti1Header()
    h.set_data_shape((8,8,8)) # nibabel then takes that of the voxels
    moved = A.copy()
    moved[0,3] += 30
    scale = 1e-3 if kind=='metres' else 1.
    h.set_xyzt_units('meter' if kind=='metres' else 'mm')
    h.set_zooms(np.array(zooms)*scale)
    unit = np.diag([scale]*3+[1])
    if kind!='sform without spacings': h.set_qform(unit@A, 1)
    if kind=='two places': h.set_sform(moved, 2)
    elif kind=='sform without spacings':
        h['pixdim'][1:4],h['sform_code'] = zooms,2
        h['srow_x'],h['srow_y'],h['srow_z'] = np.diag([-1,-1,1,1.])[:3]
    elif kind!='qform alone': h.set_sform(unit@A, 1)
    return h

@pytest.mark.parametrize('ext', ['.nii','.nii.gz'])
@pytest.mark.parametrize('kind', ['both','qform alone','sform without spacings','two places','metres'])
def test_viewers_that_trust_either_form_see_both_in_one_place(heart, scan, tmp_path, kind, ext):
    """ACDC's sform has steps of 1 mm beside other spacings in pixdim; whatever a viewer makes of that, it makes of the
    mask too"""
    there = nib.load(scan)
    h = headers(kind, there.affine, there.header.get_zooms()[:3])
    h.set_data_dtype(np.float32)
    nib.save(nib.Nifti1Image(np.asarray(there.dataobj, np.float32), None, h), tmp_path/f'scan{ext}')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', VolumeWarning)
        predict_volume(heart.learn, tmp_path/f'scan{ext}', out=tmp_path/f'seg{ext}', probabilities=tmp_path/'p.nii.gz')
        a,b = (read_volume(tmp_path/f'{o}{ext}') for o in ('scan','seg'))
    theirs = nib.load(tmp_path/f'scan{ext}')
    for o in (f'seg{ext}','p.nii.gz'):
        ours = nib.load(tmp_path/o)
        for form in ('get_qform','get_sform'):
            (A,code),(B,other) = (getattr(i.header, form)(coded=True) for i in (theirs, ours))
            assert code==other and (A is None and B is None or np.array_equal(A, B)), (o, form)
        assert np.array_equal(ours.affine, theirs.affine) and ours.header.get_zooms()[:3]==theirs.header.get_zooms()[:3]
        assert ours.header.get_xyzt_units()[0]==theirs.header.get_xyzt_units()[0]
    assert np.allclose([*a.spacing,*a.origin,*a.direction], [*b.spacing,*b.origin,*b.direction])
    seg = np.asarray(nib.load(tmp_path/f'seg{ext}').dataobj)
    assert seg.dtype==np.uint8 and seg.any() and np.array_equal(seg.T, b.array)

def test_a_volume_that_was_changed_in_memory_keeps_its_own_place(heart, scan, tmp_path):
    vol = read_volume(scan)
    vol.spacing,vol.origin = tuple(2*o for o in vol.spacing),(1.,2.,3.)
    predict_volume(heart.learn, vol, out=tmp_path/'seg.nii.gz')
    assert (np.allclose(read_volume(tmp_path/'seg.nii.gz').spacing, vol.spacing)
            and np.allclose(read_volume(tmp_path/'seg.nii.gz').origin, vol.origin))

def test_good_enough_to_tell_something(heart):
    assert evaluate_cohort(heart.learn, heart.df[heart.df.split=='test'], progress=False).dice.mean()>.7

# -- scans unlike those of training ------------------------------------------------------------------------------------
def reoriented(vol, order, flip):
    "The same voxels in the same places, stored in another order (z,y,x) and direction"
    im = sitk.PermuteAxes(vol.to_sitk(), [2-o for o in order[::-1]])
    return Volume.from_sitk(sitk.Flip(im, [bool(f) for f in flip[::-1]], False))

@pytest.mark.parametrize('order,flip', [
    ((0,1,2),(1,0,0)), ((0,1,2),(0,1,1)), ((2,1,0),(0,0,0)), ((1,0,2),(1,1,0)), ((1,2,0),(0,0,1))])
def test_stored_in_another_order(heart, scan, order, flip):
    vol = read_volume(scan)
    want,got = predict_volume(heart.learn, vol),predict_volume(heart.learn, reoriented(vol, order, flip))
    assert got.shape!=want.shape or order==(0,1,2)
    back = resample(got, to=want, nearest=True)
    assert min(agreement(back.array, want.array))>.99

@pytest.mark.parametrize('axis', [1,2])
def test_mirrored(heart, scan, axis):
    vol = read_volume(scan)
    want,got = (predict_volume(heart.learn, o, flips=True) for o in (vol, vol.like(np.flip(vol.array, axis).copy())))
    assert min(agreement(np.flip(got.array, axis), want.array))>.95

@pytest.mark.parametrize('flips', ['H','nonsense','yes','none','hvx','hh',2,None,['h']])
def test_unknown_flips(heart, scan, flips):
    with pytest.raises(ValueError, match='flips: got .*, expected True'):
        predict_volume(heart.learn, scan, flips=flips)

def test_known_flips(heart, scan):
    p = {o: ask_network(heart.learn, heart.recipe, read_volume(scan), flips=o).p
         for o in ('','h','v','hv','vh')}
    same = {False:'', True:'hv', 'vh':'hv'}
    for k,o in same.items():
        now = ask_network(heart.learn, heart.recipe, read_volume(scan), flips=k).p
        np.testing.assert_array_equal(now, p[o])
    assert not any(np.array_equal(p[''], p[o]) for o in ('h','v','hv'))

@pytest.mark.parametrize('factor', [(.6,.6), (1.25,.8), (.7,.9)])
def test_other_spacing_and_size(heart, scan, tmp_path, factor):
    "The probabilities are mapped back: nearest neighbours of labels alone cost a thin wall up to 0.04 of its Dice"
    vol = read_volume(scan)
    want = predict_volume(heart.learn, vol)
    other = resample(vol, spacing=(vol.spacing[0], *(s*f for s,f in zip(vol.spacing[1:], factor))))
    got = predict_volume(heart.learn, other, probabilities=tmp_path/'p.nii.gz')
    assert got.shape==other.shape!=want.shape
    back = resample(read_volume(tmp_path/'p.nii.gz', channels=True), to=want).array
    dices = agreement(back.argmax(0), want.array)
    assert np.mean(dices)>=.95 and min(dices)>=.9

def test_any_batch_size(heart, scan):
    vol = read_volume(scan)
    a,b = (ask_network(heart.learn, heart.recipe, vol, bs=bs).p for bs in (1,64))
    np.testing.assert_allclose(a, b, atol=1e-5)

# -- many scans --------------------------------------------------------------------------------------------------------
class Scaled(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x): return self.model((x-.2)/.5)

def test_normalised_as_in_training(heart, scan):
    "Where the loaders normalise, what the network sees of a scan is normalised too; our files cannot hold that"
    normalize = Normalize.from_stats([.2], [.5], cuda=False)
    learn = SimpleNamespace(model=heart.learn.model, recipe=heart.recipe,
                            dls=SimpleNamespace(after_batch=SimpleNamespace(fs=[normalize])))
    plain = SimpleNamespace(model=Scaled(heart.learn.model), recipe=heart.recipe)
    a,b,other = (ask_network(o, heart.recipe, read_volume(scan)).p for o in (learn, plain, heart.learn))
    assert np.array_equal(a, b) and not np.allclose(a, other)
    rows = heart.df[heart.df.split=='test']
    assert evaluate_cohort(learn, rows, progress=False).equals(evaluate_cohort(plain, rows, progress=False))
    assert E.identity_of(learn, heart.recipe)!=E.identity_of(heart.learn, heart.recipe)
    learn.arch = dict(arch='unet', n_in=1, n_out=4)
    for export,name in ((export_segmenter,'a.safetensors'), (export_onnx,'a.onnx')):
        with pytest.raises(SegmenterError, match='learn: its loaders have a `Normalize`, which the file cannot hold'):
            export(learn, name)

def test_an_exported_learner_normalises_as_it_did(heart, scan, tmp_path):
    dls = MISegDataLoaders.from_cohort(heart.df, heart.recipe, tmp_path/'slices', bs=2, workers=0,
                                       augment=[Normalize.from_stats([.2], [.5], cuda=False)])
    learn = miseg_learner(dls, width=2, path=tmp_path)
    learn.export(tmp_path/'a.pkl')
    back = load_learner(tmp_path/'a.pkl')
    a,b = (ask_network(o, heart.recipe, read_volume(scan)).p for o in (learn, back))
    assert np.array_equal(a, b)

class Stretched(Transform):
    "As a user has it: in training and in validation"
    order = 50
    def encodes(self, x:TensorImage): return (x-x.mean())/x.std()

class Mixed(Stretched): split_idx = 0

def test_other_batch_transforms_of_the_validation(heart, scan, tmp_path):
    "Scans came to the network without them, and its masks were not what was validated"
    def learner(*augment):
        dls = MISegDataLoaders.from_cohort(heart.df, heart.recipe, tmp_path/'slices', bs=2, workers=0,
                                           augment=[Augment.from_recipe(heart.recipe), *augment])
        return miseg_learner(dls, width=2, path=tmp_path)
    learn = learner(Stretched())
    learn.export(tmp_path/'a.pkl')
    rows = heart.df[heart.df.split=='test']
    for o in (learn, load_learner(tmp_path/'a.pkl')):
        for ask in (lambda: predict_volume(o, scan), lambda: evaluate_cohort(o, rows, progress=False),
                    lambda: export_segmenter(o, tmp_path/'a.safetensors')):
            with pytest.raises(ValueError, match='dls: a batch transform .*Stretched.* changes'): ask()
    predict_volume(other := learner(*aug_transforms(), Mixed()), scan)
    export_segmenter(other, tmp_path/'a.safetensors')

def test_a_scan_with_a_choice_is_not_replaced(heart, scan, tmp_path):
    file = write_volume(read_volume(scan), tmp_path/'a.nii.gz')
    before = file.read_bytes()
    chosen = choose_volume(file, form='sform')
    for out in (file, tmp_path/'sub'/'..'/'a.nii.gz'):
        with pytest.raises(ValueError, match='is a scan or mask that is read here'):
            predict_volume(heart.learn, chosen, out=out)
    df = pd.DataFrame([dict(subject='a', scan='a', image=chosen, mask=None)])
    with pytest.raises(ValueError, match='is a scan or mask that is read here'):
        predict_cohort(heart.learn, df, tmp_path, overwrite=True, progress=False)
    assert file.read_bytes()==before

def test_two_scans_of_one_name(heart, tmp_path):
    rows = heart.df[heart.df.split!='unlabeled'].iloc[:3].assign(scan=['case1','case1','other'])
    say = r'scan: the cohort gives 1 name to several scans \(case1\); expected unique names'
    for call in (lambda: evaluate_cohort(heart.learn, rows, split='all'),
                 lambda: predict_cohort(heart.learn, rows, tmp_path/'out')):
        with pytest.raises(ValueError, match=say): call()
    assert not (tmp_path/'out').exists()

def test_background_of_masks_that_know_nobody_annotated(heart, scan, tmp_path):
    "Where -1 and 0 are background, what is written is 0"
    recipe = replace(heart.recipe, labels={-1:0, 0:0, 1:1, 205:2, -3:3})
    assert recipe.stored==[0,1,205,-3]
    seg = predict_volume(heart.learn, scan, out=tmp_path/'m.nii.gz', recipe=recipe)
    assert (seg.array==0).mean()>.5 and set(np.unique(seg.array))<={0,1,205,-3}

def test_one_scan_in_memory_at_a_time(heart, tmp_path, monkeypatch):
    import weakref
    alive = []
    def read(*args, **kw):
        assert sum(o() is not None for o in alive)<=1
        vol = read_volume(*args, **kw)
        alive.append(weakref.ref(vol))
        return vol
    monkeypatch.setattr(E, 'read_volume', read)
    assert len(predict_cohort(heart.learn, heart.df[:4], tmp_path, progress=False))==4==len(alive)

def test_bar(heart, tmp_path, capfd):
    predict_cohort(heart.learn, heart.df[:2], tmp_path/'a')
    assert '2/2' in capfd.readouterr().out
    predict_cohort(heart.learn, heart.df[:2], tmp_path/'b', progress=False)
    assert capfd.readouterr().out==''

def test_intensities_of_the_whole_subject(heart, tmp_path):
    "A recipe with per='subject' takes them from all scans of the subject, as in training; an unusable one says nothing"
    vol = read_volume(heart.df.image[0])
    bright = write_volume(vol.like(vol.array*4), tmp_path/'bright.nii.gz')
    (tmp_path/'bad.nii.gz').write_bytes(b'')
    df = pd.DataFrame(dict(subject=['a']*3, scan=['dim','bright','bad'],
                           image=[heart.df.image[0], str(bright), str(tmp_path/'bad.nii.gz')]))
    recipe = Recipe(**{**heart.recipe.to_dict(), 'per':'subject'})
    done = predict_cohort(heart.learn, df, tmp_path/'out', recipe=recipe, progress=False)
    assert done.problem.notna().tolist()==[False,False,True]
    want = recipe.limits(vol, read_volume(bright))
    answer = ask_network(heart.learn, recipe, vol, want)
    assert np.array_equal(read_volume(tmp_path/'out'/'dim.nii.gz').array, answer.where.inverse(answer.p).argmax(0))

def test_same_dice_as_validation(heart):
    "Where the slices are the scan's own pixels, the metric of training and the score of the whole scan are one number"
    from fastai.basics import set_seed
    from fastmiseg.data import MISegDataLoaders
    from fastmiseg.learner import miseg_learner
    from fastmiseg.metrics import VolumeDice
    set_seed(0)
    recipe = Recipe(size=(128,128), classes=heart.recipe.classes)
    dls = MISegDataLoaders.from_cohort(heart.df, recipe, store=heart.root/'whole', bs=2, n_iters=1, workers=0)
    learn = miseg_learner(dls, width=2, metrics=VolumeDice())
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    scores = evaluate_cohort(learn, heart.df[heart.df.split=='valid'], progress=False)
    assert scores.groupby('class').dice.mean().mean()==pytest.approx(learn.recorder.values[-1][-1], abs=2e-3)

# -- faults ------------------------------------------------------------------------------------------------------------
def test_full_disk(heart, tmp_path, monkeypatch):
    "It is nobody's bad scan: what is written stays, nothing is half-written, and the sentence says so"
    n,replace = [0],os.replace
    def full(a, b):
        n[0] += 1
        if n[0]>3: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(a, b)
    monkeypatch.setattr(V.os, 'replace', full)
    with pytest.raises(VolumeError, match=r'heart002.nii.gz: cannot be written \(No space left on device\)'):
        predict_cohort(heart.learn, heart.df, tmp_path/'out', progress=False)
    # the first is a note of what is done
    assert sorted(os.listdir(tmp_path/'out'))==['.segmented.jsonl','heart000.nii.gz','heart001.nii.gz']

def test_cut_while_writing(heart, scan, tmp_path, monkeypatch):
    write = sitk.WriteImage
    def cut(im, path, **kw):
        write(im, path, **kw)
        os.truncate(path, os.path.getsize(path)//2)
    monkeypatch.setattr(V.sitk, 'WriteImage', cut)
    with pytest.raises(VolumeError, match='is the disk full'):
        predict_volume(heart.learn, scan, out=tmp_path/'seg.nii.gz')
    assert not os.listdir(tmp_path)

def test_old_file_survives(heart, scan, tmp_path, monkeypatch):
    old = tmp_path/'seg.nii.gz'; old.write_bytes(b'old')
    monkeypatch.setattr(V.sitk, 'WriteImage',
                        lambda *a, **k: (_ for _ in ()).throw(RuntimeError('ERROR: cannot write')))
    with pytest.raises(VolumeError): predict_volume(heart.learn, scan, out=old)
    assert old.read_bytes()==b'old' and os.listdir(tmp_path)==['seg.nii.gz']

def test_diverged_network(heart, scan):
    w = heart.learn.model.head.bias
    old = w.detach().clone()
    try:
        with torch.no_grad(): w.fill_(float('nan'))
        with pytest.raises(VolumeError, match='the network predicts NaN'): predict_volume(heart.learn, scan)
    finally:
        with torch.no_grad(): w.copy_(old)

def test_mask_of_another_scan(heart):
    df = heart.df[:2].copy()
    df.loc[0,'mask'] = heart.df['mask'][3]
    with pytest.raises(VolumeError, match='heart003.nii.gz: has .* voxels'):
        evaluate_cohort(heart.learn, df, progress=False)

def test_mask_with_other_values(heart, tmp_path):
    mask = read_volume(heart.df['mask'][0])
    df = heart.df[:1].assign(mask=str(write_volume(mask.like(mask.array*3), tmp_path/'m.nii.gz')))
    with pytest.raises(VolumeError, match='m.nii.gz: holds the values 6, 9, declared are 0, 1, 2, 3'):
        evaluate_cohort(heart.learn, df, progress=False)

def test_warnings_are_told_once(heart, tmp_path):
    "Masks whose geometry is off by a little: one warning for the cohort, not one for each file"
    df,rows = heart.df[-3:].copy(),[]
    for r in df.itertuples():
        m = read_volume(r.mask)
        moved = Volume(m.array, m.spacing, tuple(o+2e-5 for o in m.origin), m.direction)
        rows.append(str(write_volume(moved, tmp_path/f'{r.scan}.nii.gz')))
    df['mask'] = rows
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        evaluate_cohort(heart.learn, df, progress=False)
    said = [str(o.message) for o in said if issubclass(o.category, VolumeWarning)]
    assert len(said)==1 and f'{len(df)} files' in said[0], said

"Whose scores they are, and what a class costs that was missed"
from types import SimpleNamespace

import nibabel as nib, numpy as np, pandas as pd, pytest, torch

import fastmiseg.run_model as R, fastmiseg.scan_by_scan as E
from fastmiseg.evaluation import evaluate_cohort, predict_cohort
from fastmiseg.inference import ask_network
from fastmiseg.plots import plot_scans
from fastmiseg.scans.cohort import short_digest, voxel_digest
from fastmiseg.scans.layout import cohort_frame
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.volume import Volume, choose_volume, read_volume, write_volume
from fastmiseg.scores import score_table, scores_text
from fastmiseg.surface import dice, score_volume
from fastmiseg.viewing import ScanPicture

def scores(masks, preds, spacing=(5.,1.,2.)):
    "As `evaluate_cohort` returns them"
    rows = []
    for i,(m,p) in enumerate(zip(masks, preds)):
        diagonal = np.linalg.norm(np.multiply(m.shape, spacing))
        one = score_volume(p, m, spacing, ('background','a','b'))
        rows.append(one.assign(subject=f's{i}', scan=f's{i}', split='test', diagonal=diagonal))
    return pd.concat(rows, ignore_index=True)

@pytest.fixture
def cases():
    "Three scans: all right; b is missed; b is found where there is none"
    rng = np.random.default_rng(0)
    full = rng.integers(0, 3, (3,8,9)).astype(np.uint8)
    without = np.where(full==2, 0, full)
    return [full, full, without],[full, without, full]

def test_a_missed_class_counts_as_the_diagonal(cases):
    s = scores(*cases)
    assert s.hd95.isna().sum()==2==s['assd'].isna().sum()
    b = score_table(s).set_index('class').loc['b']
    assert b.hd95==pytest.approx(2*np.linalg.norm([15,8,18])/3)
    assert (b.missed,b.with_class,b.invented,b.scans)==(1,2,1,3)
    assert score_table(s, 'nan').set_index('class').hd95['b']==0
    assert score_table(s, 374).set_index('class').hd95['b']==pytest.approx(2*374/3)

def test_a_missed_class_is_worse_than_one_in_the_farthest_corner(cases):
    mask,far = np.zeros((2,3,8,9), np.uint8)
    mask[0,0,0],far[-1,-1,-1] = 1,1
    a,b = (score_table(scores([mask], [o])).set_index('class').loc['a'] for o in (far, far*0))
    assert a.hd95<b.hd95 and a['assd']<b['assd']

def test_means_over_scans_then_over_classes(cases):
    s = scores(*cases)
    t = score_table(s).set_index('class')
    assert t.dice['mean']==pytest.approx(s.groupby('class').dice.mean().mean())
    assert t.dice['b']==pytest.approx(1/3)

def test_the_same_from_a_file(cases, tmp_path):
    s = scores(*cases)
    s.to_csv(tmp_path/'metrics.csv', index=False)
    pd.testing.assert_frame_equal(score_table(pd.read_csv(tmp_path/'metrics.csv')), score_table(s))

def test_the_text_says_what_it_is_about(cases):
    s = scores(*cases)
    said = scores_text(pd.concat([s, s.assign(split='labeled', subject='s')]))
    assert 'test: 3 scans of 3 subjects\n' in said
    assert 'labeled: 3 scans of 1 subject, which the network was trained on' in said
    assert '1 of 2' in said and '1 of 1' in said and 'Means over scans' in said and 'the diagonal of the scan' in said
    assert '374 mm' in scores_text(s, 374) and 'is left out of HD95' in scores_text(s, 'nan')
    assert 'was missed' not in scores_text(s[s.scan=='s0'])

def test_a_rare_class_that_is_never_found_is_not_good_without_a_word():
    "Two scans of ten have it, none is found: a Dice of 0.8"
    none = np.zeros((2,8,8), int)
    there = none.copy()
    there[:,2:4,2:4] = 1
    def said(**kw):
        one = [score_volume(none, there if i<2 else none, None, ['background','lesion'], **kw).assign(
                   subject=f's{i}', scan=f's{i}', split='test', diagonal=11.) for i in range(10)]
        return scores_text(pd.concat(one, ignore_index=True))
    assert 'neither in the mask nor found counts as a Dice of 1 and as 0 mm (8 times).' in said()
    assert 'neither in the mask nor found is left out of Dice (8 times).' in said(empty=np.nan)
    assert 'one that was missed is left out of precision' in said()

def test_test_scans_of_several_folds_are_counted_as_often(cases):
    "Not 'invented in 1 of -2'"
    s = pd.concat([scores(*cases).assign(fold=k) for k in range(3)], ignore_index=True)
    said = scores_text(s)
    assert 'test: 3 scans of 3 subjects, each scored with 3 models\n' in said
    assert [o.split()[-6:] for o in said.splitlines()[3:5]]==['3 of 6 3 of 3'.split(), '3 of 15 3 of 3'.split()]

def test_scores_that_do_not_say_the_diagonal(cases):
    s = scores(*cases).drop(columns='diagonal')
    with pytest.raises(ValueError, match="no column 'diagonal' .*give `missed` in mm"): score_table(s)
    assert len(score_table(s[s.scan=='s0']))==3

def test_parts_of_the_split(heart):
    df,go = heart.df,lambda df, **kw: evaluate_cohort(heart.learn, df, progress=False, **kw)
    held = go(df)
    assert set(held.split)=={'valid','test'} and held.attrs['left_out']=={'labeled':9}
    of = dict(zip(df.scan, df.split))
    assert all(of[s]==k for s,k in zip(held.scan, held.split))
    with pytest.raises(ValueError, match="no scan with a mask is in 'train'; there are labeled"): go(df, split='train')
    some = pd.concat([df[df.split=='labeled'][:1], df[df.split=='valid'][:1]])
    assert list(dict.fromkeys(go(some, split='all').split))==['labeled','valid']
    with pytest.warns(UserWarning, match='all scans with a mask are of the training'): go(some[:1])

# -- a network that is known to be right -------------------------------------------------------------------------------
class Levels(torch.nn.Module):
    "The class is the intensity, of 0..1, in as many steps as there are classes"
    def __init__(self, n):
        super().__init__()
        self.n,self.steepness = n,torch.nn.Parameter(torch.tensor(20.))
    def forward(self, x):
        levels = torch.arange(self.n).view(1,-1,1,1)/(self.n-1)
        return -self.steepness*(x-levels).abs()

def levels(classes, **kw):
    "A learner with that network, for scans as `scans_of` writes them"
    recipe = Recipe(size=16, classes=('background',*classes), percentiles=(0,100), **kw)
    return SimpleNamespace(model=Levels(len(recipe.classes)), recipe=recipe, about={})

def scans_of(folder, arrays, masks, subjects=None, stored=None):
    "A cohort of scans and masks"
    rows = []
    for i,(a,m) in enumerate(zip(arrays, masks)):
        image,mask = folder/f'v{i}.nii.gz',folder/f'm{i}.nii.gz'
        write_volume(Volume(a.astype(np.float32), (3.,1.,1.)), image)
        if m is not None: write_volume(Volume((m if stored is None else stored[m]).astype(np.uint8), (3.,1.,1.)), mask)
        rows.append(dict(subject=f's{i}' if subjects is None else subjects[i], scan=f'v{i}', image=str(image),
                         mask=None if m is None else str(mask)))
    return cohort_frame(rows)

def kept_in(got):
    "`ScanPicture.of`, which keeps the predictions that it draws"
    of = ScanPicture.of
    def keep(scan, mask, pred, *args, **kwargs):
        got.append(pred)
        return of(scan, mask, pred, *args, **kwargs)
    return keep

def test_masks_are_read_as_their_cohort_says(tmp_path):
    "Stored the other way round than those of the training"
    masks = np.random.default_rng(0).integers(0, 3, (2,3,16,16))
    df = scans_of(tmp_path, masks, masks, stored=np.array([0,2,1]))
    df.attrs['labels'] = {'1':2, '2':1}
    learn = levels('ab')
    scores = evaluate_cohort(learn, df, progress=False)
    assert (scores.dice==1).all()
    plot_scans(learn, df, scores, out=tmp_path/'worst.png') # in which there is no error

def test_intensities_of_all_scans_of_a_subject(tmp_path):
    "Of those without a mask too; and what is finished is made again when another scan of the subject has changed"
    rng = np.random.default_rng(0)
    arrays,mask = [rng.uniform(0, 1, (3,16,16))*s for s in (1,3)],rng.integers(0, 2, (3,16,16))
    df,learn = scans_of(tmp_path, arrays, [mask,None], subjects=['s','s']),levels('a', per='subject')
    segmented = lambda folder: read_volume(tmp_path/folder/'v0.nii.gz').array
    predict_cohort(learn, df, tmp_path/'p', progress=False)
    scores = evaluate_cohort(learn, df, out=tmp_path/'e', progress=False)
    assert np.array_equal(segmented('p'), segmented('e')) and scores.dice[0]==dice(segmented('p')==1, mask==1)
    got = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ScanPicture, 'of', kept_in(got))
        plot_scans(learn, df, scores, out=tmp_path/'worst.png')
    assert np.array_equal(got[0].array, segmented('e'))
    calls = []
    def stop(*args):
        calls.append(args)
        if len(calls)==2: raise KeyboardInterrupt
        return ask_network(*args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(E, 'ask_network', stop)
        with pytest.raises(KeyboardInterrupt): predict_cohort(learn, df, tmp_path/'r', progress=False)
    write_volume(Volume((arrays[1]/3).astype(np.float32), (3.,1.,1.)), tmp_path/'v1.nii.gz')
    for folder in ('r','again'): predict_cohort(learn, df, tmp_path/folder, progress=False)
    assert np.array_equal(segmented('r'), segmented('again')) and segmented('r').sum()>segmented('p').sum()

def test_the_figure_shows_what_was_scored(tmp_path, monkeypatch):
    "With the largest piece of each class only"
    a = np.zeros((2,3,16,16), int)
    a[...,::4,::4] = a[...,4:9,4:9] = 1
    mask = np.zeros_like(a)
    mask[...,4:9,4:9] = 1
    df,got = scans_of(tmp_path, a, mask).assign(split='test'),[]
    monkeypatch.setattr(ScanPicture, 'of', kept_in(got))
    monkeypatch.setattr(R, '_load', lambda model: levels('a'))
    monkeypatch.setattr(R, 'plot_scores', lambda *args, **kw: None)
    (tmp_path/'a.safetensors').write_bytes(b'x')
    scores = R.evaluate_run(tmp_path/'a.safetensors', df, tmp_path/'out', largest=True, split=['test'], progress=False)
    assert (scores.dice==1).all() and all(np.array_equal(o.array, m) for o,m in zip(got, mask))

def test_scores_of_masks_that_were_corrected(tmp_path, monkeypatch):
    "Are not those that were there before; a copy of the same files has the same"
    masks = np.random.default_rng(0).integers(0, 2, (2,3,16,16))
    df = scans_of(tmp_path, masks, masks)
    monkeypatch.setattr(R, '_load', lambda model: levels('a'))
    (tmp_path/'a.safetensors').write_bytes(b'x')
    evaluate = lambda: R.evaluate_run(tmp_path/'a.safetensors', df, tmp_path/'out', overwrite=False, progress=False)
    evaluate()
    scans_of(tmp_path, masks, masks)
    assert (evaluate().dice==1).all()
    scans_of(tmp_path, masks, 1-masks)
    with pytest.raises(FileExistsError, match='exists, with other scores'): evaluate()

def test_copies_are_known_after_an_interruption(tmp_path, monkeypatch):
    arrays = np.random.default_rng(0).uniform(0, 1, (2,3,16,16))
    df,learn,calls = scans_of(tmp_path, arrays, [None,None]),levels('a'),[]
    seen = [short_digest(voxel_digest(read_volume(o))) for o in df.image]
    monkeypatch.setattr(E, 'training_scans', lambda learn: dict(voxels=seen))
    def stop(*args):
        calls.append(args)
        if len(calls)==2: raise KeyboardInterrupt
        return ask_network(*args)
    monkeypatch.setattr(E, 'ask_network', stop)
    with pytest.raises(KeyboardInterrupt): predict_cohort(learn, df, tmp_path/'out', progress=False)
    assert predict_cohort(learn, df, tmp_path/'out', progress=False).attrs['trained_on']==['v0','v1']

def test_what_is_finished_was_read_in_the_same_way(tmp_path, monkeypatch):
    "Of a file with two geometries; whose scan it is, and of which part, is what the cohort says now"
    arrays = np.random.default_rng(0).integers(0, 2, (2,3,16,16))
    df = scans_of(tmp_path, arrays, arrays)
    for f in tmp_path.glob('*.nii.gz'):
        im = nib.load(f)
        a = im.affine
        im.set_qform(a, 1)
        im.set_sform(a@np.diag([2,2,2,1]), 1)
        nib.save(im, f)
    def evaluate(form, part):
        parts = df.assign(split=part, **{k:[choose_volume(o, form=form) for o in df[k]] for k in ('image','mask')})
        return evaluate_cohort(levels('a'), parts, notes=tmp_path/'notes', split='all', progress=False)
    calls = []
    def stop(*args):
        calls.append(args)
        if len(calls)==2: raise KeyboardInterrupt
        return ask_network(*args)
    for form in ('qform','sform'):
        calls.clear()
        with monkeypatch.context() as m:
            m.setattr(E, 'ask_network', stop)
            with pytest.raises(KeyboardInterrupt): evaluate(form, 'valid')
    again = evaluate('sform', 'test')
    pd.testing.assert_frame_equal(again, evaluate('sform', 'test'))
    assert (again.split=='test').all() and again.diagonal.nunique()==1

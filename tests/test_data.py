"What the loaders may and may not touch, and what a learner carries away"
import gc, random, shutil
from pathlib import Path

import numpy as np, psutil, pytest, torch
from fastai.basics import Transform, first
from fastai.data.block import TransformBlock
from fastai.vision.core import TensorImage, TensorMask
from fastmiseg.scans.split import split_cohort
from fastmiseg.scans.phantom import make_phantom
from fastmiseg.scans.recipe import Recipe
from fastmiseg.data import MISegDataLoaders, SemiSupDataBlock
from fastmiseg.learner import miseg_learner
from fastmiseg.callback.mireg import MIRegCallback

@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    df = make_phantom(tmp_path_factory.mktemp('scans'), n_subjects=6, seed=0, size=(48,64), n_slices=(3,4))
    return split_cohort(df, labeled=2, valid=1, seed=0)

recipe = Recipe(spacing=(4.,4.), size=(32,32), classes=('background','RV','Myo','LV'), flip='hv', rotate=10., jitter=.2)
def loaders(df, store, **kw):
    return MISegDataLoaders.from_cohort(df, recipe, store=store, bs=2, unlabeled_bs=3, n_iters=2, workers=0, **kw)

def test_masks_of_unlabelled_scans_are_never_opened(cohort, tmp_path):
    df = cohort.copy()
    hidden = df['split']=='unlabeled'
    df.loc[hidden, 'mask'] = [str(tmp_path/f'{s}.nii.gz') for s in df.scan[hidden]] # no such files
    dls = loaders(df, tmp_path/'store')
    learn = miseg_learner(dls, width=2, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=MIRegCallback(n_heads=2, n_clusters=4))
    assert hidden.sum()==3 and len(dls.train.unlabeled)==dls.store.scans.query("split=='unlabeled'").n.sum()

def test_unlabelled_scans_given_to_the_callback(cohort, tmp_path):
    "As the message says that one may"
    dls = loaders(cohort[cohort['split']!='unlabeled'].reset_index(drop=True), tmp_path/'store')
    learn = miseg_learner(dls, width=2, path=tmp_path)
    more = list(cohort.image[cohort['split']=='unlabeled'])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=MIRegCallback(n_heads=2, n_clusters=4, unlabeled=more))
        with pytest.raises(ValueError, match='learn.predict is for one image.*predict_volume'): learn.predict(more[0])

def test_a_datablock_as_fastai_has_them(tmp_path):
    "Getters, items from a folder, blocks and transforms of fastai's; masks of unlabelled images are not there"
    from PIL import Image
    from fastai.vision.all import ImageBlock, MaskBlock, PILImageBW, Resize, aug_transforms, get_image_files
    from fastmiseg.data import SemiSupDataBlock
    for d in ('images','masks'): (tmp_path/d).mkdir()
    for i in range(9):
        y = np.zeros((40,36), np.uint8); y[8:20,4+i:16+i] = 1
        Image.fromarray(y*200).save(tmp_path/'images'/f'{i}.png')
        if i<5: Image.fromarray(y).save(tmp_path/'masks'/f'{i}.png')
    def parts(items):
        n = [int(o.stem) for o in items]
        return tuple([k for k,i in enumerate(n) if i in r] for r in (range(3), range(3,5), range(5,9)))
    block = SemiSupDataBlock(blocks=(ImageBlock(PILImageBW), MaskBlock(codes=['background','square'])),
                             get_items=get_image_files, get_y=lambda o: tmp_path/'masks'/o.name,
                             splitter=parts, item_tfms=Resize(32), batch_tfms=aug_transforms(max_lighting=0.))
    dls = block.dataloaders(tmp_path/'images', bs=2, unlabeled_bs=3, n_iters=2)
    assert ([tuple(o.shape) for o in dls.train.one_batch()]==[(2,1,32,32),(3,1,32,32),(2,32,32)]
            and [tuple(o.shape) for o in dls.valid.one_batch()]==[(2,1,32,32),(2,32,32)])
    assert [len(o) for o in dls.train.new(bs=1, unlabeled_bs=2).one_batch()]==[1,2,1]

def shown(dls, drawn):
    "For each labelled draw the classes that it shows, as the masks have them"
    refs = dls.train.dataset.items
    return [set(np.unique(dls.store.mask(refs[i].scan, refs[i].i)).tolist())-{0} for l,_ in drawn for i in l]

def test_draws_that_show_each_class_in_turn(cohort, tmp_path):
    make = lambda **kw: MISegDataLoaders.from_cohort(cohort, recipe, store=tmp_path/'store', workers=0,
                                                     **{**dict(bs=4, unlabeled_bs=3, n_iters=6), **kw})
    plain,dls = make(),make(foreground=.5)
    drawn = dls.train.get_idxs()
    # half of the places, evenly spread; RV, Myo, LV, RV, ...
    assert all(k%3+1 in o for k,o in enumerate(shown(dls, drawn)[1::2]))
    assert [u for _,u in drawn]==[u for _,u in plain.train.get_idxs()]
    assert [l[::2] for l,_ in drawn]==[l[::2] for l,_ in plain.train.get_idxs()]
    assert all(shown(make(foreground=1.), make(foreground=1.).train.get_idxs()))
    dls.train.epoch = 1
    assert dls.train.get_idxs()!=drawn
    other = make(foreground=.5, num_workers=1)
    other.train.epoch,other.train.first = 0,4
    dls.train.epoch = 0
    for a,b in zip(list(dls.train)[4:], other.train, strict=True): assert all(torch.equal(i,j) for i,j in zip(a,b))
    assert dls.train.new(bs=2).foreground==.5 and make(foreground=0).train.get_idxs()==plain.train.get_idxs()
    with pytest.raises(ValueError, match='foreground: got 2, expected a share of the images'): make(foreground=2)

def test_several_processes_draw_what_one_does(cohort, tmp_path, monkeypatch):
    make = lambda bs: MISegDataLoaders.from_cohort(cohort, recipe, store=tmp_path/'store', workers=0,
                                                   bs=bs, unlabeled_bs=bs, n_iters=5, foreground=1/3)
    together,alone = make(2),make(4).train.get_idxs()
    shares = []
    for rank in (0,1):
        monkeypatch.setattr('fastmiseg.loaders.processes', lambda rank=rank: (rank,2))
        shares.append(together.train.get_idxs())
    assert [(a[0]+b[0], a[1]+b[1]) for a,b in zip(*shares)]==alone

def test_draws_with_masks_that_are_read():
    "Any labelled items do; those that show nothing are drawn only at the other places, and nothing is no error"
    from toy import loaders as discs
    dls = discs(foreground=.5)
    assert [len(o) for o in dls.one_batch()]==[2,3,2] and dls.train.shows==[[1]]*4
    dls.train.shows = [[],[1],[],[2]]
    assert [i for l,_ in dls.train.get_idxs() for i in l[1::2]]==[1,3,1,3]
    dls.train.shows = [[]]*4
    assert dls.train.get_idxs()==discs().train.get_idxs()

def test_spacings_are_read_once_for_all_metrics_and_epochs(cohort, tmp_path, monkeypatch):
    from fastmiseg.scans.store import SliceStore
    valid,read,own = loaders(cohort, tmp_path/'store').valid,[],SliceStore.where
    monkeypatch.setattr(SliceStore, 'where', lambda self, scan: (read.append(scan), own(self, scan))[1])
    assert valid.spacings==valid.spacings and read==valid.scans==valid.new().scans

def test_what_slices_show_is_kept_with_them(cohort, tmp_path, monkeypatch):
    from fastmiseg.packed import PackedSlices, pack_slices
    from fastmiseg.scans.store import SliceStore
    make = lambda: SliceStore(tmp_path/'store', recipe).prepare(cohort, workers=0, progress=False)
    want = {s:[(set(np.unique(y).tolist())-{0}) for y in make().mask(s, slice(None))]
            for s in cohort.scan[cohort['split']=='labeled']}
    packed = pack_slices(cohort, recipe, tmp_path/'all.slices.npz', tmp_path/'store')
    assert all([set(o) for o in PackedSlices(packed).prepare(cohort).shows(s)]==o for s,o in want.items())
    draws = [MISegDataLoaders.from_cohort(cohort, recipe, store=o, workers=0, n_iters=3, foreground=.5).train.get_idxs()
             for o in (packed, tmp_path/'store')]
    assert draws[0]==draws[1]
    monkeypatch.setattr(SliceStore, 'mask', lambda *o: 1/0)
    store = make()
    assert {s:list(map(set, store.shows(s))) for s in want}==want and any(map(any, want.values()))

def test_a_cohort_alone_and_unlabelled_scans_from_elsewhere(cohort, tmp_path):
    "A folder of files, a folder with masks (which stay closed), a table and files: the same unlabelled slices"
    known,other = (cohort[o].reset_index(drop=True)
                   for o in (cohort['split']!='unlabeled', cohort['split']=='unlabeled'))
    for d in ('plain','both/images','both/masks'): (tmp_path/d).mkdir(parents=True)
    for r in other.itertuples():
        for d in ('plain','both/images'): shutil.copy(r.image, tmp_path/d)
        (tmp_path/'both/masks'/Path(r.image).name).write_text('no mask')
    make = lambda more: MISegDataLoaders.from_cohort(known, store=tmp_path/'store', unlabeled=more,
                                                     workers=0, n_iters=2)
    all_of = [make(o) for o in (tmp_path/'plain', str(tmp_path/'both'), other, list(other.image))]
    images = [torch.stack([o for o, in dls.train.unlabeled]) for dls in all_of]
    assert all(torch.equal(images[0], o) for o in images[1:]) and len(images[0])
    assert all(dls.recipe==Recipe.auto(cohort) for dls in all_of) and all_of[0].vocab==list(cohort.attrs['classes'])
    assert [len(o) for o in all_of[0].one_batch()]==[4,10,4]
    assert sum(len(x) for x, in all_of[0].test_dl(tmp_path/'plain'))==len(images[0])
    with pytest.raises(ValueError, match='image is in several parts|images are in several parts'):
        make(list(known.image))
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='empty: no known layout'): make(tmp_path/'empty')

def test_loaders_say_what_they_are(cohort, tmp_path):
    from toy import loaders as discs
    n = {k:len(cohort[cohort['split']==k]) for k in ('labeled','unlabeled','valid')}
    dls = loaders(cohort, tmp_path/'store')
    first_line,second,third = repr(dls).splitlines()
    assert (first_line.startswith(f"MISegDataLoaders: {n['labeled']} scans (")
            and f"{n['unlabeled']} scans (" in first_line and f"; {n['valid']} scans (" in first_line)
    assert second.startswith('batches of 2+3, 2 to an epoch, on ') and eval(third)==recipe
    assert (repr(discs()).splitlines()[0]
            =='MISegDataLoaders: 4 items with masks, 11 items without masks; 5 items for validation')
    assert repr(dls.new_empty())=='MISegDataLoaders without data'

def test_device_by_name(cohort, tmp_path):
    assert miseg_learner(loaders(cohort, tmp_path/'store').to('cpu'), width=2).arch['width']==2

def test_batch_transforms_that_look_at_a_batch(cohort, tmp_path):
    from fastai.data.transforms import Normalize
    dls = loaders(cohort, tmp_path/'store', augment=[Normalize()])
    x = dls.one_batch()[0]
    assert x.shape==(2,1,32,32) and abs(float(x.mean()))<2

def test_changes_of_slices_by_name(cohort, tmp_path):
    assert not any(loaders(cohort, tmp_path/'store', augment='light').recipe.shares.values())
    assert any(loaders(cohort, tmp_path/'store', augment='strong').recipe.shares.values())
    with pytest.raises(ValueError, match="Recipe: augment='none', expected 'light' or 'strong'"):
        loaders(cohort, tmp_path/'store', augment='none')

class Noise(Transform):
    split_idx = 0
    def encodes(self, x:TensorImage): return x+torch.rand(1)+random.random()+np.random.rand()

def test_item_transforms_that_draw():
    "Are the same in any number of workers, and in the rest of an epoch"
    blocks = [TransformBlock(type_tfms=lambda i: TensorImage(torch.full((1,4,4), float(i)))),
              TransformBlock(type_tfms=lambda i: TensorMask(torch.zeros(4,4).long()))]
    block = SemiSupDataBlock(blocks=blocks, splitter=lambda _: (range(4),range(4,9),range(9,20)), item_tfms=Noise())
    def batches(workers, begin=0):
        dl = block.dataloaders(list(range(20)), bs=2, unlabeled_bs=2, n_iters=5, num_workers=workers).train
        dl.first = begin
        return [torch.cat([o.as_subclass(torch.Tensor).flatten() for o in b]) for b in dl]
    want = batches(0)
    assert not torch.equal(want[0], want[1])
    for workers,begin in ((1,0), (2,0), (0,3), (2,3)):
        assert all(map(torch.equal, batches(workers, begin), want[begin:])), (workers, begin)

def test_no_subject_is_in_two_streams(cohort, tmp_path):
    dls = loaders(cohort, tmp_path/'store')
    scans = [{o.scan for o in ds.items} for ds in (dls.train.dataset, dls.train.unlabeled, dls.valid.dataset)]
    assert not (scans[0]&scans[1] or scans[0]&scans[2] or scans[1]&scans[2])
    assert set().union(*scans)==set(cohort.scan)

def test_an_exported_learner_carries_no_data(cohort, tmp_path):
    learn = miseg_learner(loaders(cohort, tmp_path/'store'), width=2, path=tmp_path)
    learn.export('model.pkl')
    blob = (tmp_path/'model.pkl').read_bytes()
    assert not any(s.encode() in blob for s in cohort.scan)
    x = torch.randn(2,1,32,32)
    from fastai.learner import load_learner
    back = load_learner(tmp_path/'model.pkl')
    assert torch.equal(back.model.eval()(x), learn.model.eval()(x)) and back.dls.recipe==recipe

def test_memory_stays_flat(cohort, tmp_path):
    dls = loaders(cohort, tmp_path/'store')
    def rss(): gc.collect(); return psutil.Process().memory_info().rss
    def draw(n):
        for _ in range(n): first(dls.train)
    draw(200); before = rss(); draw(1000)
    assert rss()-before < 20e6

def test_sizes_that_differ_are_named(cohort, tmp_path):
    with pytest.raises(ValueError, match='slices come in .* sizes'):
        MISegDataLoaders.from_cohort(cohort, Recipe(classes=recipe.classes), store=tmp_path/'store', workers=0)

def test_plain_validation_when_nothing_is_unlabelled(cohort, tmp_path):
    df = cohort.copy(); df.loc[df['split']=='unlabeled', 'split'] = 'labeled'
    dls = loaders(df, tmp_path/'store')
    assert len(dls.one_batch())==2
    learn = miseg_learner(dls, width=2, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        with pytest.raises(ValueError, match='there are no unlabelled images'): learn.fit(1, cbs=MIRegCallback())

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda(cohort, tmp_path):
    dls = loaders(cohort, tmp_path/'store').to('cuda')
    assert all(o.is_cuda for o in dls.one_batch())

@pytest.mark.parametrize('part', ['labeled','valid'])
def test_a_part_of_which_no_scan_can_be_used(hearts, tmp_path, part):
    "It is named before the training: it ended after an epoch, with 'float() argument must be a string'"
    df = hearts.df[hearts.df.split!='test'].reset_index(drop=True)
    bad = df.split==part
    df['image'] = [str(tmp_path/f'{i}.nii.gz') if o else f for i,(o,f) in enumerate(zip(bad, df.image))]
    for o in df.image[bad]: Path(o).write_bytes(b'no scan')
    said = (rf"^df: none of the {bad.sum()} scans whose split is '{part}' can be used, the first is "
            rf"'{df.scan[bad].iloc[0]}' \(.*; repair one, or give others this split")
    with pytest.raises(ValueError, match=said):
        MISegDataLoaders.from_cohort(df, hearts.recipe, hearts.root/'slices', workers=0, skip_bad=True)

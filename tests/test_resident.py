"Slices that stay on the device: the batches that reading would give, to the bit, in every order and from every place"
import gc, pickle
from types import SimpleNamespace

import numpy as np, pytest, torch
from fastai.basics import Transform
from fastmiseg import slices
from fastmiseg.augment import Augment
from fastmiseg.callback.guard import batch_items
from fastmiseg.data import SemiSupDataBlock
from fastmiseg.slices import SliceBlock, SliceMaskBlock, SliceRef

class Store:
    "Random slices, counting how often they are read"
    def __init__(self, scans=('a','b','c','d','e'), n=3, size=12):
        rng = np.random.default_rng(0)
        self.names,self.n,self.reads = scans,n,0
        self.recipe = SimpleNamespace(classes=('background','disc'))
        self.images = {s: rng.random((n,1,size,size), dtype=np.float32) for s in scans}
        self.masks = {s: rng.integers(0, 2, (n,size,size), dtype=np.uint8) for s in scans}
    def image(self, scan, i):
        self.reads += 1
        return self.images[scan][i]
    def mask(self, scan, i):
        if scan in 'de': raise AssertionError(f'the mask of {scan} is hidden')
        return self.masks[scan][i]
    def where(self, scan): return SimpleNamespace(slice_spacing=(1.,1.,1.))

def loaders(store=None, unlabeled=True, item_tfms=None, **kw):
    store = store or Store()
    refs = [SliceRef(s, i) for s in store.names for i in range(store.n)]
    parts = [[k for k,r in enumerate(refs) if r.scan in o] for o in ('ab','c','de')[:3 if unlabeled else 2]]
    block = SemiSupDataBlock(blocks=(SliceBlock(store), SliceMaskBlock(store)),
                             splitter=lambda _: parts, item_tfms=item_tfms,
                             batch_tfms=Augment(crop=(8,8), rotate=30., flip='hv', jitter=.3))
    return block.dataloaders(refs, **{**dict(bs=2, unlabeled_bs=3, n_iters=6, seed=3), **kw})

def same(a, b):
    for u,v in zip(a, b, strict=True):
        for i,j in zip(u, v, strict=True):
            assert type(i) is type(j) and i.dtype==j.dtype and i.stride()==j.stride() and torch.equal(i, j)
            assert i.__dict__.keys()==j.__dict__.keys()
            for k in i.__dict__: assert np.all(np.asarray(i.__dict__[k])==np.asarray(j.__dict__[k])), k
    return True

@pytest.mark.parametrize('unlabeled', [True,False])
@pytest.mark.parametrize('workers', [0,2])
def test_the_same_batches(unlabeled, workers):
    a,b = loaders(unlabeled=unlabeled),loaders(unlabeled=unlabeled, resident=True, num_workers=workers)
    for _ in range(2): same(list(a.train), list(b.train)) # two epochs
    same([a.train.one_batch()], [b.train.one_batch()])
    same(list(a.valid), list(b.valid))
    assert [y.scan.tolist() for _,y in b.valid]==[[0]*3] and b.valid.scans==['c'] and b.train._here and b.valid._here

def test_from_any_place():
    a,b = loaders(),loaders(resident=True)
    whole = list(a.train)
    for dl in (a.train, b.train): dl.epoch,dl.first = 0,4
    same(list(b.train), whole[4:])
    assert (b.train.epoch,b.train.first)==(1,0)
    assert batch_items(b.train, 5)==(list(loaders().train) and batch_items(b.train, 5))
    it,seen = iter(b.train),[]
    for i,o in enumerate(it):
        seen.append(batch_items(b.train, i))
    next(iter(a.train)) and list(a.train)
    assert all('labelled: ' in o and 'unlabelled: ' in o for o in seen)

def test_the_training_set_in_order_and_other_sizes():
    a,b = (loaders(resident=o) for o in (False,True))
    torch.manual_seed(0)
    want = list(a.train.new(shuffle=False, drop_last=False))
    torch.manual_seed(0)
    same(want, list(o:=b.train.new(shuffle=False, drop_last=False)))
    same(list(a.train.new(bs=1, unlabeled_bs=4)), list(b.train.new(bs=1, unlabeled_bs=4)))
    same(list(a.valid.new(bs=2, drop_last=True)), list(b.valid.new(bs=2, drop_last=True)))
    assert o.resident and b.valid.new(bs=2).resident

def test_each_slice_is_read_once():
    dls = loaders(store:=Store(), resident=True)
    for _ in range(3): list(dls.train)
    for _ in range(3): list(dls.valid)
    before = store.reads
    list(dls.train); list(dls.valid); dls.one_batch()
    assert store.reads==before

def test_on_a_cpu_only_if_asked_for():
    for kw,there in ((dict(),False), (dict(resident=False),False), (dict(resident=True),True)):
        dls = loaders(**kw)
        dls.one_batch()
        assert bool(dls.train._here)==there

def test_items_that_are_transformed_are_read():
    class Twice(Transform):
        def encodes(self, x:slices.SliceImage): return x*2
    a,b = (loaders(item_tfms=Twice, resident=o) for o in (False,True))
    same(list(a.train), list(b.train))
    assert not b.train._here

def test_memory_goes_with_the_loaders():
    gc.collect() # what earlier tests left
    before = len(slices._resident)
    dls = loaders(resident=True)
    dls.one_batch()
    assert len(slices._resident)==before+2
    pickle.dumps(dls.train.after_batch)
    del dls
    gc.collect()
    assert len(slices._resident)<=before

"""Prepared slices of ACDC in a form that is small enough to be carried to a machine without network,
and the loaders that read them there.

    python benchmarks/gpu_slices.py [DATA] FOLDER

DATA is the cohort (by default FASTMISEG_DATA); FOLDER gets slices.bin, masks.npz and index.json.

The recipe is the paper's; what is carried is the central part of each slice, as WebP of high quality:
the index says how much was cut off and how far the intensities are from those of the recipe. Scans of
the unlabelled part come without masks. Nothing of this belongs in the repository.
"""
import io, json, os, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from PIL import Image

def pack(data, folder, store=None, labeled=4, valid=20, test=30, seed=0, side=288, quality=90):
    "Prepare, cut, compress"
    from fastmiseg.scans.cohort import load_cohort
    from fastmiseg.scans.split import split_cohort
    from fastmiseg.scans.recipe import Recipe
    from fastmiseg.scans.store import SliceStore
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    df = split_cohort(load_cohort(data), labeled=labeled, valid=valid, test=test, seed=seed)
    recipe = Recipe.acdc()
    prepared = SliceStore(store or folder/'store', recipe).prepare(df, progress=False)
    index,blob,masks,off,outside = [],io.BytesIO(),{},[],0
    for k,r in enumerate(prepared.scans.itertuples()):
        x = prepared.image(r.scan, slice(None))[:,0]
        cut = tuple(slice((o-side)//2, (o+side)//2) for o in x.shape[1:])
        small,places = np.rint(x[:,*cut]*255).astype(np.uint8),[]
        for o in small:
            at = blob.tell()
            Image.fromarray(o).save(blob, 'WEBP', quality=quality, method=6)
            places.append([at, blob.tell()-at])
        back = np.stack([_read(blob.getvalue()[a:a+n]) for a,n in places]) if k<8 else small
        if k<8: off.append(np.abs(back/255-x[:,*cut]).mean())
        if r.mask and r.split!='unlabeled':
            y = prepared.mask(r.scan, slice(None))
            outside += int((y>0).sum()-(y[:,*cut]>0).sum())
            masks[str(k)] = y[:,*cut]
        index.append(dict(subject=r.subject, scan=r.scan, split=r.split, n=r.n, places=places,
                          spacing=list(map(float, prepared.where(r.scan).slice_spacing))))
    (folder/'slices.bin').write_bytes(blob.getvalue())
    np.savez_compressed(folder/'masks.npz', **masks)
    about = dict(side=side, quality=quality, recipe=recipe.to_dict(),
                 mean_difference=float(np.mean(off)), mask_pixels_cut_off=outside, scans=index)
    (folder/'index.json').write_text(json.dumps(about))
    return about

def _read(bytes): return np.asarray(Image.open(io.BytesIO(bytes)).convert('L'))

class Packed:
    "What was packed, read like a `SliceStore`"
    def __init__(self, folder):
        import pandas as pd
        from types import SimpleNamespace
        from fastmiseg.scans.recipe import Recipe
        folder = Path(folder)
        self.about = json.loads((folder/'index.json').read_text())
        self.recipe = Recipe(**{**self.about['recipe'], 'size':self.about['side']})
        blob,masks = (folder/'slices.bin').read_bytes(),np.load(folder/'masks.npz')
        self.images = {o['scan']: np.stack([_read(blob[a:a+n]) for a,n in o['places']])[:,None]
                       for o in self.about['scans']}
        self.masks = {o['scan']: masks[str(k)]
                      for k,o in enumerate(self.about['scans']) if str(k) in masks}
        self.scans = pd.DataFrame([{k:o[k] for k in ('subject','scan','split','n')}
                                   for o in self.about['scans']])
        self._where = {o['scan']: SimpleNamespace(slice_spacing=tuple(o['spacing']))
                       for o in self.about['scans']}

    def image(self, scan, i): return self.images[scan][i].astype(np.float32)/np.float32(255)
    def mask(self, scan, i): return self.masks[scan][i]
    def where(self, scan): return self._where[scan]

def loaders(store, parts, augment=True, bs=4, unlabeled_bs=10, n_iters=300, val_bs=32, seed=0,
            device=None, path='.', resident=None):
    """Loaders of `store` for the splits (labelled, scored, unlabelled) in `parts`; a part may name
    several splits"""
    from fastmiseg.augment import Augment
    from fastmiseg.data import SemiSupDataBlock
    from fastmiseg.slices import SliceBlock, SliceMaskBlock, SliceRef
    refs = [(SliceRef(r.scan, i), r.split) for r in store.scans.itertuples() for i in range(r.n)]
    split = np.array([s for _,s in refs])
    block = SemiSupDataBlock(
        blocks=(SliceBlock(store), SliceMaskBlock(store)),
        batch_tfms=Augment.from_recipe(store.recipe) if augment else None,
        splitter=lambda _: [np.flatnonzero(np.isin(split, k)).tolist() for k in parts])
    dls = block.dataloaders(
        [r for r,_ in refs], path=path, bs=bs, unlabeled_bs=unlabeled_bs, n_iters=n_iters,
        val_bs=val_bs, seed=seed, device=device, resident=resident)
    dls.recipe,dls.store = store.recipe,None
    dls.vocab,dls.c = list(store.recipe.classes),len(store.recipe.classes)
    return dls

class Discs:
    "A store of discs on noise, where there is nothing else"
    def __init__(self, size=32, n=3):
        import pandas as pd
        from types import SimpleNamespace
        from fastmiseg.scans.recipe import Recipe
        rng = np.random.default_rng(0)
        self.recipe = Recipe(size=size, crop=size, classes=('background','a','b','c'),
                             flip='hv', rotate=45., jitter=.3)
        self.scans = pd.DataFrame(
            [dict(subject=f's{k}', scan=f's{k}', split=s, n=n)
             for k,s in enumerate(['labeled']*2+['valid']*2+['test']*2+['unlabeled']*3)])
        g = np.mgrid[:size,:size]-size/2
        self.images,self.masks = {},{}
        for o in self.scans.scan:
            r = np.hypot(*(g+rng.uniform(-size/8, size/8, 2)[:,None,None]))
            y = np.select([r<size/8, r<size/5, r<size/3], [1,2,3], 0).astype(np.uint8)
            self.masks[o] = np.stack([y]*n)
            self.images[o] = np.clip(.2+.2*self.masks[o]+.1*rng.standard_normal((n,size,size)),
                                     0, 1).astype(np.float32)[:,None]
        self._where = SimpleNamespace(slice_spacing=(10.,1.,1.))
    def image(self, scan, i): return self.images[scan][i]
    def mask(self, scan, i): return self.masks[scan][i]
    def where(self, scan): return self._where

class Noise(Discs):
    "The same in any size, with noise for images, for timing"
    def __init__(self, size, crop, n=8):
        super().__init__(size=16, n=n)
        self.recipe = replace(self.recipe, size=size, crop=crop)
        rng = np.random.default_rng(0)
        self.images = {o: rng.random((n,1,size,size), dtype=np.float32) for o in self.images}
        self.masks = {o: rng.integers(0, 4, (n,size,size), dtype=np.uint8) for o in self.masks}

if __name__=='__main__':
    data,folder = sys.argv[1:3] if len(sys.argv)>2 else (os.environ['FASTMISEG_DATA'],sys.argv[1])
    about = pack(data, folder, store=os.environ.get('FASTMISEG_STORE'))
    print({k:v for k,v in about.items() if k not in ('scans','recipe')},
          {o.name:o.stat().st_size for o in Path(folder).iterdir() if o.is_file()})

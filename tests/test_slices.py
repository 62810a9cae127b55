"""Any scan to slices and back: random geometries, recipes and orientations, against SimpleITK and scipy"""
import itertools, json, os, shutil
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, pytest
import SimpleITK as sitk
from hypothesis import given, settings, strategies as st
from scipy.ndimage import map_coordinates

from toy import peak_of

from fastmiseg.data import MISegDataLoaders
from fastmiseg.packed import PackedSlices, pack_slices
from fastmiseg.preparing import Preparation
from fastmiseg.inference import ScanAnswer
from fastmiseg.scans.cohort import load_cohort, save_cohort, voxel_digest
from fastmiseg.scans.layout import CohortError
from fastmiseg.scans.masks import class_indices
from fastmiseg.scans.placement import Placement, _warp, orient, world_axes
from fastmiseg.scans.profile import _orientation, _some, scan_profile, summarise_profiles
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.messages import VolumeError
from fastmiseg.scans.split import split_cohort
from fastmiseg.scans.store import SliceStore
from fastmiseg.scans.volume import Volume, read_volume, resample, write_volume

quick = settings(max_examples=60, deadline=None)
codes = [''.join(o) for p in itertools.permutations(('LR','PA','SI')) for o in itertools.product(*p)]

@st.composite
def rotations(draw):
    "Direction cosines: a random tilt of a random order and sign of the axes"
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    q,_ = np.linalg.qr(np.eye(3)+draw(st.sampled_from([0,.05,.15]))*rng.normal(size=(3,3)))
    return (q*np.sign(np.diag(q)))[:,rng.permutation(3)]*rng.choice([-1,1], 3)

@st.composite
def scans(draw, smallest=1):
    shape = tuple(draw(st.integers(smallest, 14)) for _ in range(3))
    spacing = tuple(draw(st.sampled_from([.5,.7,1.,1.2,2.,5.])) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    a = rng.normal(size=shape).astype(np.float32)
    a.flat[0] += 5
    return Volume(a, spacing, tuple(rng.normal(size=3)*50), tuple(draw(rotations()).ravel()), 'scan.nii.gz')

recipes = st.builds(lambda kw: Recipe(percentiles=(0,100), **kw), st.fixed_dictionaries(dict(
    spacing=st.sampled_from([None, .5, 1., (1.3,.9), 3.]), size=st.sampled_from([None, 16, (7,24), 5]),
    axis=st.sampled_from([0,1,2,'auto']),
    orientation=st.sampled_from([None,'LPS','RAS','IRP']))))
resizing = st.builds(lambda size, axis: Recipe(size=size, fit='resize', axis=axis),
                     st.sampled_from([16, (7,24)]), st.sampled_from([0,'auto']))

@quick
@given(rotations(), st.sampled_from(codes))
def test_orientation_is_simpleitks(d, code):
    a = np.random.default_rng(0).integers(0, 999, (3,4,5)).astype(np.int16)
    order,flip = orient(tuple(d.ravel()), code)
    im = sitk.DICOMOrient(Volume(a, direction=tuple(d.ravel())).to_sitk(), code)
    assert np.array_equal(np.flip(a.transpose(order), [i for i,f in enumerate(flip) if f]), sitk.GetArrayFromImage(im))

@quick
@given(st.floats(.3, 3), st.floats(.3, 3), st.floats(-4, 4), st.floats(-4, 4))
def test_warp_is_linear_interpolation(sr, sc, orow, ocol):
    a = np.random.default_rng(0).normal(size=(2,9,11))
    scale,shift,size = (min(sr, 1), min(sc, 1)),(orow,ocol),(8,13)          # coarser grids also average
    out = _warp(a, scale, shift, size, fill=-9)
    r,c = (s*np.arange(n)+o for s,o,n in zip(scale, shift, size))
    want = np.stack([map_coordinates(p, np.meshgrid(r, c, indexing='ij'), order=1, mode='nearest') for p in a])
    inside = ((r>-.5+1e-6)&(r<8.5-1e-6))[:,None]&((c>-.5+1e-6)&(c<10.5-1e-6))
    outside = ((r<-.5-1e-6)|(r>8.5+1e-6))[:,None]|((c<-.5-1e-6)|(c>10.5+1e-6))
    assert np.allclose(out[:,inside], want[:,inside], atol=1e-5) and (out[:,outside]==-9).all()

@quick
@given(scans(), st.sampled_from([0,1,2,'auto']), st.sampled_from([None,*codes[::5]]), st.integers(0, 9))
def test_without_interpolation_the_way_back_is_exact(vol, axis, code, pad):
    r = Recipe(axis=axis, orientation=code)
    where = r.place(vol)
    if pad: where = replace(r, size=tuple(n+pad for n in where.size)).place(vol)
    lab = np.random.default_rng(1).integers(0, 4, vol.shape)
    assert np.array_equal(where.inverse(where.forward(lab.astype(np.uint8), nearest=True)), lab)
    assert np.array_equal(where.inverse(where.forward(vol.array)), vol.array)
    onehot = np.eye(4, dtype=np.float32)[where.forward(lab.astype(np.uint8), nearest=True)].transpose(0,3,1,2)
    assert np.array_equal(where.inverse(onehot), np.eye(4)[lab].transpose(3,0,1,2))
    assert where.covers(lab) and where.volume(lab).spacing==vol.spacing

@quick
@given(scans(2), st.one_of(recipes, resizing))
def test_what_comes_out_fits(vol, r):
    x,where = r.slices(vol)
    assert (x.dtype==np.float32 and x.shape==(where.n,1,*where.size)
            and (not r.size or where.size==r.size) and 0<=x.min()<=x.max()<=1)
    assert Placement.from_dict(json.loads(json.dumps(where.to_dict())))==where
    y = r.masks(vol.like((vol.array>0).astype(np.float32)), where)
    assert y.shape==x[:,0].shape and y.dtype==np.uint8
    assert (where.inverse(y).shape==vol.shape and where.inverse(y).dtype==np.uint8
            and where.inverse(x.astype(np.float16)).dtype==np.float16)
    p = where.inverse(np.stack([1.-y, y], 1))
    assert p.shape==(2,*vol.shape) and np.allclose(p.sum(0), 1, atol=1e-5)
    if r.spacing: assert np.allclose(where.slice_spacing[1:], r.spacing, rtol=1e-4)

@quick
@given(scans(4), recipes, st.integers(0, 99))
def test_intensities_lie_where_they_are_in_the_patient(vol, r, seed):
    "An image that is linear in millimetres: after whatever a recipe does, each pixel holds the value of its place"
    g = np.random.default_rng(seed).normal(size=3)
    world = lambda zyx: (np.array(vol.origin)
                         + (zyx*np.array(vol.spacing))[...,::-1]@np.array(vol.direction).reshape(3,3).T)
    ramp = world(np.stack(np.meshgrid(*map(np.arange, vol.shape), indexing='ij'), -1).astype(float))@g
    r = replace(r, window=(float(ramp.min())-1, float(ramp.max())+1))
    x,where = r.slices(vol.like(ramp.astype(np.float32)))
    ijk = np.stack(np.meshgrid(*map(np.arange, (where.n, *where.size)), indexing='ij'), -1).astype(float)
    ijk[...,1:] = ijk[...,1:]*where.scale+where.shift
    n = np.array([vol.shape[o] for o in where.order])
    # coarser grids average: not linear at the border
    margin = np.array([0, *(max(0, s-1)*2 for s in where.scale)])
    inside = ((ijk>=margin)&(ijk<=n-1-margin)).all(-1)
    zyx = np.empty_like(ijk)
    for i,(o,f) in enumerate(zip(where.order, where.flip)): zyx[...,o] = n[i]-1-ijk[...,i] if f else ijk[...,i]
    lo,hi = r.window
    assert np.abs(x[:,0]*(hi-lo)+lo-world(zyx)@g)[inside].max(initial=0) < 2e-3*(hi-lo)
    if r.size: return
    centre = (np.array(where.size)-1)/2*where.scale+where.shift             # the field of view keeps its centre
    assert np.allclose(centre, (n[1:]-1)/2)

def blob(n, spacing, seed=0):
    z,y,x = np.meshgrid(*[(np.arange(k)-(k-1)/2)*s for k,s in zip(n, spacing)], indexing='ij')
    rng = np.random.default_rng(seed)
    d = lambda: np.sqrt((z/40-rng.uniform(-.2,.2))**2+(y/22-rng.uniform(-.4,.4))**2+(x/18-rng.uniform(-.4,.4))**2)
    return np.where(d()<1, 1, np.where(d()<1.1, 2, 0)).astype(np.uint8)

@pytest.mark.parametrize('scan_mm, recipe_mm', [
    (1., 1.), (1., .7), (1.56, 1.25), (1.95, 1.), (.8, .8), (1.3, .65), (2., 1.7)])
@pytest.mark.parametrize('tilt', [0, 31])
def test_round_trip_of_masks(scan_mm, recipe_mm, tilt):
    "Dice at least 0.97 where the recipe's spacing is no coarser than the scan's"
    c,s = np.cos(np.deg2rad(tilt)),np.sin(np.deg2rad(tilt))
    spacing = (6.,scan_mm,scan_mm)
    mask = Volume(blob((11,81,75), spacing), spacing, (9.,-4.,30.), (c,-s,0, s,c,0, 0,0,1))
    r = Recipe(spacing=recipe_mm, size=288, classes=('background','a','b'))
    where = r.place(mask)
    back = where.inverse(r.masks(mask, where))
    soft = where.inverse(np.eye(3, dtype=np.float32)[r.masks(mask, where)].transpose(0,3,1,2)).argmax(0)
    for k in (1,2):
        for o in (back, soft): assert 2*np.sum((o==k)&(mask.array==k))/(np.sum(o==k)+np.sum(mask.array==k)) >= .97

def test_resize_covers_the_field_of_view():
    mask = Volume(blob((8,120,90), (4,.5,.5)), (4,.5,.5))
    r = Recipe(size=(256,256), fit='resize', classes=('background','a','b'))
    where = r.place(mask)
    assert np.array_equal(where.inverse(r.masks(mask, where))>0, mask.array>0) and where.covers(np.ones(mask.shape))

def test_single_slices_are_slices():
    a = np.random.default_rng(0).normal(size=(40,1,30))
    for spacing in ((1,1,1),(1,5,1),(5,1,1)): assert Recipe().slices(Volume(a, spacing))[0].shape==(1,1,40,30)
    assert Recipe(axis=0).slices(Volume(a))[0].shape==(40,1,1,30)

def test_nearly_empty_scans_fall_back_to_minimum_and_maximum():
    a = np.zeros((4,20,20), np.int16); a[1,3,3] = 900
    x,_ = Recipe().slices(Volume(a))
    assert x.max()==1 and x.sum()==1

def test_outliers_do_not_matter_and_types_do_not_either():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 200, (5,30,30))
    x = Recipe().slices(Volume(a.astype(np.uint8)))[0]
    for t in (np.int16, np.int32, np.float32, np.float64, np.uint16):
        assert np.allclose(Recipe().slices(Volume(a.astype(t)))[0], x, atol=1e-6)
    wild = a.astype(np.float64); wild[0,0,:3] = 1.7e306
    assert np.abs(Recipe().slices(Volume(wild))[0]-x).mean()<.01

@pytest.mark.parametrize('kw, text', [
    (dict(spacing=-1), 'spacing=(-1.0, -1.0), expected two positive numbers of mm'),
    (dict(percentiles=(99,1)), 'percentiles=(99.0, 1.0), expected (lower, upper)'),
    (dict(percentiles=(.01,.99)), 'percentiles=(0.01, 0.99), expected (lower, upper) in percent'),
    (dict(per='patient'), "per='patient', expected 'scan' or 'subject'"),
    (dict(classes=()), 'classes=(), expected 1 to 256 names'),
    (dict(channels=0), 'channels=0, expected at least 1'),
    (dict(flip='x'), "flip='x', expected 'h', 'v', 'hv'"),
    (dict(rotate=-5), 'rotate=-5.0, expected degrees'),
    (dict(jitter=2), 'jitter=2.0, expected a strength'),
    (dict(fit='pad'), "fit='pad', expected 'crop'")])
def test_what_a_recipe_refuses(kw, text):
    with pytest.raises(ValueError) as e: Recipe(**kw)
    assert text in str(e.value)

# -- large scans -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('code', ['LPS','RAI','SLP','ISA'])
@pytest.mark.parametrize('axis', [0,2])
def test_slices_a_few_at_a_time_are_those_of_the_whole_scan(code, axis, monkeypatch):
    direction = np.zeros((3,3))
    for i,o in enumerate(code): direction[world_axes[o][0],i] = world_axes[o][1]
    rng = np.random.default_rng(axis)
    vol = Volume(rng.integers(-900, 900, (40,50,45)).astype(np.int16), (1.,.9,1.3), direction=tuple(direction.ravel()))
    r = Recipe(size=(40,32), spacing=1.7, axis=axis, classes=('a','b','c'))
    where = r.place(vol)
    p = rng.random((where.n,3,40,32), dtype=np.float32)
    found,every = [],Placement.parts
    for most in (where.n, 7):
        monkeypatch.setattr(Placement, 'parts', lambda self: every(self, most))
        found.append((r.slices(vol)[0], ScanAnswer(p, where, r).classes()))
    for a,b in zip(*found): assert np.array_equal(a, b)

def test_a_large_scan_takes_little_more_memory_than_its_voxels():
    "No copy of it in floats, of 4 bytes a voxel, and no counts of 8"
    vol = Volume(np.random.default_rng(0).integers(-900, 900, (300,80,80)).astype(np.int16), (1.,1.,1.))
    r = Recipe(size=16, spacing=5, window=(-100,100), classes=('a','b'))
    where,mask = r.place(vol),(vol.array>0).astype(np.uint8)
    p = np.random.default_rng(0).random((where.n,2,16,16), dtype=np.float32)
    for most,f in ((4, lambda: r.slices(vol)), (4, ScanAnswer(p, where, r).classes), (2, lambda: voxel_digest(vol)),
                   (4, lambda: class_indices(mask, 'mask', 2, None))):
        assert peak_of(f) < most*vol.array.size

# -- Recipe.auto -------------------------------------------------------------------------------------------------------

def cohort(root, n=4, ct=False, spacing=lambda i: (6.,1.2+.1*i,1.2+.1*i), values=(0,1,2)):
    rows = []
    for i in range(n):
        s = spacing(i)
        m = blob((8,60,50), (8.,1.2,1.2), i)
        img = np.random.default_rng(i).normal(size=m.shape)*20+np.array([0,90,140])[m]
        if ct: img[:,:6] = -1000
        rows.append(dict(subject=f'p{i}', scan=f's{i}', split=('labeled','unlabeled','valid','test')[i%4],
                         image=str(write_volume(Volume(img.astype(np.int16), s), root/f'{i}.nii.gz')),
                         mask=str(write_volume(Volume(np.array(values, np.int16)[m], s), root/f'{i}_m.nii.gz'))))
    return pd.DataFrame(rows)

def test_auto_proposes_what_fits(tmp_path):
    df = cohort(tmp_path)
    for o in df['mask'][1:]: os.remove(o)                                   # only a labelled scan's mask may be opened
    for o in df.image[2:]: os.remove(o)                                     # only training scans are looked at
    r = Recipe.auto(df)
    assert eval(repr(r))==r
    assert ((r.spacing, r.size, r.axis, r.window, r.percentiles, r.classes, r.labels)
            ==((1.25,1.25), (64,64), 0, None, (1.,99.), ('background','class1','class2'), None))
    df.attrs.update(classes=('background','ball','shell'), labels={205:1, 420:2})
    assert (Recipe.auto(df).classes, Recipe.auto(df).labels)==(('background','ball','shell'), {205:1, 420:2})

@pytest.mark.parametrize('names, flip', [
    (('left kidney','right kidney'), ''), (('Kidney_L','Kidney_R'), ''), (('LeftLung','RightLung'), ''),
    (('kidneyL','kidneyR'), ''), (('LKidney','RKidney'), ''), (('ctx-lh-insula','ctx-rh-insula'), ''),
    (('kidney_left','right_kidney'), ''), (('Kidney L','rightkidney'), ''), (('R 7th rib','rib-7th-L'), ''),
    (('LV','RV'), 'h'), (('RV','Myo','LV'), 'h'), (('LVmyo','RVmyo'), 'h'), (('bright','dark'), 'h'),
    (('left atrium','LV'), 'h'), (('left kidney','right lung'), 'h'), (('left and right lung','heart'), 'h')])
def test_auto_mirrors_no_pair(tmp_path, names, flip):
    assert Recipe.auto(cohort(tmp_path), classes=('background',*names)).flip==flip

def test_auto_maps_odd_values_and_sees_ct(tmp_path):
    r = Recipe.auto(cohort(tmp_path, ct=True, values=(0,205,420)))
    assert r.labels=={0:0, 205:1, 420:2} and -20<=r.window[0]<=60 and 150<=r.window[1]<=210
    df = cohort(tmp_path, ct=True)
    assert Recipe.auto(df.drop(columns='mask')).window==(-160.,240.)

def test_auto_looks_at_the_few_that_are_annotated(tmp_path):
    "Wherever they are among the others, as many as there are up to half of those that it reads"
    df = cohort(tmp_path, ct=True, values=(0,1,5))
    usual = Recipe.auto(df)
    for at in (1,77,150):
        many = pd.concat([df[1:2]]*at + [df[:1]] + [df[1:2]]*(150-at), ignore_index=True)
        found = Recipe.auto(many, max_scans=8)
        assert (found.labels, found.window)==({0:0, 1:1, 5:2}, usual.window)
    for own,others,n,want in ((3,100,8,(3,5)), (100,3,8,(5,3)), (100,100,8,(4,4)), (2,1,64,(2,1)), (0,9,4,(0,4)),
                              (9,0,4,(4,0)), (1,1,1,(1,0))):
        places = _some([True]*own+[False]*others, n)
        assert len({*places})==len(places) and ((places<own).sum(), (places>=own).sum())==want

def test_auto_mirrors_left_and_right_only(tmp_path):
    for spacing,axis,flip in (((6.,1.,1.), 0, 'h'), ((1.,6.,1.), 1, 'h'), ((1.,1.,6.), 2, '')):
        r = Recipe.auto(cohort(tmp_path, n=2, spacing=lambda i: spacing))
        assert (r.axis, r.flip)==(axis, flip)

def test_auto_of_mixed_and_bad_scans(tmp_path):
    df = cohort(tmp_path, spacing=lambda i: (6.,1.,1.) if i else (1.,6.,1.))
    assert Recipe.auto(df).axis=='auto'
    Path(df.image[0]).write_bytes(b'no scan')
    assert Recipe.auto(df).axis==0
    with pytest.raises(VolumeError, match='0.nii.gz'): Recipe.auto(df[:1])
    with pytest.raises(ValueError, match='no training scans'): Recipe.auto(df[2:])

def test_auto_of_a_given_size_holds_what_it_would_hold_anyway(tmp_path):
    df = cohort(tmp_path)
    usual,small = Recipe.auto(df),Recipe.auto(df, size=(32,40))
    assert (small.size==(32,40) and small.spacing[0]>usual.spacing[0]
            and np.isclose(*(r.spacing[0]/r.spacing[1] for r in (usual,small)), atol=.01))
    for o in df.image[:2]: assert small.place(read_volume(o)).share>.98     # the field of view, but for half a pixel
    assert Recipe.auto(df, size=256).spacing==usual.spacing                 # nothing is made finer
    assert (Recipe.auto(df, spacing=2).spacing, Recipe.auto(df, spacing=2).size)==((2.,2.), (48,32))
    assert (Recipe.auto(df, spacing=2, size=24).spacing, Recipe.auto(df, spacing=2, size=24).size)==((2.,2.), (24,24))
    assert Recipe.auto(df, augment='strong')==Recipe(**{**usual.to_dict(), 'augment':'strong'})
    with pytest.raises(ValueError, match=r'Recipe: size=\(0, 0\), expected two'): Recipe.auto(df, size=0)

def test_auto_with_names(tmp_path):
    df = cohort(tmp_path, values=(0,205,420))
    r = Recipe.auto(df, classes=('background','ball','shell'))
    assert (r.classes, r.labels)==(('background','ball','shell'), {0:0, 205:1, 420:2})
    with pytest.raises(ValueError, match=r'classes: 2 names \(a, b\) for 3 values in the masks \(0, 205, 420\)'):
        Recipe.auto(df, classes=('a','b'))
    df.attrs.update(classes=('background','x','y'), labels={205:1, 420:2})
    named = Recipe.auto(df, classes=('bg','ball','shell'))
    assert (named.classes, named.labels)==(('bg','ball','shell'), {205:1, 420:2})

def test_paths_that_are_no_text(tmp_path):
    "Are masks all the same: for a recipe, and where slices are packed"
    df = cohort(tmp_path)
    paths = df.assign(image=df.image.map(Path), mask=df['mask'].map(Path))
    r = Recipe.auto(df)
    assert Recipe.auto(paths)==r and len(r.classes)==3
    files = [pack_slices(o, r, tmp_path/f'{k}.slices.npz', tmp_path/'store') for k,o in enumerate((df,paths))]
    a,b = map(PackedSlices, files)
    pd.testing.assert_frame_equal(a.cohort, b.cohort)
    assert b.cohort['mask'].notna().all() and b.prepare(paths).scans['mask'].notna().tolist()==[True,False,True,True]

def test_packed_slices_keep_what_the_cohort_knows(tmp_path):
    df = cohort(tmp_path)
    df.attrs.update(classes=('background','ball','shell'), named=True, channels=1)
    packed = PackedSlices(pack_slices(df, Recipe.auto(df), tmp_path/'a.slices.npz', tmp_path/'store'))
    assert packed.cohort.attrs=={'labels':None, **df.attrs}

def test_packed_slices_of_one_image_are_not_in_two_parts(tmp_path):
    "As where the scans are at hand: `split_cohort` cannot compare images that are not there"
    df = cohort(tmp_path)
    df.loc[2,'image'] = str(shutil.copy(df.image[3], tmp_path/'again.nii.gz'))
    df.loc[2,'mask'] = df['mask'][3]
    r = Recipe.auto(df)
    packed = PackedSlices(pack_slices(df, r, tmp_path/'a.slices.npz', tmp_path/'store'))
    split = packed.cohort.assign(split=['labeled','unlabeled','labeled','valid'])
    for opened,d in ((packed,split), (SliceStore(tmp_path/'store', r),df.assign(split=split.split))):
        with pytest.raises(CohortError, match='1 image is there under several names, in several parts'):
            opened.prepare(d)
    assert len(packed.prepare(split.assign(split=['valid','unlabeled','labeled','labeled'])).scans)==4
    split.attrs['straddle'] = True
    assert len(packed.prepare(split).scans)==4

@pytest.mark.parametrize('shape', [(3126,64,64),(64,3126,64),(64,64,3126)])
def test_a_profile_sees_every_row_and_column(shape):
    "Where every n-th voxel is looked at, and n divides the length of a row"
    where = Recipe(axis=0).place(Volume(np.broadcast_to(np.int16(0), shape)))
    for axis in range(3):
        a = np.full(shape, 40, np.int16)
        np.moveaxis(a, axis, 0)[:shape[axis]//4] = -1000
        assert scan_profile(Volume(a), where)['level']==[[-1000,40,40]]

def test_a_whole_field_of_view_has_its_border_on_coarse_slices_too():
    for h,spacing,size in itertools.product((2,7,9,10,11,13,24), (.7,1.,1.5,2.,2.7,3.,4.), (None,3,4,8)):
        vol = Volume(np.zeros((2,h,10), np.float32), (3.,1.,1.))
        part,where = (Recipe(spacing=spacing, size=size, axis=0).place(vol, whole=o) for o in (False,True))
        assert where.inverse(np.ones((2,*where.size), np.uint8)).all()
        if part.inverse(np.ones((2,*part.size), np.uint8)).all(): assert where.size==part.size

def test_names_that_are_given_for_odd_values(tmp_path):
    "As the command line has them: the cohort knows them too, but not what is stored"
    df = cohort(tmp_path, values=(0,255,255))
    df.attrs['classes'] = given = ('background','ball')
    assert (Recipe.auto(df, classes=given).classes, Recipe.auto(df, classes=given).labels)==(given, {0:0, 255:1})
    assert Recipe.auto(df).labels is None                                   # a layout's own names are for its values
    df = cohort(tmp_path, values=(0,1,3))
    for attrs in ({}, dict(classes=('background','a','b','c'))):
        df.attrs = attrs
        assert Recipe.auto(df, classes=['background','a','b','c']).labels is None
    df.attrs['classes'] = ('background','a')
    assert Recipe.auto(df, classes=('background','a')).labels is None       # who prepares names the masks with a 3

def test_more_names_than_odd_values(tmp_path):
    "Which value has no name of its own is not guessed, whoever gives the names; `labels` says it"
    df,given = cohort(tmp_path, values=(0,100,300)),('background','one','two','three')
    say = (r'classes: 4 names \(background, one, two, three\) for 3 values in the masks \(0, 100, 300\), for example '
           r'in .*0_m.nii.gz; name each value, background first, or say with `labels`')
    for attrs in ({}, dict(classes=given), dict(classes=given, named=True)):
        df.attrs = attrs
        with pytest.raises(ValueError, match=say): Recipe.auto(df, classes=given)
    df.attrs = dict(classes=given, labels={100:1, 300:3})
    assert (Recipe.auto(df).classes, Recipe.auto(df).labels)==(given, {100:1, 300:3})

def test_names_given_to_load_cohort_are_for_the_values_that_are_there(tmp_path, capsys):
    "As those of the command line are; a split and a CSV file keep them"
    table,given = cohort(tmp_path, values=(0,255,255)).drop(columns='split'),('background','ball')
    df = split_cohort(load_cohort(table, classes=given), labeled=2, valid=1, test=1)
    saved = load_cohort(save_cohort(df, tmp_path/'split.csv'))
    dls = MISegDataLoaders.from_cohort(saved, store=tmp_path/'store', workers=0)
    for r in (Recipe.auto(df), Recipe.auto(saved), Recipe.named('auto', load_cohort(saved)), dls.recipe):
        assert (r.classes, r.labels)==(given, {0:0, 255:1})

def test_a_recipe_without_classes_takes_the_cohorts(tmp_path):
    df = cohort(tmp_path, values=(0,205,420))
    df.attrs.update(classes=('background','ball','shell'), labels={205:1, 420:2})
    for r in (Recipe.named(Recipe(size=32), df), Recipe(size=32).for_cohort(df)):
        assert (r.classes, r.labels, r.size)==(('background','ball','shell'), {205:1, 420:2}, (32,32))
    for kw in (dict(classes=('background','a','b')), dict(labels={205:1, 420:1})):
        assert Recipe.named(Recipe(**kw), df)==Recipe(**kw)

def test_auto_takes_the_scans_own_axes_where_lps_would_turn_them_differently(tmp_path):
    "Hearts across their axis lie near 45 degrees; some are stored turned or mirrored, as other programs write them"
    def made(name, directions):
        df = cohort(tmp_path/name)
        for f,m,d in zip(df.image, df['mask'], directions):
            for o in (f, m): write_volume(replace(read_volume(o), direction=tuple(np.ravel(d))), o)
        return df,Recipe.auto(df.assign(split='labeled'))
    def turned(degrees):
        c,s = np.cos(np.radians(degrees)),np.sin(np.radians(degrees))
        return np.array([[c,-s,0],[s,c,0],[0,0,1.]])
    def tilt(df, r):
        profiles = [scan_profile(v := read_volume(o), r.place(v)) for o in df.image]
        return max(summarise_profiles(profiles)['tilt'])
    sagittal = np.array([[0,0,1.],[1,0,0],[0,1,0]])
    mirrored,quarter = np.diag([1,-1,-1]),turned(90)
    for name,directions,axis,flip in (
        ('oblique', [turned(o) for o in (40,44,46,50)], 0, 'h'),
        ('stored', [turned(40), turned(44)@mirrored, turned(46), turned(50)@quarter], 0, 'h'),
        ('sagittal', [sagittal@turned(o) for o in (40,44,46,50)], 0, '')):
        df,r = made(name, directions)
        assert len(r.orientation)==9 and (r.axis, r.flip)==(axis, flip), name
        assert tilt(df, r)<8<40<tilt(df, replace(r, orientation='LPS'))
        assert (tilt(df, replace(r, orientation=None))>40)==(name=='stored')
        assert Recipe.from_dict(json.loads(json.dumps(r.to_dict())))==r==eval(repr(r))
        assert repr(Recipe.auto(df.assign(split='labeled')[::-1]))==repr(r) # whichever scan is the first
    hearts = [turned(o) for o in (40,44,46,50,42,48)]
    with_one = _orientation([np.ravel(o) for o in [*hearts, sagittal@turned(45)]]) # which cannot lie like the others
    assert np.allclose(with_one, _orientation([np.ravel(o) for o in hearts]), atol=.3)
    assert _orientation([np.ravel(o) for o in [*[turned(o) for o in (1,3,5,2)], turned(45)@sagittal@turned(45)]])=='LPS'
    for name,degrees in dict(straight=(-5,0,5,9), upright=(0,90,180,0), apart=(0,30,50,90)).items():
        assert made(name, map(turned, degrees))[1].orientation=='LPS', name
    for odd in ((1,0,0,0,1,0,0,0,0), (1,)*9, (1,0,0), 'LP', 'LPSS', 3):
        with pytest.raises(ValueError, match="orientation=.*, expected one letter each of .* nine numbers of perpend"):
            Recipe(orientation=odd)

def test_a_recipe_file_says_what_is_otherwise_than_with_auto(tmp_path):
    df,file = cohort(tmp_path, values=(0,100,300)),tmp_path/'r.json'
    def of(asked=None, **said):
        file.write_text(json.dumps(said))
        return Preparation(recipe=str(file), size=asked).recipe_for(df)
    auto = Recipe.auto(df)
    assert of()==auto and of(jitter=0.)==replace(auto, jitter=0.)
    whole = Recipe(classes=('background','a','b'), labels={100:1, 300:2}, size=32)
    assert of(**whole.to_dict())==whole # nothing is left to propose
    for said in (dict(classes=('background','ball'), labels={100:1, 300:1}), dict(labels={100:1, 300:1})):
        r = of(**said)
        assert (r.labels, r.size, r.spacing, r.flip)==({100:1, 300:1}, auto.size, auto.spacing, auto.flip)
        assert r.classes==said.get('classes', ('background','foreground'))
    r = of(classes=('background','ball','shell'))
    assert (r.classes, r.labels)==(('background','ball','shell'), auto.labels)
    assert of([16], crop=8)==replace(Recipe.auto(df, size=16), crop=None)
    r = of(fit='resize', size=16, percentiles=(0,100), orientation='RAS')
    assert (r.fit, r.size, r.spacing, r.window, r.axis)==('resize', (16,16), None, None, 0)
    with pytest.raises(ValueError, match="labels={1: 2}, expected"): of(labels={1:2})

@pytest.mark.parametrize('said,axis,spacing,size,flip', [
    ({}, 0, (1.25,1.25), (64,64), 'h'), (dict(axis=1), 1, (6.,1.25), (16,64), 'h'),
    (dict(axis=2), 2, (6.,1.25), (16,64), ''), (dict(orientation='SPL'), 2, (1.25,1.25), (64,64), 'v'),
    (dict(orientation='SPL', axis=0), 0, (1.25,6.), (64,16), ''),
    (dict(orientation=None), 0, (1.25,1.25), (64,64), 'h')])
def test_auto_proposes_for_the_slices_that_are_asked_for(tmp_path, said, axis, spacing, size, flip):
    "It proposed spacing and size of other slices, so that these were cut off, and flips from front to back"
    df = cohort(tmp_path)
    (tmp_path/'r.json').write_text(json.dumps(said))
    for r in (Recipe.auto(df, **said), Recipe.named(tmp_path/'r.json', df)):
        assert (r.orientation, r.axis)==(said.get('orientation', 'LPS'), axis)
        assert (r.spacing, r.size, r.flip)==(spacing, size, flip)
    with pytest.raises(ValueError, match='Recipe: axis=3, expected'): Recipe.auto(df, axis=3)

def test_labels_of_a_cohort_without_classes_are_taken(tmp_path, capsys):
    table = cohort(tmp_path, values=(0,1,2))
    df = load_cohort(table, labels={1:1, 2:1})
    saved = load_cohort(save_cohort(df, tmp_path/'cohort.csv'))
    for o in (df, saved):
        for r in (Recipe.auto(o), Recipe(size=32).for_cohort(o)):
            assert (r.classes, r.labels)==(('background','class1'), {1:1, 2:1})
    named = Recipe.auto(df, classes=('background','ball'))
    assert (named.classes, named.labels)==(('background','ball'), {1:1, 2:1})
    r = Recipe.auto(load_cohort(table, labels={1:2, 2:1}))
    assert (r.classes, r.labels)==(('background','class1','class2'), {1:2, 2:1})
    for odd in ('ball', 1e9, -1):
        with pytest.raises(ValueError, match='labels='): Recipe.auto(load_cohort(table, labels={1:odd}))

def test_undeclared_values_are_told_with_both_cures():
    img = Volume(np.random.default_rng(0).normal(size=(4,20,20)).astype(np.float32))
    where = Recipe().place(img)
    def cures(values, **kw):
        m = img.like(np.array(values)[np.arange(1600).reshape(4,20,20)%len(values)])
        with pytest.raises(VolumeError) as e: Recipe(**kw).masks(replace(m, path='m.nii'), where)
        return str(e.value), m
    said,m = cures((0,1,2,3))
    assert said==("m.nii: holds the values 0, 1, 2, 3, declared are 0, 1. "
                  "A class for each: Recipe(classes=('background', 'class1', 'class2', 'class3')). "
                  "All as one: Recipe(labels={1: 1, 2: 1, 3: 1}). Or correct the mask")
    for values,kw in (((0,1,2,3), {}), ((0,205,420), {}), ((0,1,2,5), dict(classes=('background','RV','Myo','LV'))),
                      ((7,8), dict(labels={7:1}))):
        said,m = cures(values, **kw)
        for o in said.split('Recipe(')[1:]: eval('Recipe('+o.rsplit('). ', 1)[0]+')').masks(m, where) # both do
    assert 'fractional' in cures((0,1,2.5))[0]

# -- real scans --------------------------------------------------------------------------------------------------------

def test_hippocampus_recipe_holds_real_scans():
    root = os.environ.get('FASTMISEG_DATA')
    if not root or not (Path(root)/'labelsTr').is_dir():
        pytest.skip('set FASTMISEG_DATA to the folder of MSD Hippocampus (imagesTr, labelsTr)')
    r = Recipe.hippocampus()
    for o in sorted((Path(root)/'labelsTr').glob('hippo*.nii.gz'))[::13]:
        img,mask = read_volume(Path(root)/'imagesTr'/o.name),read_volume(o)
        x,where = r.slices(img)
        assert where.order==(0,1,2) and where.covers(np.ones(img.shape)) and x.shape==(img.shape[0],1,64,48)
        assert np.array_equal(where.inverse(r.masks(mask, where)), mask.array)
        tilted = resample(img, spacing=(1.5,.8,.9))                         # another spacing, the same picture
        assert np.abs(r.slices(tilted)[0].mean(0)-x.mean(0)).mean()<.05

@pytest.mark.parametrize('name, size, crop, rotate, flip', [
    ('acdc',384,224,45.,'hv'), ('promise12',256,224,10.,'hv'),
    ('spleen',512,256,10.,'h'), ('mmwhs',256,224,45.,'hv')])
def test_presets_have_the_numbers_of_the_paper(name, size, crop, rotate, flip):
    "Sections 4.1 and 4.2"
    r = getattr(Recipe, name)()
    square = lambda o: (o,o) if isinstance(o, int) else tuple(o)
    assert (square(r.size), square(r.crop), r.rotate, ''.join(sorted(r.flip)))==((size,size), (crop,crop), rotate, flip)
    if name in ('acdc','mmwhs'): assert square(int(np.ravel(r.spacing)[0]))==(1,1)
    assert r.fit==('resize' if name in ('promise12','spleen') else 'crop')
    if name!='spleen': assert tuple(r.percentiles)==(1.,99.) and (r.per=='subject')==(name=='acdc' or r.per=='subject')

"""The slice store under what happens to stores: killed workers, interruptions, several processes, full disks, files
that change"""
import os, pickle, re, resource, signal, subprocess, sys, time, warnings
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest
import SimpleITK as sitk

import fastmiseg.scans.prepared as P, fastmiseg.scans.store as S, fastmiseg.scans.workers as W
from fastmiseg.files import is_temporary, temporary_name
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.store import SliceStore
from fastmiseg.scans.messages import VolumeError, VolumeWarning
from fastmiseg.scans.volume import Volume, read_volume, write_volume, scan_files

recipe = Recipe(size=32, classes=('background','ball'))
linux = pytest.mark.skipif(sys.platform!='linux', reason='workers are forked on Linux only')

def make(root, n=6, ext='.nii.gz', shape=(4,24,28), split=True):
    "A cohort of noisy scans with masks, two per subject"
    rows = []
    for i in range(n):
        rng = np.random.default_rng(i)
        m = np.zeros(shape, np.uint8); m[1:3,8:14,9+i%3:16] = 1
        v = Volume(rng.integers(0, 900, shape).astype(np.int16), (5.,1.,1.))
        rows.append(dict(subject=f'p{i//2}', scan=f's{i}', image=str(write_volume(v, root/f's{i}{ext}')),
                         mask=str(write_volume(v.like(m), root/f's{i}_mask{ext}'))))
    df = pd.DataFrame(rows)
    if split: df['split'] = ['labeled' if i<2 else 'valid' if i<4 else 'unlabeled' for i in range(n)]
    return df

def go(store, df, r=recipe, workers=2, **kw):
    return SliceStore(store, r).prepare(df, workers=workers, progress=False, **kw)
def entries(store):
    return {o.name:o.stat().st_mtime_ns for o in store.dir.iterdir()
            if o.name.endswith(('.npy','.json')) and o.name!='index.json' and not is_temporary(o.name)}
def leftovers(store): return [o.name for o in store.dir.iterdir() if is_temporary(o.name)]
def same(a, b):
    assert a.scans.drop(columns='split', errors='ignore').equals(b.scans.drop(columns='split', errors='ignore'))
    for r in a.scans.itertuples():
        assert (np.array_equal(a.image(r.scan, slice(None)), b.image(r.scan, slice(None)))
                and a.where(r.scan)==b.where(r.scan))
        if r.mask: assert np.array_equal(a.mask(r.scan, slice(None)), b.mask(r.scan, slice(None)))

def test_any_number_of_workers_gives_the_same(tmp_path):
    df = make(tmp_path)
    same(go(tmp_path/'a', df, workers=0), go(tmp_path/'b', df, workers=3))

def test_workers_start_after_threads_were_used(tmp_path):
    df = make(tmp_path)
    # ITK's threads are up when the workers are forked
    sitk.SmoothingRecursiveGaussian(sitk.Image(64, 64, 64, sitk.sitkFloat32), 2.)
    go(tmp_path/'a', df)

def test_spawned_workers(tmp_path, monkeypatch):
    df = make(tmp_path, 3)
    monkeypatch.setattr(W, '_start_method', 'spawn')
    same(go(tmp_path/'a', df), go(tmp_path/'b', df, workers=0))

def test_progress_bar(tmp_path, capfd):
    df = make(tmp_path, 3)
    SliceStore(tmp_path/'a', recipe).prepare(df, workers=0)
    assert '[3/3' in capfd.readouterr().out
    SliceStore(tmp_path/'a', recipe).prepare(df)
    SliceStore(tmp_path/'b', recipe).prepare(df, progress=False)
    assert capfd.readouterr().out==''

# -- faults ------------------------------------------------------------------------------------------------------------

@linux
def test_a_killed_worker_loses_only_the_scan_in_hand(tmp_path, monkeypatch):
    df = make(tmp_path, 8)
    def read(path, **kw):
        if path.endswith('s3.nii.gz'): os.kill(os.getpid(), signal.SIGKILL)
        return read_volume(path, **kw)
    monkeypatch.setattr(P, 'read_volume', read)
    with pytest.raises(VolumeError, match='(?s)1 of 8 scans cannot be used.*s3.nii.gz: '
                                          'the process that prepared it was killed: is there enough memory') as e:
        go(tmp_path/'a', df)
    assert e.value.problems.scan.tolist()==['s3']
    store = go(tmp_path/'a', df, skip_bad=True)
    assert store.scans.scan.tolist()==[f's{i}' for i in range(8) if i!=3]
    for o in leftovers(store): os.utime(store.dir/o, (0,0)) # of workers that went down with it; swept when they are old
    monkeypatch.undo()
    before = entries(store)
    same(go(tmp_path/'a', df), go(tmp_path/'b', df))
    assert before.items()<=entries(store).items() and len(entries(store))==len(before)+4 and not leftovers(store)

slow = '''
import sys, time, pandas as pd, fastmiseg.scans.prepared as P
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.store import SliceStore
read = P.read_volume
def slowly(*a, **kw): time.sleep(.1); return read(*a, **kw)
P.read_volume = slowly
if __name__=='__main__':
    df = pd.read_pickle(sys.argv[2])
    print('ready', flush=True)
    SliceStore(sys.argv[1], Recipe(size=32, classes=('background','ball'))).prepare(df, workers=2, progress=False)
'''
def start(tmp_path, store, df):
    df.to_pickle(tmp_path/'df.pkl'); (tmp_path/'slow.py').write_text(slow)
    p = subprocess.Popen([sys.executable, str(tmp_path/'slow.py'), str(store), str(tmp_path/'df.pkl')],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, 'OMP_NUM_THREADS':'1'}, start_new_session=True)
    p.stdout.readline()
    return p
def until(what, seconds=30):
    end = time.time()+seconds
    while not what():
        assert time.time()<end, 'waited in vain'
        time.sleep(.02)

def children(pid):
    out = []
    for o in Path('/proc').iterdir():
        try:
            if o.name.isdigit() and int((o/'stat').read_text().rsplit(')', 1)[1].split()[1])==pid:
                out.append(int(o.name))
        except OSError: pass
    return out
def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except OSError: return False

@linux
@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_preparation_goes_on_where_it_stopped(tmp_path, sig):
    df = make(tmp_path, 40)
    store = SliceStore(tmp_path/'a', recipe)
    p = start(tmp_path, store.path, df)
    until(lambda: store.dir.exists() and len(list(store.dir.glob('*.json')))>=4)
    workers = children(p.pid)
    assert len(workers)==2
    p.send_signal(sig)
    p.communicate(timeout=30)
    assert p.returncode not in (0,None)
    until(lambda: not any(map(alive, workers)))           # no worker waits for ever for a parent that is gone
    done = entries(store)
    assert 4<=len([o for o in done if o.endswith('.json')])<40
    if sig==signal.SIGINT: assert not leftovers(store)
    whole = go(tmp_path/'a', df)
    kept = {k:v for k,v in entries(store).items() if k.endswith(('.image.npy','.json'))}
    assert {k:v for k,v in done.items() if k.endswith('.json')}.items()<=kept.items()
    same(whole, go(tmp_path/'b', df))

@linux
def test_two_processes_prepare_one_store(tmp_path):
    df = make(tmp_path, 12)
    ps = [start(tmp_path, tmp_path/'a', df) for _ in range(2)]
    for p in ps:
        assert p.communicate(timeout=60)[1]=='' and p.returncode==0
    store = SliceStore(tmp_path/'a', recipe)
    before = entries(store)
    same(store.prepare(df, progress=False), go(tmp_path/'b', df))
    assert entries(store)==before and not leftovers(store)

def test_a_full_disk_keeps_what_is_prepared(tmp_path):
    df = make(tmp_path, 4)
    big = Volume(np.random.default_rng(0).integers(0, 99, (40,24,28)).astype(np.int16))
    df = pd.concat([df, pd.DataFrame([
        dict(subject='big', scan='big', image=str(write_volume(big, tmp_path/'big.nii.gz')),
             mask=None, split='unlabeled')])])
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        for workers in (0,2):
            with pytest.raises(OSError, match='the slice store cannot be written .*make room or choose another folder'):
                go(tmp_path/'a', df, workers=workers)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    store = SliceStore(tmp_path/'a', recipe)
    before = entries(store)
    assert len(before)==4*4 and not leftovers(store)
    store.prepare(df, progress=False)
    assert before.items()<=entries(store).items() and len(entries(store))==len(before)+2

def test_a_folder_that_cannot_be_written(tmp_path):
    df = make(tmp_path, 2)
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='the slice store cannot be made .*choose another folder'): go(tmp_path/'file', df)
    if os.geteuid()==0: return
    (tmp_path/'locked').mkdir(mode=0o500)
    with pytest.raises(OSError, match='the slice store cannot be made .*Permission'): go(tmp_path/'locked', df)

def test_a_read_only_store_can_be_read(tmp_path):
    df = make(tmp_path, 2)
    store = go(tmp_path/'a', df)
    store.dir.chmod(0o500)
    try: same(go(tmp_path/'a', df), store)
    finally: store.dir.chmod(0o700)

# -- change ------------------------------------------------------------------------------------------------------------

def test_changed_files_are_noticed(tmp_path):
    df = make(tmp_path)
    store = go(tmp_path/'a', df)
    before = entries(store)
    os.utime(df.image[0]); os.utime(df['mask'][1])
    assert entries(go(tmp_path/'a', df)).keys()==before.keys() # another time, the same bytes: the same entries
    v = read_volume(df.image[0])
    write_volume(v.like(v.array[:,::-1]), df.image[0])
    new = go(tmp_path/'a', df)
    assert len(entries(new))==len(before)+4 and new.image('s0', 0).shape==(1,32,32)
    same(new, go(tmp_path/'b', df))
    m = read_volume(df['mask'][1])
    write_volume(m.like(m.array[:,::-1]), df['mask'][1])
    assert len(entries(go(tmp_path/'a', df)))==len(before)+6
    os.remove(df.image[1])
    with pytest.raises(VolumeError, match='(?s)1 of 6 scans cannot be used.*s1: .*s1.nii.gz: does not exist'):
        go(tmp_path/'a', df)

@pytest.mark.parametrize('ext', ['.mhd','.nhdr'])
def test_a_changed_data_file_beside_its_header_is_noticed(tmp_path, ext):
    df = make(tmp_path, 2, ext)
    for o in df.image: sitk.WriteImage(sitk.ReadImage(o), o, useCompression=False)
    a = go(tmp_path/'a', df).image('s0', 1)
    os.replace(scan_files(df.image[1])[1], scan_files(df.image[0])[1])
    assert not np.array_equal(go(tmp_path/'a', df[:1]).image('s0', 1), a)

def test_a_folder_counts_with_all_its_files(tmp_path):
    d = tmp_path/'series'; d.mkdir()
    (d/'1.dcm').write_bytes(b'1')
    seen,h = P.fingerprint(str(d))
    (d/'2.dcm').write_bytes(b'2')
    assert P.fingerprint(str(d))[1]!=h
    assert P.file_stats([o for o,*_ in seen])!=seen                          # a new file shows from outside

def test_recipes_live_side_by_side(tmp_path):
    df = make(tmp_path, 2)
    a,b = go(tmp_path/'a', df),go(tmp_path/'a', df, replace(recipe, size=48))
    assert (a.image('s0', 0).shape, b.image('s0', 0).shape)==((1,32,32),(1,48,48))
    before = entries(a)
    go(tmp_path/'a', df); go(tmp_path/'a', df, replace(recipe, rotate=20., crop=16))
    assert entries(a)==before
    assert len({replace(recipe, **o).key for o in (
        dict(spacing=2.), dict(size=40), dict(fit='resize'), dict(percentiles=(0,100)), dict(window=(0,9)),
        dict(per='subject'), dict(axis=1), dict(orientation=None), dict(channels=2), dict(classes=('a','b','c')),
        dict(labels={9:1}))}|{recipe.key})==12

def test_damage_in_the_store_is_repaired(tmp_path):
    df = make(tmp_path)
    store = go(tmp_path/'a', df)
    before = entries(store)
    (store.dir/'index.json').write_text('{"files": {') # no index: everything is hashed again and found
    images = lambda entries: {k:v for k,v in entries.items() if 'mask' not in k}
    assert images(entries(go(tmp_path/'a', df)))==images(before)
    for end in ('.image.npy','.mask.npy','.json'):
        o = next(o for o in sorted(store.dir.iterdir()) if o.name.endswith(end) and o.name!='index.json')
        o.write_bytes(o.read_bytes()[:100])
        if end=='.json': o.unlink()
        elif end=='.image.npy':
            bad = SliceStore(store.path, recipe); bad.__dict__.update(pickle.loads(pickle.dumps(store)).__dict__)
            with pytest.raises(VolumeError, match='gone or damaged .*call `prepare` again'):
                [bad.image(s, 0) for s in df.scan]
        same(go(tmp_path/'a', df), go(tmp_path/'b', df))
    old = temporary_name(store.dir/'0.npy'); old.write_text(''); os.utime(old, (0,0))
    young = temporary_name(store.dir/'1.npy'); young.write_text('')
    go(tmp_path/'a', df)
    assert leftovers(store)==[young.name]                                 # somebody may be writing the young one

def test_an_index_that_takes_long_to_write_is_written_seldom(tmp_path, monkeypatch):
    "That of many DICOM files takes seconds each time"
    df,clock,written,add = make(tmp_path, 30, '.nii', (2,8,8)),count(0, 6),[],S._Index.add
    monkeypatch.setattr(S, 'time', SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
    monkeypatch.setattr(S._Index, 'add', lambda *args: (written.append(1), add(*args)))
    go(tmp_path/'s', df, workers=0)
    assert 1<len(written)<5

@contextmanager
def few_handles(n):
    "Inside, this process may open `n` files beside those that are open"
    now = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/dev/fd'))+n, now[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, now)

def test_more_scans_than_files_that_may_be_open(tmp_path):
    df = make(tmp_path, 90, '.nii', (2,8,8))
    store = go(tmp_path/'s', df, workers=0)
    with few_handles(60):
        for s in [*df.scan, *df.scan]: assert len(store.image(s, slice(None)))==2

def test_without_any_handle_left_nothing_is_taken_for_damaged(tmp_path):
    store = go(tmp_path/'s', make(tmp_path), workers=0)
    before,taken = entries(store),[]
    with few_handles(20):
        with pytest.raises(OSError):
            while True: taken.append(os.open(os.devnull, os.O_RDONLY))
        try:
            with pytest.raises(VolumeError, match='Too many open files.*ulimit'): store.image('s0', 0)
        finally:
            for o in taken: os.close(o)
    assert entries(store)==before and store.image('s0', 0).shape==(1,32,32)

def test_a_file_that_changes_while_it_is_prepared(tmp_path, monkeypatch):
    df = make(tmp_path, 2)
    def read(path, **kw):
        v = read_volume(path, **kw)
        if path==df.image[0]: os.utime(path)
        return v
    monkeypatch.setattr(P, 'read_volume', read)
    with pytest.raises(VolumeError, match='(?s)1 of 2 scans.*s0.nii.gz: changed while it was prepared'):
        go(tmp_path/'a', df, workers=0)

def test_a_mask_that_changes_and_is_taken_back(tmp_path, monkeypatch):
    "Slices of the one in between stood under the name of the one that was hashed"
    df = make(tmp_path, 1)
    file,read = Path(df['mask'][0]),P.read_labels
    first,vol = file.read_bytes(),read_volume(file)
    def saved(path):
        write_volume(vol.like(vol.array[:,::-1].copy()), file)
        return read(path)
    with monkeypatch.context() as m:
        m.setattr(P, 'read_labels', saved)
        with pytest.raises(VolumeError, match='s0_mask.nii.gz: changed while it was prepared: prepare again when it'):
            go(tmp_path/'a', df, workers=0)
    file.write_bytes(first)
    same(go(tmp_path/'a', df, workers=0), go(tmp_path/'b', df, workers=0))

# -- what is not opened, and what is said ------------------------------------------------------------------------------

def test_masks_of_unlabelled_scans_are_never_opened(tmp_path):
    df = make(tmp_path)
    for o in df['mask'][df.split=='unlabeled']: os.remove(o)
    store = go(tmp_path/'a', df)
    assert store.scans['mask'].notna().tolist()==[True]*4+[False]*2
    with pytest.raises(VolumeError, match='s5: has no mask in the store'): store.mask('s5', 0)
    df = df.drop(columns=['split'])
    with pytest.raises(VolumeError, match='2 of 6 scans'): go(tmp_path/'a', df)
    same(go(tmp_path/'a', df.drop(columns='mask')), go(tmp_path/'b', df.assign(mask=np.nan)))

def test_subjects_percentiles_do_without_a_bad_sibling(tmp_path):
    df,r = make(tmp_path),replace(recipe, per='subject')
    Path(df.image[1]).write_bytes(b'')
    with pytest.raises(VolumeError, match='(?s)1 of 6 scans.*s1.nii.gz'): go(tmp_path/'a', df, r)
    store = go(tmp_path/'a', df, r, skip_bad=True)
    assert np.allclose(store.image('s0', slice(None)), recipe.slices(read_volume(df.image[0]))[0], atol=1/65535)
    before = entries(store)
    write_volume(Volume(np.random.default_rng(5).integers(0, 5000, (4,24,28)).astype(np.int16), (5.,1.,1.)),
                 df.image[1])
    df.loc[1,'mask'] = None
    whole = go(tmp_path/'a', df, r)
    assert whole.image('s0', 0).max()<.5 and before.keys()<entries(whole).keys()

def test_oddities_are_told_once(tmp_path):
    df = make(tmp_path, 4, split=False)
    v = read_volume(df.image[0])
    for i,o in enumerate(df['mask'][:3]): write_volume(v.like(np.zeros(v.shape, np.uint8)), o)
    m = np.zeros(v.shape, np.uint8); m[1,0,0] = 1
    write_volume(v.like(m), df['mask'][3])
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        go(tmp_path/'a', df, replace(recipe, size=16))
        go(tmp_path/'a', df, replace(recipe, size=16))
    assert len(w)==1 and w[0].category is VolumeWarning
    assert (re.search('3 files, for example [^:]+: the mask is empty', str(w[0].message))
            and 's3_mask.nii.gz: slices of 16x16 pixels cut off a part' in str(w[0].message))

def test_what_is_cut_off_is_counted_in_classes(tmp_path):
    "Background may be stored as another value than 0, and a value that is not 0 may be background"
    df = make(tmp_path, 1, split=False)
    v,m = read_volume(df.image[0]),read_volume(df['mask'][0])
    write_volume(v.like(np.where(m.array, 7, 5).astype(np.uint8)), df['mask'][0])
    with warnings.catch_warnings():
        warnings.simplefilter('error', VolumeWarning)
        store = go(tmp_path/'a', df, replace(recipe, size=16, labels={5:0, 7:1}))
    about, = (P.unseal(o) for o in store.dir.glob('*.mask.json'))
    assert (about['total'], about['lost'])==(int(m.array.sum()), 0)

def test_each_bad_scan_has_its_sentence(tmp_path):
    df = make(tmp_path, 6, split=False)
    v = read_volume(df.image[0])
    Path(df.image[0]).write_bytes(Path(df.image[0]).read_bytes()[:700])
    write_volume(Volume(v.array[:3], v.spacing), df.image[1])
    write_volume(Volume(np.full(v.shape, 2, np.uint8), v.spacing), df['mask'][2])
    write_volume(Volume(np.stack([v.array]*2), v.spacing), df.image[3])
    write_volume(Volume(v.array*0, v.spacing), df.image[4])
    store = go(tmp_path/'a', df, skip_bad=True)
    assert store.scans.scan.tolist()==['s5']
    says = dict(zip(store.problems.scan, store.problems.problem))
    for s,text in dict(s0='s0.nii.gz: is cut off',
                       s1='s1_mask.nii.gz: has (4, 24, 28) voxels (z,y,x), but',
                       s2='s2_mask.nii.gz: holds the value 2, declared are 0, 1',
                       s3='s3.nii.gz: has 4 dimensions',
                       s4='s4.nii.gz: every voxel is 0, expected an image').items(): assert text in says[s], says[s]

def test_channels(tmp_path):
    rng = np.random.default_rng(0)
    write_volume(Volume(rng.normal(size=(2,4,20,22)).astype(np.float32)), tmp_path/'a.nii.gz')
    df = pd.DataFrame([dict(subject='a', scan='a', image=str(tmp_path/'a.nii.gz'))])
    store = go(tmp_path/'s', df, Recipe(size=32, channels=2))
    assert store.image('a', 1).shape==(2,32,32) and store.image('a', 1).max()==1
    with pytest.raises(VolumeError, match='(?s)1 of 1 scans.*channels'):
        go(tmp_path/'s', df, Recipe(size=32, channels=3))

def test_bad_cohorts(tmp_path):
    df = make(tmp_path, 2)
    for bad,text in ((df.drop(columns='scan'), 'no column scan'), (df[:0], 'has no scans'),
                     (pd.concat([df, df]), 'the cohort gives 2 names to several scans each')):
        with pytest.raises(ValueError, match=text): go(tmp_path/'a', bad)
    assert not (tmp_path/'a').exists()

def test_a_pickled_store_is_small_and_reads(tmp_path):
    store = go(tmp_path/'a', make(tmp_path))
    store.image('s0', 0)
    text = pickle.dumps(store)
    assert len(text)<5000 and np.array_equal(pickle.loads(text).image('s0', 0), store.image('s0', 0))

def test_a_file_that_another_process_moves_to_its_place_while_we_look_hides_no_other(tmp_path, monkeypatch):
    df,scandir = make(tmp_path, 2),os.scandir
    go(tmp_path/'a', df, workers=0)
    class Gone:
        name = '.0.tmp'
        def stat(self): raise FileNotFoundError(2, 'No such file or directory', self.name)
    monkeypatch.setattr(S.os, 'scandir', lambda p: [Gone(), *scandir(p)])
    assert len(go(tmp_path/'a', df, workers=0).scans)==2

def test_a_store_is_where_it_was_made(hearts, tmp_path, monkeypatch):
    "From another working directory its slices were 'gone or damaged'"
    monkeypatch.chdir(tmp_path)
    store = SliceStore('slices', hearts.recipe).prepare(hearts.df[:1], workers=0, progress=False)
    first = store.image(hearts.df.scan[0], 0)
    again = pickle.loads(pickle.dumps(store))
    monkeypatch.chdir('/')
    for o in (store,again): assert np.array_equal(o.image(hearts.df.scan[0], 0), first) and o.shows(hearts.df.scan[0])

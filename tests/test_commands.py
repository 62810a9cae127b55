"""What the functions behind the commands accept, refuse, and go on with"""
import contextlib, inspect, json, os, shlex, shutil, warnings
from dataclasses import fields, replace
from pathlib import Path

import nibabel as nib, numpy as np, pandas as pd, pytest
from fastai.basics import Callback
from fastcore.script import anno_parser

import fastmiseg.commands as C
import fastmiseg.scan_by_scan as scan_by_scan
import fastmiseg.preparing as P
from fastmiseg import cli, run_model
from fastmiseg.commands import prepare_run, resume_run, train_run
from fastmiseg.run_folder import RunError, change_config, clear_run, read_config
from fastmiseg.run_model import evaluate_run, predict_scans
from fastmiseg.preparing import Preparation, Reading
from fastmiseg.scans.cohort import load_cohort, save_cohort
from fastmiseg.scans.messages import VolumeError
from fastmiseg.scans.phantom import make_phantom
from fastmiseg.scans.layout import CohortError, layouts
from fastmiseg.scans.volume import read_volume, write_volume
from fastmiseg.scores import read_scores
from fastmiseg.segmenter import load_segmenter
from fastmiseg.settings import Settings

tiny = dict(epochs=1, n_iters=2, width=2, bs=2, unlabeled_bs=2)

def cohort_of(hearts, n, path, **columns):
    "The first hearts as a CSV file"
    df = hearts.df[:n].drop(columns='split').assign(**columns)
    df.attrs.update(hearts.df.attrs)
    return save_cohort(df, path)

@pytest.fixture(scope='module')
def prepared(hearts, tmp_path_factory):
    out = tmp_path_factory.mktemp('commands')/'prepared'
    csv = cohort_of(hearts, 8, out.parent/'eight.csv')
    prepare_run(csv, out, recipe=hearts.recipe, labeled=2, valid=2, test=2, workers=0)
    return out

@pytest.fixture(scope='module')
def run(prepared):
    train_run(prepared, prepared.parent/'run', workers=0, **tiny)
    return prepared.parent/'run'

def test_one_epoch_is_one_epoch(capsys):
    C._tell_training(print, Settings(epochs=1), 'run')
    assert '\n1 epoch of 300 steps with ' in capsys.readouterr().out

def test_classes_without_names_are_said(hearts):
    said = []
    C._tell_preparation(said.append, hearts.df, replace(hearts.recipe, classes=('background','class1','class2')),
                        'slices')
    assert 'the classes have no names: --classes background,NAME,NAME gives them' in said
    said.clear()
    C._tell_preparation(said.append, hearts.df, hearts.recipe, 'slices')
    assert not [o for o in said if '--classes' in o]

def test_names_for_masks_of_0_and_255(hearts, tmp_path):
    "The advice that classes have no names can be followed"
    for o in ('images','masks'): (tmp_path/'scans'/o).mkdir(parents=True)
    for r in hearts.df[:3].itertuples():
        os.link(r.image, tmp_path/'scans'/'images'/f'{r.scan}.nii.gz')
        mask = read_volume(r.mask)
        write_volume(mask.like((mask.array>0).astype(np.uint8)*255), tmp_path/'scans'/'masks'/f'{r.scan}.nii.gz')
    kw = dict(size=[32], labeled=1, valid=1, workers=0)
    prepare_run(tmp_path/'scans', tmp_path/'a', say=(said := []).append, **kw)
    assert 'the classes have no names: --classes background,NAME gives them' in said
    prepare_run(tmp_path/'scans', tmp_path/'b', classes=['background','heart'], **kw)
    a,b = (read_config(tmp_path/o)['recipe'] for o in 'ab')
    assert (b.classes, b.labels)==(('background','heart'), a.labels) and a.labels[255]==1

# -- reading ---------------------------------------------------------------------------------------------------------
def test_every_option_of_the_readers_is_one_of_the_commands():
    of_readers = {k for o in layouts.values() for k in list(inspect.signature(o.read).parameters)[1:]}
    of_load = set(inspect.signature(load_cohort).parameters)-{'root','labels','options'}
    assert of_readers|of_load=={o.name for o in fields(Reading)}
    for command in (cli.prepare, cli.train, cli.predict, cli.evaluate):
        assert of_readers|of_load<=set(inspect.signature(command).parameters)

@pytest.mark.parametrize('name,value', [
    ('series',2), ('phase',0), ('suffix','T1w'), ('derivative','manual'), ('mask','desc-x'), ('channel','CT'),
    ('subject',r'^\w+?(?=_)'), ('form','qform'), ('straddle',True), ('layout','bids'), ('image_suffix','_t1')])
def test_options_reach_the_reader(monkeypatch, name, value):
    def seen(root, **options): raise ValueError(repr(options))
    monkeypatch.setattr(P, 'load_cohort', seen)
    with pytest.raises(ValueError, match=r"^\{'%s': .*\}$" % name): Reading(**{name:value}).load('scans')

@pytest.mark.parametrize('command', ['prepare','train','predict','evaluate'])
def test_options_come_from_the_command_line(monkeypatch, capsys, tmp_path, run, command):
    "The same options in all commands that read scans"
    def seen(root, **options): raise ValueError(repr(options))
    monkeypatch.setattr(P, 'load_cohort', seen)
    first = [] if command in ('prepare','train') else [str(run)]
    with pytest.raises(SystemExit, match='2'):
        getattr(cli, command)(*first, str(tmp_path/'scans'), subject='^p', series=1, form='sform')
    assert "{'subject': '^p', 'form': 'sform', 'series': 1}" in capsys.readouterr().err

def given(command, *words):
    "Options as the command line gives them"
    return {k:o for k,o in vars(anno_parser(command).parse_args(words)).items() if k in cli.options_in(command)}

@pytest.mark.parametrize('word,value', [('no',False), ('False',False), ('yes',True), (None,True)])
def test_what_is_on_by_default_can_be_switched_off(monkeypatch, word, value):
    "And what is off by default stays as a file of settings has it"
    def seen(data, out, settings, *args, **changes): raise ValueError(changes)
    monkeypatch.setattr(C, 'train_run', seen)
    options = given(cli.train, 'scans', *['--one-cycle',word]*(word is not None))
    monkeypatch.setattr(cli, 'polite', lambda *args: contextlib.nullcontext())
    with pytest.raises(ValueError) as e: cli.train(**options)
    assert e.value.args==(dict(one_cycle=value) if word else {},)
    assert C.settings_from(Settings(sync_bn=True), **e.value.args[0])==Settings(sync_bn=True, one_cycle=value)

def test_neither_yes_nor_no(capsys):
    with pytest.raises(SystemExit, match='2'): given(cli.train, 'scans', '--one-cycle', 'maybe')
    assert "--one-cycle: invalid yes or no value: 'maybe'" in capsys.readouterr().err

def test_subject_pattern(hearts, tmp_path):
    "Two scans of each person, whom only the names tell"
    (tmp_path/'images').mkdir()
    (tmp_path/'masks').mkdir()
    for i,r in enumerate(hearts.df[:8].itertuples()):
        for o,d in ((r.image,'images'), (r.mask,'masks')): os.link(o, tmp_path/d/f'p{i//2}_ct{i%2}.nii.gz')
    prepare_run(tmp_path, tmp_path/'out', subject=r'^(p\d+)_', classes=['background','RV','Myo','LV'],
                labeled=1, valid=1, test=1, spacing=4., size=[32], workers=0)
    df = load_cohort(tmp_path/'out'/'split.csv', 'csv')
    assert df.groupby('subject').split.nunique().eq(1).all() and df.subject.nunique()==4
    assert read_config(tmp_path/'out')['recipe'].size==(32,32)

def test_prediction_of_a_folder_in_no_order_says_what_is_wrong_with_one_in_order(run, hearts, tmp_path):
    for o in ('a','b/sub-1'): (tmp_path/o).mkdir(parents=True)
    os.link(hearts.df.image[0], tmp_path/'a'/'a.nii.gz')
    assert predict_scans(run, tmp_path/'a', tmp_path/'segs', progress=False).problem.isna().all()
    for o in ('T1w','T2w'): os.link(hearts.df.image[0], tmp_path/'b'/'sub-1'/f'sub-1_{o}.nii.gz')
    with pytest.raises(CohortError, match='several kinds'):
        predict_scans(run, tmp_path/'b', tmp_path/'segs', progress=False)
    assert len(predict_scans(run, tmp_path/'b', tmp_path/'segs2', suffix='T2w', progress=False))==1

def test_segmentations_do_not_lie_among_the_scans(run, hearts, tmp_path):
    "The next command would take them for masks of the scans, or for scans"
    os.link(hearts.df.image[0], tmp_path/'a.nii.gz')
    for o in (tmp_path/'segs', tmp_path, tmp_path/'none'/'..'/'b'):
        with pytest.raises(ValueError, match='lies in the folder of the scans .*; choose a folder elsewhere'):
            predict_scans(run, tmp_path, o, progress=False)
    assert os.listdir(tmp_path)==['a.nii.gz']

def test_new_scans_are_added_to_a_folder_of_segmentations(run, hearts, tmp_path, capsys, monkeypatch):
    scans,segs = tmp_path/'scans',tmp_path/'segs'
    scans.mkdir()
    for r in hearts.df[:2].itertuples(): os.link(r.image, scans/Path(r.image).name)
    cli.predict(str(run), str(scans), str(segs))
    corrected = (segs/'heart000.nii.gz')
    corrected.write_bytes(b'corrected by hand')
    os.link(hearts.df.image[2], scans/'heart002.nii.gz')
    capsys.readouterr()
    cli.predict(str(run), str(scans), str(segs))
    assert f'3 segmentations in {segs}, of which 2 were there\n' in capsys.readouterr().out
    assert corrected.read_bytes()==b'corrected by hand'
    os.link(hearts.df.image[3], scans/'heart003.nii.gz')
    (segs/'heart003.nii.gz').write_bytes(b'of somebody else')
    with pytest.raises(FileExistsError, match='heart003.nii.gz exists; choose'):
        predict_scans(run, scans, segs, progress=False)
    with pytest.raises(FileExistsError, match='heart000.nii.gz exists, and 3 more'):
        predict_scans(run, scans, segs, flips=True, progress=False)
    assert (segs/'heart003.nii.gz').read_bytes()==b'of somebody else'
    (segs/'heart003.nii.gz').unlink()
    assert predict_scans(run, scans, segs, progress=False).attrs['kept']==3

def test_prediction_of_one_scan_is_read_as_the_options_say(run, hearts, tmp_path, monkeypatch, capsys):
    "Under its plain name; a series that it does not have is refused, a form is for NIfTI files as in a folder"
    scan = nib.load(hearts.df.image[0])
    mirrored = scan.affine@np.diag([-1,1,1,1])
    both = nib.Nifti1Image(np.asarray(scan.dataobj), scan.affine)
    both.set_qform(scan.affine, 1)
    both.set_sform(mirrored, 2)
    both.to_filename(file := tmp_path/'two.nii.gz')
    def predict(name, data, **kw):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            row = predict_scans(run, data, tmp_path/name, progress=False, **kw).iloc[0]
        return row,{k for o in said for k in ('qform','sform') if f'the {k} was taken' in str(o.message)}
    for name,data,kw in (('a',file,dict(form='sform')), ('b',f'{file}#form=sform',{}),
                         ('c',f'{file}#form=qform',dict(form='sform'))):
        row,taken = predict(name, data, **kw)
        assert (row.image,row.scan,row.out)==(f'{file}#form=sform','two',str(tmp_path/name/'two.nii.gz'))
        assert taken=={'sform'}
    assert predict('d', file)[1]=={'qform'}
    assert "series='1' does not apply" in predict('e', file, series=1)[0].problem
    (tmp_path/'many').mkdir()
    write_volume(read_volume(file), other := tmp_path/'many'/'other.mha')
    for name,data in (('g',other), ('h',other.parent)):
        row = predict(name, data, form='sform')[0]
        assert (row.image,row.problem,row.out)==(str(other),None,str(tmp_path/name/'other.nii.gz'))
    monkeypatch.chdir(tmp_path)
    cli.predict(str(run), 'two.nii.gz#form=qform', 'f')
    assert '1 segmentation in f' in capsys.readouterr().out and (tmp_path/'f'/'two.nii.gz').exists()

# -- before any work -------------------------------------------------------------------------------------------------
def test_nothing_unlabelled_is_said_before_slices_are_prepared(hearts, prepared, tmp_path, monkeypatch):
    def never(*args, **kwargs): raise AssertionError('slices were prepared')
    csv = cohort_of(hearts, 6, tmp_path/'c.csv', split=['labeled']*4+['valid','test'])
    monkeypatch.setattr(C.SliceStore, 'prepare', never)
    with pytest.raises(ValueError, match="method: 'recommended' learns from unlabelled scans, and there are none"
                                         ".*method='partial'"):
        train_run(csv, tmp_path/'run', recipe=hearts.recipe, workers=0, **tiny)
    with pytest.raises(ValueError, match="mireg: MIRegCallback takes no 'heads' here"):
        train_run(csv, tmp_path/'run', recipe=hearts.recipe, mireg=dict(heads=3), workers=0, **tiny)
    assert not (tmp_path/'run').exists()
    with pytest.raises(AssertionError, match='slices were prepared'):
        train_run(csv, tmp_path/'run', recipe=hearts.recipe, method='partial', workers=0, **tiny)

def test_in_the_words_of_the_command_line(hearts, tmp_path, capsys):
    csv = cohort_of(hearts, 6, tmp_path/'c.csv', split=['labeled']*4+['valid','test'])
    with pytest.raises(SystemExit, match='2'): cli.train(str(csv), str(tmp_path/'run'), recipe=hearts.recipe)
    said = capsys.readouterr().err
    assert ("fastmiseg-train: --method: 'recommended' learns from unlabelled scans" in said
            and "take --method 'partial'" in said and '--labeled 2' in said)
    (tmp_path/'bad.nii.gz').write_bytes(b'x')
    df = load_cohort(csv, 'csv').assign(image=str(tmp_path/'bad.nii.gz'))
    df.loc[1:,'image'] = hearts.df.image[1:6].tolist()
    with pytest.raises(SystemExit, match='2'):
        cli.prepare(str(save_cohort(df, tmp_path/'d.csv')), str(tmp_path/'run'), recipe=hearts.recipe, workers=0)
    said = capsys.readouterr().err
    assert ('1 of 6 scans cannot be used' in said and 'leave them out with --skip-bad:' in said
            and 'skip_bad' not in said)

@pytest.mark.parametrize('how', ['train','folds','prepare'])
def test_a_run_is_replaced_when_the_next_one_is_prepared(run, hearts, tmp_path, monkeypatch, capsys, how):
    "Not before: a broken scan, or Ctrl-C, leaves the finished model where it is"
    shutil.copytree(run, out := tmp_path/'run')
    def there(): return {o:o.stat().st_mtime_ns for o in out.rglob('*') if 'slices' not in o.parts}
    before = there()
    (tmp_path/'bad.nii.gz').write_bytes(b'x')
    df = hearts.df[:8].drop(columns='split')
    df.loc[0,'image'] = str(tmp_path/'bad.nii.gz')
    df.attrs.update(hearts.df.attrs)
    csv = save_cohort(df, tmp_path/'c.csv')
    kw = dict(recipe=hearts.recipe, labeled=2, test=1, workers=0, overwrite=True)
    command = cli.prepare if how=='prepare' else cli.train
    if how!='prepare': kw.update(tiny)
    if how=='folds': kw.update(folds=2)
    with pytest.raises(SystemExit, match='2'): command(str(csv), str(out), **kw)
    assert '1 of 8 scans cannot be used' in capsys.readouterr().err and there()==before
    def stop(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(C.SliceStore, 'prepare', stop)
        with pytest.raises(SystemExit, match='130'): command(str(csv), str(out), **kw)
    assert (f': interrupted; the run in {out} is as it was, what is prepared is kept, call it again\n'
            in capsys.readouterr().err and there()==before)
    monkeypatch.setattr(C, '_resume', lambda run, *args: None)
    with pytest.raises(SystemExit, match='1') if how=='prepare' else contextlib.nullcontext():
        command(str(csv), str(out), skip_bad=True, **kw)
    assert sorted(os.listdir(out))==['config.json',*['fold0','fold1']*(how=='folds'),'slices','split.csv']
    assert ('train' in read_config(out))==(how!='prepare')

def test_what_is_left_of_a_run_can_be_replaced(run, tmp_path, monkeypatch):
    "Interrupted while it is taken away"
    shutil.copytree(run, out := tmp_path/'run')
    def stop(path):
        if path.name=='split.csv': raise KeyboardInterrupt
        os.remove(path)
    with monkeypatch.context() as m:
        m.setattr(Path, 'unlink', stop)
        with pytest.raises(KeyboardInterrupt): clear_run(out)
    assert (out/'config.json').exists() and not (out/'model.safetensors').exists()
    clear_run(out)
    assert os.listdir(out)==[o.name for o in out.glob('slices')]

def test_what_training_could_not_use_is_remembered(hearts, tmp_path):
    (tmp_path/'bad.nii.gz').write_bytes(b'x')
    csv = cohort_of(hearts, 7, tmp_path/'c.csv', split=['labeled']*3+['unlabeled']*2+['valid','test'])
    df = load_cohort(csv, 'csv')
    df.loc[4,'image'] = str(tmp_path/'bad.nii.gz')
    df.attrs.update(hearts.df.attrs)
    train_run(save_cohort(df, csv), tmp_path/'run', recipe=hearts.recipe, skip_bad=True, workers=0, **tiny)
    assert list(read_scores(tmp_path/'run'/'metrics.csv').attrs['problems'])==[df.scan[4]]

def test_a_run_whose_scans_have_moved_says_where_to_write_it(run, hearts, tmp_path):
    shutil.copytree(run, out := tmp_path/'run')
    df = load_cohort(out/'split.csv', 'csv')
    save_cohort(df.assign(image=[f'{tmp_path}/gone/{Path(o).name}' for o in df.image], mask=None), out/'split.csv')
    said = rf'split.csv: none of its {len(df)} scans is there, for example {tmp_path}/gone/.*; put them back, or, if'
    for f in (lambda: resume_run(out, 0, epochs=2), lambda: evaluate_run(out), lambda: train_run(out, tmp_path/'next')):
        with pytest.raises(RunError, match=said): f()
    save_cohort(df, out/'split.csv')
    assert evaluate_run(out, progress=False).scan.nunique()==2

def test_oblique_scans_that_a_recipe_turns_differently(tmp_path):
    make_phantom(tmp_path/'scans', n_subjects=8, seed=0, size=(32,40))
    (tmp_path/'r.json').write_text('{"size": 32, "orientation": "LPS"}')
    for name,recipe in dict(auto='auto', lps=str(tmp_path/'r.json')).items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            prepare_run(tmp_path/'scans', tmp_path/name, recipe=recipe, workers=0)
        turned = ["orientation='LPS' of the Recipe turns each to the nearest" in str(o.message) for o in said]
        assert sum(turned)==(name=='lps')
    with pytest.warns(UserWarning, match='turns each to the nearest axes of the body'):
        train_run(tmp_path/'scans', tmp_path/'folds', recipe=str(tmp_path/'r.json'), folds=3, method='partial',
                  workers=0, **tiny)

def test_scans_that_are_stored_differently_and_stay_so(hearts, tmp_path):
    "As one beyond those that auto looks at may be"
    df = hearts.df.assign(split='labeled')
    for k in ('image','mask'):
        vol = read_volume(df[k][0])
        turned = np.reshape(vol.direction, (3,3))[:,[1,0,2]]
        df.loc[0, k] = str(write_volume(replace(vol, direction=tuple(turned.ravel())), tmp_path/f'{k}.nii.gz'))
    (tmp_path/'r.json').write_text('{"size": 32, "orientation": null}')
    with pytest.warns(UserWarning, match='do not lie alike .* orientation=None of the Recipe keeps each'):
        prepare_run(save_cohort(df, tmp_path/'scans.csv'), tmp_path/'out', workers=0, recipe=str(tmp_path/'r.json'))

def test_a_finished_run_keeps_its_settings(run, tmp_path):
    shutil.copytree(run, out := tmp_path/'run')
    before = (out/'config.json').read_text()
    for other in (dict(lr=.5), dict(method='partial' if read_config(run)['train'].method!='partial' else 'entropy')):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            with pytest.raises(ValueError, match='holds the result of a finished training, which other settings .* do '
                                                 'not change; ask for more than its 1 epochs'):
                resume_run(out, 0, **other)
        assert not [o for o in said if 'ResumeCallback' in str(o.message)] # as if it went on
        assert (out/'config.json').read_text()==before

@pytest.mark.parametrize('wrong,said', [
    (dict(arch='resnet3'), "--arch: 'resnet3' is neither"),
    (dict(method='pseudo', labels=dict(dropped=.5, encoder=['Conv9'])), "layers: no stage 'Conv9' in UNet")])
def test_a_run_stays_where_the_next_one_has_no_such_network(run, hearts, tmp_path, capsys, wrong, said):
    shutil.copytree(run, out := tmp_path/'run')
    with pytest.raises(SystemExit, match='2'):
        cli.train(str(Path(hearts.df.image[0]).parent), str(out), overwrite=True, workers=0, **{**tiny, **wrong})
    assert said in capsys.readouterr().err and (out/'model.safetensors').exists()

@pytest.mark.parametrize('folds', [None,2])
def test_a_size_that_the_network_cannot_halve_is_said_before_anything_is_prepared(run, hearts, tmp_path, capsys, folds):
    shutil.copytree(run, out := tmp_path/'run')
    data = str(Path(hearts.df.image[0]).parent.parent)
    with pytest.raises(SystemExit, match='2'):
        cli.train(data, str(out), overwrite=True, folds=folds, size=[40,48], method='partial',
                  workers=0, **{k:o for k,o in tiny.items() if k!='unlabeled_bs'})
    assert "--size: the network 'unet' halves slices four times, and those of 40×48" in capsys.readouterr().err
    assert (out/'model.safetensors').exists()
    with pytest.warns(UserWarning, match='take multiples of 16, for instance 48,48, or another arch'):
        prepare_run(data, tmp_path/'prepared', workers=0, size=[40,48], spacing=4)

def test_what_a_resumed_run_does_not_take(monkeypatch, capsys):
    monkeypatch.setattr(C, 'resume_run', lambda run, workers, say, cbs, **changes: print(changes))
    words = ['--out','r','--resume','--epochs','20','--seed','0','--one-cycle','no','--workers','2']
    cli.train(**given(cli.train, *words))
    assert capsys.readouterr().out=="{'epochs': 20, 'one_cycle': False, 'seed': 0}\n"
    for more,names in ((['--settings','x.json','--folds','5','--overwrite'], '--settings, --overwrite, --folds'),
                       (['--size','96'], '--size'), (['--test','0','--mask-suffix','_m'], '--mask-suffix, --test')):
        with pytest.raises(SystemExit, match='2'): cli.train(**given(cli.train, *words, *more))
        assert capsys.readouterr().err==(
            f'fastmiseg-train: {names}: not with --resume: a run that goes on keeps its scans, their split and their '
            'slices. It takes --workers, and settings of the training (--epochs, --lr, --method, ...); for all else '
            'begin another run\n')

# -- config.json -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('changes,said', [
    (dict(store=5), "config.json: is damaged .store: expected str, got '5'"),
    (dict(store=None), 'store: expected str'),
    (dict(seed='x'), 'seed: expected int'),
    (dict(recipe=[1]), 'is damaged .Recipe: expected names and values'),
    (dict(recipe={'size':[1e99,1]}), 'Recipe: size='),
    (dict(recipe={'sise':3}), "there is no 'sise'"),
    (dict(train={'lr':'1'}), "lr: expected float, got '1'"),
    (dict(train={'width':10**9}), 'width: 1000000000 is not at most 4096'),
    (dict(train={'x':1}), "there is no 'x'"),
    (dict(train={'method':'mine'}),
     "config.json: was trained with the method 'mine', which is not known here; install the package"),
    (dict(changed={'epoch':3}), "config.json: is damaged .settings: there is no 'epoch'"),
    (dict(changed=[1]), 'config.json: is damaged'),
    (dict(train={'method':[]}), 'method: expected str'),
    (dict(train=[[]]), 'settings: expected names and values'),
    (dict(train={'mireg':{'a':[[[[]]]]}}), "mireg: MIRegCallback takes no 'a' here"),
    (dict(format=True, x=1), None)])
def test_damaged_config(run, tmp_path, changes, said):
    config = json.loads((run/'config.json').read_text())
    shutil.copy(run/'split.csv', tmp_path)
    (tmp_path/'config.json').write_text(json.dumps({**config, **changes}))
    if said is None: return
    with pytest.raises(ValueError, match=said): resume_run(tmp_path, 0)
    assert sorted(os.listdir(tmp_path))==['config.json','split.csv']

def test_config_that_is_no_json(run, tmp_path):
    for text,said in (('{', 'is not JSON'), ('['*10**5, 'is nested too deeply'), ('[]', 'has format None'),
                      ('{"format": NaN}', 'holds NaN'), ('{"format": 1}', "is damaged .there is no 'store'")):
        (tmp_path/'config.json').write_text(text)
        with pytest.raises(RunError, match=f'config.json: {said}'): resume_run(tmp_path)
    (tmp_path/'config.json').unlink()
    os.mkfifo(tmp_path/'config.json')
    with pytest.raises(RunError, match='config.json: is not a regular file'):
        predict_scans(tmp_path, tmp_path, tmp_path/'out')

def test_slices_elsewhere_must_be_there(run, prepared, tmp_path):
    "A run that was copied from another machine does not fill folders there"
    shutil.copy(run/'split.csv', tmp_path)
    config = json.loads((run/'config.json').read_text())
    assert Path(config['store'])==(prepared/'slices').resolve()
    for store in (str(tmp_path.parent/'nowhere'), '../nowhere'):
        (tmp_path/'config.json').write_text(json.dumps({**config, 'store':store}))
        with pytest.raises(RunError, match="nowhere, which is not a folder that is there; "
                                           "put it back, or write 'slices'"):
            resume_run(tmp_path, 0)
        with pytest.raises(RunError, match='nowhere'): train_run(tmp_path, tmp_path/'run', workers=0, **tiny)
    assert not (tmp_path.parent/'nowhere').exists() and not (tmp_path/'run').exists()

# -- changes on the way ----------------------------------------------------------------------------------------------
class CtrlC(Callback):
    "When the second epoch begins, so before there is a checkpoint of it"
    def before_train(self):
        if self.epoch==1: raise KeyboardInterrupt

def test_changes_outlive_ctrl_c(run, tmp_path):
    "What is printed, --resume alone, goes on as it was asked for; and a change that was refused leaves no trace"
    shutil.copytree(run, tmp_path/'run')
    config = (tmp_path/'run'/'config.json').read_text()
    with pytest.raises(ValueError, match='has the weights of another network'): resume_run(tmp_path/'run', 0, width=3)
    assert (tmp_path/'run'/'config.json').read_text()==config
    with pytest.raises(KeyboardInterrupt): resume_run(tmp_path/'run', 0, cbs=[CtrlC()], epochs=2)
    assert read_config(tmp_path/'run')['changed']==dict(epochs=2)
    with pytest.raises(KeyboardInterrupt): resume_run(tmp_path/'run', 0, cbs=[CtrlC()], lr=.02)
    resume_run(tmp_path/'run', 0)
    assert len(pd.read_csv(tmp_path/'run'/'log.csv'))==2
    about = load_segmenter(tmp_path/'run'/'model.safetensors', 'cpu').about['provenance']['training']
    assert (about['epochs'],about['lr'])==(2,.02)
    assert json.loads((tmp_path/'run'/'config.json').read_text())=={**json.loads(config), 'train':about}

# -- evaluation ------------------------------------------------------------------------------------------------------
def test_evaluation_goes_on_where_it_was_killed(run, tmp_path, monkeypatch):
    whole = evaluate_run(run, out=tmp_path/'whole', progress=False)
    ask,seen = scan_by_scan.ask_network,[]
    def stop(learn, recipe, vol, *args, **kwargs):
        if len(seen)==1: raise KeyboardInterrupt
        seen.append(vol.path)
        return ask(learn, recipe, vol, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(scan_by_scan, 'ask_network', stop)
        with pytest.raises(KeyboardInterrupt): evaluate_run(run, out=tmp_path/'a', progress=False)
    assert os.listdir(tmp_path/'a')==['.evaluating.jsonl']
    def count(learn, recipe, vol, *args, **kwargs):
        seen.append(vol.path)
        return ask(learn, recipe, vol, *args, **kwargs)
    monkeypatch.setattr(scan_by_scan, 'ask_network', count)
    again = evaluate_run(run, out=tmp_path/'a', progress=False)
    pd.testing.assert_frame_equal(again, whole)
    assert len(seen)==len(set(seen))==2 and not (tmp_path/'a'/'.evaluating.jsonl').exists()

def test_notes_of_another_evaluation_are_no_obstacle(run, tmp_path):
    (tmp_path/'.evaluating.jsonl').write_text('{"of": "another"}\n')
    with pytest.raises(FileExistsError, match='unfinished run with another network or other settings'):
        evaluate_run(run, out=tmp_path, overwrite=False, progress=False)
    assert evaluate_run(run, out=tmp_path, progress=False).scan.nunique()==2

def test_repeated_evaluation_shows_the_table_again(run, capsys, tmp_path, monkeypatch):
    "Not 'exists': the scores are there. Those of something else are not replaced"
    train_table = evaluate_run(run, progress=False)
    monkeypatch.setattr('fastmiseg.run_model.evaluate_cohort', None)
    again = evaluate_run(run, overwrite=False)
    pd.testing.assert_frame_equal(again, train_table, check_dtype=False)
    assert again.attrs==train_table.attrs
    cli.evaluate(str(run))
    assert 'RV' in (said := capsys.readouterr().out) and f'{run}/metrics.csv' in said
    with pytest.raises(FileExistsError, match='metrics.csv: exists, with other scores; '
                                              'choose another folder, or overwrite it'):
        evaluate_run(run, overwrite=False, flips=True)
    with pytest.raises(FileExistsError, match='exists, with other scores'):
        evaluate_run(run, split='valid', overwrite=False)

def test_scores_whose_scans_have_gone_are_no_other_scores(run, hearts, tmp_path):
    rows = [dict(image=shutil.copy(r.image, tmp_path/f'{r.scan}.nii.gz'), mask=r.mask)
            for r in hearts.df[:2].itertuples()]
    pd.DataFrame(rows).to_csv(tmp_path/'scans.csv')
    out = tmp_path/'out'
    def again(): return evaluate_run(run, tmp_path/'scans.csv', out, split='all', overwrite=False, progress=False)
    first = again()
    os.rename(rows[1]['image'], tmp_path/'elsewhere.nii.gz')
    with pytest.raises(VolumeError, match='heart001.nii.gz: does not exist'): again()
    os.rename(tmp_path/'elsewhere.nii.gz', rows[1]['image'])
    pd.testing.assert_frame_equal(again(), first, check_dtype=False)

def test_scores_of_before_are_of_the_same_rule_for_copies(run, tmp_path):
    "Copies of training scans are left out, unless people may be in several parts"
    df = load_cohort(run/'split.csv', 'csv').dropna(subset='mask')
    mine = df[df.split.isin(['labeled','test'])].assign(split='test', scan=lambda d: 'my_'+d.scan)
    mine.to_csv(tmp_path/'mine.csv', index=False)
    def scans(straddle):
        return evaluate_run(run, tmp_path/'mine.csv', tmp_path/'out', overwrite=False, straddle=straddle,
                            progress=False).scan.nunique()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert scans(False)==(df.split=='test').sum()
        with pytest.raises(FileExistsError, match='exists, with other scores'): scans(True)

def test_scores_of_before_are_of_the_same_choice_of_volume(run, hearts, tmp_path):
    "A file is read in two ways, and a folder of slices has contents too"
    for k in ('image','mask'):
        im = nib.load(hearts.df[k][0])
        im.set_qform(im.affine, 1)
        im.set_sform(im.affine@np.diag([2,2,2,1]), 1)
        nib.save(im, tmp_path/f'a_{k}.nii.gz')
    def diagonal(form, out):
        return evaluate_run(run, tmp_path, out, split='all', overwrite=False, form=form, progress=False).diagonal[0]
    one = diagonal('qform', tmp_path/'one')
    assert diagonal('qform', tmp_path/'one')==pytest.approx(one)
    with pytest.raises(FileExistsError, match='exists, with other scores'): diagonal('sform', tmp_path/'one')
    assert diagonal('sform', tmp_path/'two')==pytest.approx(2*one, rel=1e-3)
    (series := tmp_path/'series').mkdir()
    seen = []
    for o in (b'a', b'b'):
        (series/'1.dcm').write_bytes(o)
        seen += [run_model._contents(series), run_model._contents(f'{series}#series=1')]
    assert None not in seen and len(set(map(str, seen)))==4

def test_folds_that_go_on_under_other_settings_are_told(run, hearts, tmp_path):
    "Until the last of them is finished, models of two trainings are averaged"
    for k in range(2): shutil.copytree(run, tmp_path/f'fold{k}')
    shutil.copy(run/'config.json', tmp_path)
    change_config(tmp_path, folds=2, changed=dict(epochs=7))
    for k,n in (('a',1), ('b',0)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            predict_scans(tmp_path, hearts.df.image[0], tmp_path/k, progress=False)
        assert sum('was to go on with epochs=7 and is not finished' in str(o.message) for o in said)==n
        change_config(tmp_path, changed=None)

# -- ten scans, four of them annotated -------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def ten(hearts, tmp_path_factory):
    root = tmp_path_factory.mktemp('ten')/'scans'
    for o in ('images','masks'): (root/o).mkdir(parents=True)
    for i,r in enumerate(hearts.df[:10].itertuples()):
        os.link(r.image, root/'images'/f'{r.scan}.nii.gz')
        if i<4: os.link(r.mask, root/'masks'/f'{r.scan}.nii.gz')
    return root

def test_prepare_says_what_it_found_and_chose(ten, capsys):
    out = ten.parent/'prepared'
    cli.prepare(str(ten), str(out), size=[48], workers=0)
    said = capsys.readouterr().out
    assert 'folder: 10 scans of 10 subjects, 4 with masks (4 subjects)' in said
    assert 'split of 4 annotated subjects: 3 labelled, 1 for validation, 0 for test\n' in said
    assert '10 scans: 3 labelled (3 subjects), 6 unlabelled (6 subjects), 1 for validation (1 subject)\n' in said
    assert 'Recipe(' in said and 'size=(48, 48)' in said and f'slices: {out}/slices' in said
    assert said.rstrip().endswith(f'next: fastmiseg-train {out} --out {out.parent/"run"}')
    assert '\r' not in said

def test_prepare_names_the_next_command_for_any_folder(ten, tmp_path, monkeypatch, capsys):
    out = tmp_path/'my run'
    out.mkdir()
    monkeypatch.chdir(out)
    for o in ('.','../my run'):
        cli.prepare(str(ten), o, size=[32], spacing=[4.], workers=0, overwrite=True)
        *_,train,given,_,run = shlex.split(capsys.readouterr().out.splitlines()[-1])
        assert (train,given)==('fastmiseg-train', o) and Path(run).resolve()==tmp_path/'run'

def test_train_says_what_it_does(ten, capsys):
    out = ten.parent/'run'
    cli.train(str(ten), str(out), size=[32], epochs=2, n_iters=2, width=2, bs=2, unlabeled_bs=2,
              method='consistency', workers=0)
    said = capsys.readouterr().out
    assert 'method consistency: predictions for x and T(x) agree' in said and 'T: RandomFlips' in said
    assert '2 epochs of 2 steps with 2 labelled and 2 unlabelled slices, on ' in said
    assert 'epoch 1 of 2: train_loss' in said and 'epoch 2 of 2' in said and '\r' not in said and '█' not in said
    assert f'model: {out}/model.safetensors' in said and f'next: fastmiseg-predict {out} SCANS' in said
    cli.predict(str(out), str(ten/'images'/'heart009.nii.gz'), str(ten.parent/'segs'))
    assert '1 segmentation in' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='2'): cli.train(str(ten), str(ten.parent/'run2'), labeled=1, valid=1, test=5)
    assert '--labeled 1, --valid 1, --test 5' in capsys.readouterr().err

def test_fewer_labelled_than_annotated_is_said(ten, capsys):
    Preparation(labeled=2).split(ten)
    assert '1 of 4 annotated subjects is used as unlabelled' in capsys.readouterr().out

def test_a_column_split_is_not_overruled_in_silence(hearts, tmp_path, capsys):
    "It was taken as it is, and the numbers that were asked for were passed over"
    csv = cohort_of(hearts, 6, tmp_path/'c.csv', split=['labeled']*3+['unlabeled','valid','test'])
    with pytest.raises(ValueError, match='^labeled=1: the scans have a column split, which says who is in which part '
                                         'already; leave this out, or take the column away for a new split$'):
        prepare_run(csv, tmp_path/'run', labeled=1)
    with pytest.raises(SystemExit, match='2'): cli.train(str(csv), str(tmp_path/'run'), labeled=1, valid=2)
    assert '--labeled 1, --valid 2: the scans have' in capsys.readouterr().err and not (tmp_path/'run').exists()
    with pytest.raises(ValueError, match='^test=2: the scans have a column split'):
        Preparation(test=2).folds(load_cohort(csv, 'csv'), 2)
    assert len(Preparation(labeled=1).folds(load_cohort(csv, 'csv'), 3))==3

def test_folds(ten, capsys, monkeypatch):
    "A model for each; each annotated subject validates once; interrupted and gone on"
    out = ten.parent/'folds'
    kw = dict(size=[32], epochs=1, n_iters=2, width=2, bs=2, unlabeled_bs=2, method='consistency', workers=0)
    export,done = C.export_segmenter,[]
    def stop(learn, path, **kwargs):
        if len(done)==1: raise KeyboardInterrupt
        done.append(path)
        return export(learn, path, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(C, 'export_segmenter', stop)
        with pytest.raises(KeyboardInterrupt): train_run(ten, out, folds=4, **kw)
    assert sorted(o.name for o in out.iterdir())==['config.json','fold0','fold1','fold2','fold3','slices','split.csv']
    first = (out/'fold0'/'model.safetensors').stat().st_mtime_ns
    file = out/'fold0'/'metrics.csv'
    one = read_scores(file)
    one.assign(subject='001', **{'class':one['class'].replace('class1', 'NA')}).to_csv(file, index=False)
    about = json.loads(file.with_suffix('.json').read_text())
    file.with_suffix('.json').write_text(json.dumps({**about, 'problems':{'heart007': 'is damaged'}}))
    with pytest.raises(SystemExit, match='1'): cli.train(out=str(out), resume=True, workers=0)
    assert (out/'fold0'/'model.safetensors').stat().st_mtime_ns==first
    said,err = capsys.readouterr()
    assert 'heart007: is damaged\n1 scans could not be used' in err
    assert read_scores(out/'metrics.csv').attrs['problems']=={'heart007': 'is damaged'}
    assert '001' in set(read_scores(out/'metrics.csv').subject) and ' NA ' in said
    assert f'{out/"fold0"} (1 of 4)\nis finished' in said and f'{out/"fold3"} (4 of 4)' in said and 'fold' in said
    parts = [load_cohort(out/f'fold{k}'/'split.csv', 'csv') for k in range(4)]
    assert len({o.scan[o.split=='valid'].item() for o in parts})==4
    scores = pd.read_csv(out/'metrics.csv')
    assert scores.scan.nunique()==4 and sorted(scores.fold.unique())==[0,1,2,3]
    evaluate_run(out/'fold0', split='labeled', flips=True, progress=False)
    assert set(resume_run(out, workers=0).split)=={'valid'} # not the scores that have taken the place of its own
    assert set(read_scores(file).split)=={'valid'} and (out/'fold0'/'model.safetensors').exists()
    with pytest.raises(FileExistsError, match='there is a run already'): train_run(ten, out, folds=4, **kw)
    again = train_run(ten, out, folds=2, overwrite=True, **kw)
    assert (sorted(o.name for o in out.iterdir())==['config.json','fold0','fold1','metrics.csv','metrics.json','slices',
                                                       'split.csv'] and again.scan.nunique()==4)
    assert not read_scores(out/'metrics.csv').attrs['problems']
    assert not again.attrs['left_out'] and not read_scores(out/'metrics.csv').attrs['left_out']

def test_folds_of_what_is_prepared(prepared, tmp_path, monkeypatch):
    "Its test scans stay, masks that were put aside are not used"
    train_run(prepared, tmp_path/'run', folds=2, workers=0, **{**tiny, 'method':'consistency'})
    before = load_cohort(prepared/'split.csv', 'csv').set_index('scan').split
    for k in range(2):
        now = load_cohort(tmp_path/'run'/f'fold{k}'/'split.csv', 'csv').set_index('scan').split
        assert (set(now.index[now=='test'])==set(before.index[before=='test'])
                and set(now.index[now=='unlabeled'])==set(before.index[before=='unlabeled']))
    whole,one = (predict_scans(o, prepared/'split.csv', tmp_path/o.name, probabilities=True, progress=False)
                 for o in (tmp_path/'run', tmp_path/'run'/'fold0'))
    two = predict_scans(tmp_path/'run'/'fold1', prepared/'split.csv', tmp_path/'fold1',
                        probabilities=True, progress=False)
    read = lambda df, folder: read_volume(tmp_path/folder/f'{df.scan[0]}_probabilities.nii.gz', channels=True).array
    np.testing.assert_allclose(read(whole, 'run'), (read(one, 'fold0')+read(two, 'fold1'))/2, atol=1e-5)
    assert set(evaluate_run(tmp_path/'run', out=tmp_path/'scores', progress=False).split)=={'test'}
    with pytest.raises(KeyboardInterrupt): # in the first fold; the second one has heard of nothing yet
        resume_run(tmp_path/'run', 0, cbs=[CtrlC()], epochs=2)
    resume_run(tmp_path/'run', 0)
    for o in ('fold0','fold1'):
        assert len(pd.read_csv(tmp_path/'run'/o/'log.csv'))==read_config(tmp_path/'run'/o)['train'].epochs==2
    assert 'changed' not in (tmp_path/'run'/'config.json').read_text()
    assert read_config(tmp_path/'run')['train'].epochs==2
    evaluate_run(tmp_path/'run', progress=False)
    resume_run(tmp_path/'run', 0) # whose scores are those of the folds again
    with pytest.raises(FileExistsError, match='exists, with other scores'):
        evaluate_run(tmp_path/'run', overwrite=False, progress=False)
    monkeypatch.setattr(C, 'fit', None)
    assert set(resume_run(tmp_path/'run', 0, epochs=2).fold)=={0,1}
    with pytest.raises(CohortError, match='folds=9'): train_run(prepared, tmp_path/'more', folds=9, workers=0, **tiny)
    assert not (tmp_path/'more').exists()

def test_scans_that_a_run_knows_keep_their_part(run, prepared, hearts, tmp_path):
    "The scans of the training are left out where a whole folder is evaluated, and a copy of none is taken for another"
    df = load_cohort(prepared/'split.csv', 'csv').drop(columns='split')
    scores = evaluate_run(run, save_cohort(df, tmp_path/'all.csv'), tmp_path/'out', progress=False)
    assert scores.groupby('split').scan.nunique().to_dict()==dict(test=2, valid=2)
    scores = evaluate_run(run, tmp_path/'all.csv', tmp_path/'labeled', split='labeled', progress=False)
    assert set(scores.split)=={'labeled'}
    others = hearts.df[8:10].drop(columns='split')
    others.attrs.update(hearts.df.attrs)
    scores = evaluate_run(run, save_cohort(others, tmp_path/'b.csv'), tmp_path/'b', progress=False)
    assert set(scores.split)=={'unknown'}

def test_copies_of_training_scans_are_known_by_their_voxels(run, prepared, hearts, tmp_path, capsys):
    "Under another name, in another format or compression; by the run, and by the model file alone"
    df = load_cohort(prepared/'split.csv', 'csv')
    old,new = df[df.split=='labeled'][:2],hearts.df[8:9].drop(columns='split')
    (tmp_path/'c').mkdir()
    files = [str(write_volume(read_volume(o), tmp_path/'c'/name)) for o,name in zip(old.image, ('x.mha','y.nii'))]
    mixed = pd.concat([old.drop(columns='split').assign(image=files, scan=['x','y'], subject=['x','y']), new],
                      ignore_index=True)
    mixed.attrs.update(df.attrs)
    for o in ('scans.csv','copies.csv'): save_cohort(mixed[:2 if o=='copies.csv' else 3], tmp_path/o)
    for model,names in ((run, f'(x of {old.scan.iloc[0]}, y of {old.scan.iloc[1]})'),
                        (run/'model.safetensors', '(x, y)')):
        out = tmp_path/f'out of {model.name}'
        with pytest.warns(UserWarning) as said: scores = evaluate_run(model, tmp_path/'scans.csv', out, progress=False)
        assert any('2 scans have the voxels of some that the network was trained on, under another name or '
                   f"in another file {names}: left out; split='all' scores them, too" in str(o.message) for o in said)
        assert set(scores.scan)==set(new.scan) and scores.attrs['left_out']=={'copies of training scans':2}
        with pytest.raises(SystemExit, match='2'):
            cli.evaluate(str(model), str(tmp_path/'copies.csv'), str(tmp_path/'none'))
        assert ("nothing new is left to score. Give other scans, or score these with --split 'all'"
                in capsys.readouterr().err)
    assert evaluate_run(run, tmp_path/'scans.csv', tmp_path/'all', split='all', progress=False).scan.nunique()==3
    cli.predict(str(run/'model.safetensors'), str(tmp_path/'scans.csv'), str(tmp_path/'segs'))
    assert ('2 of 3 scans were in the training of the model (x, y): how well these came out says little about others'
            in capsys.readouterr().out)
    both = load_segmenter([run/'model.safetensors', shutil.copy(run/'model.safetensors', tmp_path/'twin.safetensors')])
    assert (len(both.about['training']['voxels'])
            ==len(load_segmenter(run/'model.safetensors').about['training']['voxels'])
            ==(df.split.isin(['labeled','unlabeled'])).sum())

# -- files that change between two commands --------------------------------------------------------------------------
@pytest.fixture
def files(hearts, tmp_path):
    "Copies of six hearts, prepared; and what to train with"
    rows = []
    for r in hearts.df[:6].itertuples():
        new = {k:shutil.copy(o, tmp_path/f'{r.scan}_{k}.nii.gz') for k,o in (('image',r.image), ('mask',r.mask))}
        rows.append(dict(subject=r.subject, scan=r.scan, **{k:str(o) for k,o in new.items()}))
    df = pd.DataFrame(rows, dtype=object).assign(split=['labeled','labeled','unlabeled','unlabeled','valid','test'])
    df.attrs.update(hearts.df.attrs)
    prepare_run(save_cohort(df, tmp_path/'six.csv'), tmp_path/'prepared',
                recipe=replace(hearts.recipe, spacing=4., size=32), workers=0)
    return df,dict(tiny, workers=0, method='consistency')

def other_image(path):
    "The same size, and other values"
    vol = read_volume(path)
    write_volume(vol.like(vol.array[:,::-1].copy()), path)

class Stop(Callback):
    "An interrupt when an epoch begins"
    order = 99
    def __init__(self, at=0): self.at = at
    def before_epoch(self):
        if self.epoch==self.at: raise KeyboardInterrupt

def test_files_that_change_between_preparing_and_training(files, tmp_path):
    "Another image, the mask of another size, the same bytes once more, and a file that is gone"
    df,kw = files
    os.utime(df['mask'][1])
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='(?s).*has changed')
        with pytest.raises(KeyboardInterrupt): train_run(tmp_path/'prepared', tmp_path/'same', cbs=[Stop()], **kw)
    other_image(df.image[2])
    with pytest.warns(UserWarning, match=f'{df.image[2]}: this image has changed since its slices were prepared; '
                                         'they were made anew'):
        with pytest.raises(KeyboardInterrupt): train_run(tmp_path/'prepared', tmp_path/'new', cbs=[Stop()], **kw)
    vol = read_volume(df['mask'][0])
    write_volume(vol.like(vol.array[:,:-1].copy()), df['mask'][0])
    with pytest.raises(VolumeError, match=f'{df["mask"][0]}: has .* voxels .*but {df.image[0]} has'):
        train_run(tmp_path/'prepared', tmp_path/'cut', **kw)
    Path(df.image[3]).unlink()
    with pytest.raises(VolumeError, match=f'(?s)2 of 5 scans cannot be used.*{df.image[3]}: does not exist'):
        train_run(tmp_path/'prepared', tmp_path/'gone', **kw)

def test_files_that_change_before_a_training_goes_on(files, tmp_path):
    "Labelled, unlabelled or for validation: named; and with the files of before the training goes on"
    df,kw = files
    with pytest.raises(KeyboardInterrupt):
        train_run(tmp_path/'prepared', tmp_path/'run', cbs=[Stop(1)], **{**kw, 'epochs':2})
    for kind,i in (('image',0), ('mask',1), ('image',2), ('mask',4)):
        before = Path(df[kind][i]).read_bytes()
        other_image(df[kind][i])
        said = (rf'other files of scans:\n  slices of the {kind} of {df.scan[i]}: \w{{8}}, here \w{{8}} '
                rf'\({df[kind][i]}\)\nPut the files of before back')
        with pytest.raises(ValueError, match=said): resume_run(tmp_path/'run', 0)
        Path(df[kind][i]).write_bytes(before)
    assert len(resume_run(tmp_path/'run', 0)) and len(pd.read_csv(tmp_path/'run'/'log.csv'))==2

def test_files_that_change_after_a_fold_is_finished(files, tmp_path):
    "Its model is not averaged with those of other masks: named; and without its checkpoints the fold begins anew"
    df,kw = files
    out = tmp_path/'run'
    train_run(tmp_path/'prepared', out, folds=2, **{**kw, 'method':'partial'})
    own = load_cohort(out/'fold0'/'split.csv', 'csv')
    changed = own[own.split=='labeled'].iloc[0]
    for k in ('model.safetensors','metrics.csv'): (out/'fold1'/k).unlink() # as if it were killed
    other_image(changed['mask'])
    said = rf"(?s)fold0.*mask of {changed.scan}: .*delete {out/'fold0'/'checkpoints'}, or give another path"
    with pytest.raises(ValueError, match=said): resume_run(out, 0)
    for k in range(2): shutil.rmtree(out/f'fold{k}'/'checkpoints')
    resume_run(out, 0)
    before = [(out/f'fold{k}'/'model.safetensors').stat().st_mtime_ns for k in range(2)]
    resume_run(out, 0)
    assert before==[(out/f'fold{k}'/'model.safetensors').stat().st_mtime_ns for k in range(2)]

"What commands say while they work"
import re, time

import fastprogress.fastprogress as bars
import pytest

from fastmiseg import cli, progress
from fastmiseg.progress import EpochLines, lines_instead_of_bars, peak_memory, span
from fastmiseg.settings import Settings
from fastmiseg.training import fit

tiny = Settings(epochs=2, n_iters=10, width=2, bs=2, unlabeled_bs=2, method='consistency')

def some(hearts):
    df = hearts.df.reset_index(drop=True)
    df.attrs.update(hearts.df.attrs)
    return df.assign(split=['labeled']*2 + ['unlabeled']*3 + ['valid']*2 + ['other']*(len(df)-7))

def test_bars_become_lines(capsys):
    "Whole lines, now and then; afterwards bars are bars"
    before = dict(vars(bars.ConsoleProgressBar))
    with lines_instead_of_bars(every=.05):
        for _ in bars.ConsoleProgressBar(range(5)): time.sleep(.04)
        for _ in bars.ConsoleProgressBar(range(3), display=False): pass
    said = capsys.readouterr().out
    assert '\r' not in said and '█' not in said
    lines = said.splitlines()
    assert lines[-1]=='5 of 5' and 2<=len(lines)<=4 and all(' of 5, ' in o and o.endswith(' to go') for o in lines[:-1])
    assert dict(vars(bars.ConsoleProgressBar))==before and not hasattr(bars, 'print')

def test_lines_of_a_training(hearts):
    "The time to go and the memory once, then a line for each epoch, counted from 1"
    said = []
    fit(tiny, some(hearts), hearts.recipe, hearts.root/'slices', workers=0, quiet=True,
        more=[EpochLines(first=0., say=said.append)])
    assert said[0].startswith('about ') and ' to go on this machine (' in said[0] and 'GB of memory so far' in said[0]
    assert [o.split(':')[0] for o in said[1:]]==['epoch 1 of 2','epoch 2 of 2']
    assert (all(k in said[1] for k in ('train_loss','valid_loss','dice','consistency'))
            and 'to go' in said[1] and 'to go' not in said[2])

def test_in_the_place_of_the_table(hearts, capsys):
    with lines_instead_of_bars():
        learn,_ = fit(tiny, some(hearts), hearts.recipe, hearts.root/'slices', workers=0, more=[EpochLines(first=0.)])
    said = capsys.readouterr().out
    assert said.count('epoch')==2 and '\r' not in said and any(o.startswith('about ') for o in said.splitlines())
    assert not isinstance(getattr(learn.logger, '__self__', None), EpochLines) # the learner's own table is back

def test_long_trainings_say_what_would_be_shorter():
    assert progress._shorter((512,512), 13*3600, 1., False)=='; with --size 256 about 3 hours'
    assert progress._shorter((512,512), 600, 1., True)=='' and progress._shorter((96,96), 10**6, 40., True)==''
    assert (progress._shorter((512,512), 36*60, 36., True)
            =='; with --size 256 about 9 minutes; --precision bf16 is faster on this processor')

def test_words_and_bytes():
    assert span(.4)=='0 seconds' and span(89)=='89 seconds' and span(3*3600)=='3 hours' and span(3600*35)=='35 hours'
    assert 10**7<peak_memory()<10**12

@pytest.mark.parametrize('text,typed', [
    ('leave them out with skip_bad=True:', 'leave them out with --skip-bad:'),
    ("give subject='^(.+)_' (a regular expression", "give --subject '^(.+)_' (a regular expression"),
    ('Put all of them in one part, or allow it with load_cohort(..., straddle=True)',
     'Put all of them in one part, or allow it with --straddle'),
    ("choose one with suffix='T1w'", "choose one with --suffix 'T1w'"),
    ('labeled=9, valid=2: too many', '--labeled 9, --valid 2: too many'),
    ('names of files in the column `mask`', 'names of files in the column `mask`'),
    ('give the Recipe a larger `size`', 'give the Recipe a larger --size'),
    ('x exists; choose another place, or replace with overwrite',
     'x exists; choose another place, or replace with --overwrite'),
    ('there is a run already; choose another folder, resume it, or overwrite it',
     'there is a run already; choose another folder, go on with --resume, or replace it with --overwrite'),
    ('onto the image (`resample(mask, to=image, nearest=True)`), or',
     'onto the image (`resample(mask, to=image, nearest=True)`), or'),
    ('Expected a folder `images` (and `masks`) with scans', 'Expected a folder `images` (and `masks`) with scans'),
    ('give the argument `images`', 'give the argument --images'),
    ('df: no scan has a mask', 'DATA: no scan has a mask'),
    ("/data/a#series=T1&phase=2: series='T1' fits", "/data/a#series=T1&phase=2: --series 'T1' fits"),
    ("one: Recipe(classes=('a', 'b'), labels={1: 1}) or Recipe(labels=...)",
     "one: Recipe(classes=('a', 'b'), labels={1: 1}) or Recipe(labels=...). For a command a Recipe is a JSON file of "
     'what it is to say, --recipe FILE: {"labels": {"255": 1}}'),
    ('say with `labels` (of load_cohort or Recipe)', 'say with `labels` (of load_cohort or Recipe)'),
    ('/data/seed=1/test=2.nii: is bad', '/data/seed=1/test=2.nii: is bad'), ('test: is empty', '--test: is empty')])
def test_errors_in_the_words_of_the_command(text, typed):
    assert cli.as_typed(text, cli.options_in(cli.train))==typed

def test_a_scan_is_not_warned_about_again_after_the_summary(capsys):
    "Figures read scans that were read before; another oddity, or a second file without a summary, is said"
    from fastmiseg.scans.messages import VolumeWarning, tell_warnings, warn_scan
    odd = [VolumeWarning(f'{i}.nii', f'has spacings ({i}.5, 10) mm in pixdim') for i in range(3)]
    with cli.polite('fastmiseg-train'):
        warn_scan('8.nii', 'is cut off at 8 mm')
        warn_scan('9.nii', 'is cut off at 9 mm')
        tell_warnings('3 scans', 'while they were read:', odd)
        warn_scan('2.nii', 'has spacings (2.5, 10) mm in pixdim')
        warn_scan('2.nii', 'is upside down')
    said = capsys.readouterr().err
    assert said.count('in pixdim')==1 and re.search('3 files, for example [^:]+: has spacings', said)
    assert said.count('is cut off')==2 and 'warning: 2.nii: is upside down' in said

def test_warnings_once_and_in_words(capsys):
    import warnings
    with cli.polite('fastmiseg-train', options=['skip_bad']):
        for _ in range(3): warnings.warn('two scans are odd; leave them out with skip_bad=True')
    assert capsys.readouterr().err=='fastmiseg-train: warning: two scans are odd; leave them out with --skip-bad\n'

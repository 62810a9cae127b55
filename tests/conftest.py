"""What several tests share"""
import locale, os, signal
from types import SimpleNamespace

import pytest, torch

if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1') # kernels run in Python; read at import

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

@pytest.fixture(autouse=True)
def same_locale():
    "ITK's JPEG encoder, with which tests write scans, leaves the process in another locale"
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)

@pytest.fixture(scope='session')
def hearts(tmp_path_factory):
    "A small cohort of phantoms: root, df, recipe"
    from fastmiseg.scans.split import split_cohort
    from fastmiseg.scans.phantom import make_phantom
    from fastmiseg.scans.recipe import Recipe
    root = tmp_path_factory.mktemp('heart')
    df = split_cohort(make_phantom(root/'scans', n_subjects=12, seed=0), labeled=9, valid=2, test=1, seed=0)
    recipe = Recipe(spacing=2., size=(64,64), classes=df.attrs['classes'], flip='hv', rotate=30., jitter=.1)
    return SimpleNamespace(root=root, df=df, recipe=recipe)

@pytest.fixture(scope='session')
def heart(hearts):
    "The same, and a U-Net that has learned a little of them: learn"
    from fastai.basics import set_seed
    from fastmiseg.data import MISegDataLoaders
    from fastmiseg.learner import miseg_learner
    dls = MISegDataLoaders.from_cohort(hearts.df, hearts.recipe, store=hearts.root/'slices',
                                       bs=8, n_iters=120, workers=0)
    set_seed(0)
    learn = miseg_learner(dls, width=8, path=hearts.root)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, 2e-2)
    return SimpleNamespace(**vars(hearts), learn=learn)

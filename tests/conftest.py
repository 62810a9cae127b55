"""What several tests share"""
from types import SimpleNamespace

import pytest

@pytest.fixture(scope='session')
def heart(tmp_path_factory):
    "A small cohort of phantoms, and a U-Net that has learned a little of them: root, df, recipe, learn"
    from fastai.basics import set_seed
    from fastmiseg.cohort import split_cohort
    from fastmiseg.data import MISegDataLoaders
    from fastmiseg.learner import miseg_learner
    from fastmiseg.phantom import make_phantom
    from fastmiseg.slices import Recipe
    root = tmp_path_factory.mktemp('heart')
    df = split_cohort(make_phantom(root/'scans', n_subjects=12, seed=0), labeled=9, valid=2, test=1, seed=0)
    recipe = Recipe(spacing=2., size=(64,64), classes=df.attrs['classes'], flip='hv', rotate=30., jitter=.1)
    dls = MISegDataLoaders.from_cohort(df, recipe, store=root/'slices', bs=8, n_iters=120, workers=0)
    set_seed(0)
    learn = miseg_learner(dls, width=8, path=root)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, 2e-2)
    return SimpleNamespace(root=root, df=df, recipe=recipe, learn=learn)

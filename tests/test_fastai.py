"What fastai offers around a training works with paired batches and metrics of whole scans, or a sentence says why not"
import math
from types import SimpleNamespace

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from fastai.basics import DataLoaders
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.interpret import ClassificationInterpretation, Interpretation, SegmentationInterpretation

from fastmiseg.callback.baselines import ConsistencyCallback
from fastmiseg.callback.log import TrainingLogCallback, training_log
from fastmiseg.data import MISegDataLoaders
from fastmiseg.learner import miseg_learner
from fastmiseg.losses import CrossEntropyDiceLoss
from fastmiseg.metrics import VolumeDice
from fastmiseg.scans.split import split_cohort
from fastmiseg.scans.phantom import make_phantom
from fastmiseg.scans.recipe import Recipe
from fastmiseg.surface import VolumeHD95
from toy import learner, loaders, quiet

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Six hearts of few pixels, and loaders for them"
    root = tmp_path_factory.mktemp('tiny')
    df = split_cohort(make_phantom(root/'scans', n_subjects=6, seed=0), labeled=2, valid=1, test=1, seed=0)
    recipe = Recipe(spacing=4., size=(32,32), flip='hv', classes=df.attrs['classes'])
    dls = MISegDataLoaders.from_cohort(df, recipe, store=root/'s', bs=2, unlabeled_bs=3, n_iters=2, workers=0,
                                         augment=None)
    return SimpleNamespace(root=root, df=df, dls=dls)

def new(tiny, **kw): return quiet(miseg_learner(tiny.dls, width=2, metrics=VolumeDice(), path=tiny.root, **kw))

@pytest.fixture(scope='module')
def trained(tiny):
    learn = new(tiny)
    learn.fit(1)
    return learn

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

def by_hand(learn, dl):
    "Mean Dice of whole scans, from predictions and masks"
    preds,masks = learn.get_preds(dl=dl)
    wins,scan,dices = preds.argmax(1),torch.cat([y.scan for _,y in dl]),[]
    for c in range(1, preds.shape[1]):
        sums = [(2*((wins==c)&(masks==c))[scan==k].sum(), (wins==c)[scan==k].sum()+(masks==c)[scan==k].sum())
                for k in scan.unique()]
        dices.append(np.mean([float(a/b) if b else 1. for a,b in sums]))
    return np.mean(dices)

@pytest.mark.parametrize('metric', [VolumeDice, VolumeHD95])
def test_a_metric_that_has_seen_no_batch(metric):
    assert math.isnan(metric().value)
    with pytest.raises(ValueError, match='has seen no batch with a mask; run learn.validate'): metric().to_frame()

def test_summary(trained): assert 'Total params' in str(trained.summary())

def test_predictions_of_unlabelled_slices(trained, tiny):
    dl = tiny.dls.test_dl(tiny.df[tiny.df.split=='unlabeled'])
    preds,targets = trained.get_preds(dl=dl)
    assert len(preds)==sum(len(x) for x, in dl) and targets is None
    torch.testing.assert_close(preds.sum(1), torch.ones_like(preds[:,0]))

def test_validation_of_other_scans(trained, tiny):
    dl = tiny.dls.test_dl(tiny.df[tiny.df.split=='test'], with_labels=True)
    loss,dice = trained.validate(dl=dl)
    assert np.isfinite(loss) and dice==pytest.approx(by_hand(trained, dl))
    with pytest.raises(ValueError, match=r"with_labels: 1 of 6 scans have no mask \('heart001', for one\)"):
        tiny.dls.test_dl(tiny.df.assign(mask=tiny.df['mask'].where(tiny.df.scan!='heart001')), with_labels=True)

def test_validation_without_masks_is_nan(trained, tiny):
    loss,dice = trained.validate(dl=tiny.dls.test_dl(tiny.df[:1]))
    assert loss is None and math.isnan(dice)

def test_validation_of_the_training_slices(trained, tiny):
    dl = tiny.dls.train.new(shuffle=False, drop_last=False)
    assert trained.validate(ds_idx=0)[1]==pytest.approx(by_hand(trained, dl))

def test_predictions_of_the_training_slices(trained, tiny):
    preds,masks = trained.get_preds(dl=tiny.dls.train)
    assert torch.equal(masks, torch.stack([y for _,y in tiny.dls.train.dataset]))
    assert torch.equal(preds, trained.get_preds(ds_idx=0)[0])
    trained.show_results(dl=tiny.dls.train, max_n=2)
    assert len(Interpretation.from_learner(trained, dl=tiny.dls.train).losses)==len(masks)

@pytest.mark.parametrize('ds_idx', [0,1])
def test_show_results(trained, ds_idx):
    trained.show_results(ds_idx=ds_idx, max_n=3)
    titles = [o.get_title() for o in plt.gcf().axes]
    assert len(titles) in (4,6) and titles==['mask']*(len(titles)//2)+['prediction']*(len(titles)//2)

@pytest.mark.parametrize('kind', [Interpretation, SegmentationInterpretation, ClassificationInterpretation])
def test_slices_with_the_largest_losses(trained, tiny, kind):
    found = kind.from_learner(trained)
    losses,which = found.top_losses(3)
    inputs,preds,masks,decoded,again = found[which]
    for k,i in enumerate(which.tolist()):
        x,y = tiny.dls.valid.dataset[i]
        assert torch.equal(inputs[k], x) and torch.equal(masks[k], y)
    assert torch.equal(losses, again) and losses[0]==found.losses.max()
    found.plot_top_losses(3, classes=tiny.dls.vocab)
    fig = plt.gcf()
    assert [o.get_title() for o in fig.axes]==['mask']*3+[f'prediction\nloss {float(o):.3g}' for o in losses]
    assert [o.get_text() for o in fig.legends[0].get_texts()]==list(tiny.dls.vocab)[1:]
    np.testing.assert_array_equal(fig.axes[1].images[0].get_array(), inputs[1][0].cpu())

def test_images_with_the_largest_losses_of_the_recommended_loss(tiny):
    learn = new(tiny, loss_func=CrossEntropyDiceLoss())
    found = Interpretation.from_learner(learn)
    worst,i = found.top_losses(1)
    x,y = tiny.dls.valid.dataset[int(i[0])]
    with torch.no_grad(): logits = learn.model.eval()(x[None].as_subclass(torch.Tensor))
    torch.testing.assert_close(worst[0].as_subclass(torch.Tensor), learn.loss_func(logits, y[None]))
    assert len(learn.get_preds(with_loss=True)[2])==len(tiny.dls.valid.dataset) and learn.loss_func.reduction=='mean'

def test_confusion_of_pixels(trained, tiny):
    found = ClassificationInterpretation.from_learner(trained)
    assert list(found.vocab)==list(tiny.dls.vocab)
    preds,masks = trained.get_preds()
    want = np.zeros((4,4), int)
    np.add.at(want, (masks.flatten().numpy(), preds.argmax(1).flatten().numpy()), 1)
    assert np.array_equal(found.confusion_matrix(), want)
    found.plot_confusion_matrix()
    found.print_classification_report()

def test_averages_over_augmented_slices_are_refused(trained):
    with pytest.raises(ValueError, match='learn.tta: would average .* use predict_volume'): trained.tta()

def test_averages_over_augmented_images_of_others(tmp_path):
    assert len(quiet(learner(tmp_path)).tta(n=1)[0])==5

def test_predict_one_scan(trained, tiny):
    with pytest.raises(ValueError, match='use predict_volume'): trained.predict(tiny.df.image[0])

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('cbs', [[], [ConsistencyCallback]])
def test_mixed_labels_are_refused(tiny, mix, cbs):
    learn = new(tiny)
    with pytest.raises(ValueError, match=f'{mix.__name__}: this callback of fastai .* CopyPasteCallback'):
        learn.fit(1, cbs=[mix(), *(o() for o in cbs)])
    learn.add_cb(mix())
    with pytest.raises(ValueError, match=mix.__name__): learn.fit_one_cycle(1)

def test_learning_rates(tiny):
    learn = new(tiny, cbs=ConsistencyCallback())
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    found = learn.lr_find(num_it=6, show_plot=False)
    assert found.valley>0 and all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

def test_a_folder_of_unlabelled_scans(tiny):
    learn = new(tiny)
    with pytest.warns(UserWarning, match='unlabeled: 1 of its 6 images is one of the validation, whose scores will'):
        learn.fit(1, cbs=ConsistencyCallback(unlabeled=tiny.root/'scans'))
    assert np.isfinite(learn.recorder.values[-1]).all()

class Planned(VolumeDice):
    "A Dice that is what the test says, epoch after epoch"
    def __init__(self, values):
        super().__init__()
        self.planned,self.epochs = list(values),0
    def reset(self):
        super().reset()
        self.epochs = getattr(self, 'epochs', 0)
    @property
    def value(self):
        self.epochs += 1
        return self.planned[self.epochs-1]

def test_the_best_epoch_by_dice(tiny):
    learn,kept = new(tiny),[]
    learn.metrics = [Planned([.2,.5,.3])]
    save = learn.save
    learn.save = lambda *a, **kw: (kept.append(learn.epoch), save(*a, **kw))[1]
    learn.fit(3, cbs=SaveModelCallback(monitor='dice', fname='best'))
    assert kept==[0,1]

def test_stopping_by_dice(tiny):
    learn = new(tiny)
    learn.metrics = [Planned([.2,.5,.3,.4,.9])]
    learn.fit(5, cbs=[EarlyStoppingCallback(monitor='dice', patience=2), ReduceLROnPlateau(monitor='dice', patience=1)])
    assert len(learn.recorder.values)==4

def test_a_log_in_csv(tiny):
    learn = new(tiny)
    learn.fit(1, cbs=[ConsistencyCallback(), CSVLogger(fname='log.csv')])
    assert {'train_loss','valid_loss','dice'}<=set(pd.read_csv(tiny.root/'log.csv').columns)

def test_a_validation_leaves_the_record_of_the_fit(tmp_path):
    "The table of a training had the validation's loss as that of the training, and the metric as its loss"
    learn = quiet(learner(tmp_path, metrics=lambda p,y: (p.argmax(1)==y).float().mean()))
    learn.validate()
    assert training_log(learn).empty
    learn.fit(2, 1e-2)
    log,losses = training_log(learn),list(learn.recorder.losses)
    found = learn.validate()
    learn.get_preds(with_loss=True)
    assert training_log(learn).equals(log) and len(log)==2 and list(learn.recorder.losses)==losses
    assert log.iloc[-1].tolist()[1:]==pytest.approx(list(found))

def test_the_record_of_a_fit_that_begins_later(tmp_path):
    learn = quiet(learner(tmp_path))
    learn.fit(3, start_epoch=2, cbs=ConsistencyCallback())
    log = training_log(learn)
    assert len(log)==3 and log[:2].isna().all(None) and log[2:].notna().all(None) and 'consistency' in log

def test_the_record_of_a_fit_without_validation(tmp_path):
    dls = loaders()
    learn = quiet(learner(tmp_path, dls=DataLoaders(dls.train, dls.valid.new(dls.valid_ds.new_empty()))))
    learn.fit(1, cbs=[ConsistencyCallback(), TrainingLogCallback(tmp_path/'log.csv')])
    log = pd.read_csv(tmp_path/'log.csv')
    assert log.valid_loss.isna().all() and log[['train_loss','consistency']].notna().all(None)

def test_a_validation_leaves_the_names_of_the_record(tmp_path):
    "After a fit with methods the columns of their terms had no names left, and no table and no curves could be made"
    learn = quiet(learner(tmp_path))
    learn.fit(1, cbs=ConsistencyCallback())
    names,log = list(learn.recorder.metric_names),training_log(learn)
    learn.validate()
    learn.get_preds()
    assert learn.recorder.metric_names==names and training_log(learn).equals(log) and 'consistency' in log

def test_a_validation_before_any_fit_has_its_own_names(tmp_path):
    learn = quiet(learner(tmp_path))
    learn.validate()
    assert learn.recorder.metric_names[:3]==['epoch','train_loss','valid_loss']

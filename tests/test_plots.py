"Pictures: in a real kernel, in words, in the same colours, and written while a training runs"
import warnings

import nbformat, numpy as np, pandas as pd, pytest, torch
from fastai.data.transforms import Normalize
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.text import Text
from nbclient import NotebookClient

from fastmiseg.callback.log import TrainingLogCallback, meaning_of, plot_training
from fastmiseg.viewing import plot_volume
from fastmiseg.plots import plot_clusters, plot_joints, plot_scores, plot_tsne
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.volume import Volume
from fastmiseg.show import class_color, show_slice
from toy import learner, quiet, small_mireg

set_up = '''
import sys, warnings
warnings.simplefilter('ignore')
from matplotlib import pyplot as plt
from fastmiseg.all import *
df = split_cohort(make_phantom('scans', n_subjects=4, seed=0), labeled=2, valid=1, seed=0)
recipe = Recipe(spacing=4., size=(32,32), classes=df.attrs['classes'], flip='hv')
dls = MISegDataLoaders.from_cohort(df, recipe, store='slices', bs=2, unlabeled_bs=2, n_iters=2, workers=0)
learn,reg = miseg_learner(dls, width=2, metrics=VolumeDice()),MIRegCallback(n_clusters=2, n_heads=1)
with learn.no_bar(),learn.no_logging(): learn.fit(1, cbs=reg)
held_out = df[df.split=='valid']
scores = evaluate_cohort(learn, held_out, progress=False)
r = held_out.iloc[0]
import numpy as np
from types import SimpleNamespace
from fastmiseg.study.report import plot_study
study = SimpleNamespace(title='A study', x=None, curve=False, draws=False)
rows_of_study = pd.concat([scores.assign(row=k, seed=0, labeled=2) for k in ('ours','other')])
'''
calls = ['plot_scores(scores)', "plot_volume(r.image, r['mask'])", 'plot_training(learn)', 'plot_clusters(learn, reg)',
         'plot_joints(learn, reg)', 'plot_tsne(learn, n=20, images=8)', 'plot_scans(learn, df, scores, n=1)',
         'plot_uncertainty(r.image, np.zeros(read_volume(r.image).shape), r["mask"])',
         'plot_study(rows_of_study, study)']
cells = [ # source, number of pictures
    *[(o, 1) for o in calls],
    ('first = plot_scores(scores)\nsecond = plot_training(learn)', 2),
    ('plot_scores(scores)\nplot_training(learn)', 2),
    ('fig = plot_scores(scores)\nplt.savefig("one.png")\nassert Path("one.png").stat().st_size>10000', 1),
    ('fig', 1),
    ('fig', 1),
    ('plot_scores(scores, out="two.png")', 1),
    ('plot_scores(scores);', 1),
    ('with for_file_only(): plot_scores(scores, out="three.png")', 0),
    ('learn.fit(1, cbs=[reg, ShowGraphCallback()])', 1), # fastai's live curves
    ('assert type(fig).__mro__[1].__name__=="Figure" and not plt.get_fignums()', 0)]

def test_every_picture_appears_once_in_a_real_kernel(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in (set_up, *(o for o,_ in cells))])
    NotebookClient(nb, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}).execute()
    shown = [sum('image/png' in o.get('data', {}) for o in c.outputs) for c in nb.cells[1:]]
    assert shown==[n for _,n in cells], list(zip(shown, cells))
    assert {'one.png','two.png','three.png'}<={o.name for o in tmp_path.iterdir()}

def test_the_first_picture_of_a_kernel(tmp_path):
    "It loads the backend, which makes pyplot interactive"
    draw = 'fig = new_figure((2,2), "a.png"); fig.subplots(); save_figure(fig, "a.png")'
    for first,n in ((draw, 1), (f'with for_file_only(): {draw}', 0)):
        both = [f'from fastmiseg.show import *\n{first}', draw]
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in both])
        NotebookClient(nb, timeout=100, kernel_name='python3',
                       resources={'metadata': {'path': str(tmp_path)}}).execute()
        assert [sum('image/png' in o.get('data', {}) for o in c.outputs) for c in nb.cells]==[n, 1]

def test_a_script_that_writes_files_keeps_no_figure_open(tmp_path):
    plt.close('all')
    plot_training(pd.DataFrame(dict(train_loss=[1.,.5])), out=tmp_path/'a'/'b.png')
    assert (tmp_path/'a'/'b.png').exists() and not plt.get_fignums()

# words, numbers and colours
scores = pd.DataFrame([dict(subject=s, scan=s, dice=.5+.1*i, hd95=np.nan if i else 3., **{'class':c})
                       for i,s in enumerate('ab') for c in ('RV','Myo','LV')])

def test_boxes_say_how_many_scans_they_stand_on_and_which_way_is_better():
    ax = plot_scores(scores, 'hd95').axes[0]
    assert [o.get_text() for o in ax.texts]==['n=1']*3
    assert ax.get_ylabel()=='95 % Hausdorff distance (mm)\nlower is better'
    with pytest.raises(ValueError, match="'f1' is not a column of the scores; there are subject, scan"):
        plot_scores(scores, 'f1')

def test_a_class_has_one_colour_everywhere():
    boxes = [to_hex(o.get_facecolor()) for o in plot_scores(scores).axes[0].patches]
    assert boxes==[class_color(c).lower() for c in (1,2,3)]
    only = plot_scores(scores[scores['class']=='LV'], classes=['background','RV','Myo','LV'])
    assert to_hex(only.axes[0].patches[0].get_facecolor())==class_color(3).lower()
    curves = plot_training(pd.DataFrame(dict(dice=[.5], dice_RV=[.4], dice_Myo=[.5], dice_LV=[.6]))).axes[0].lines
    assert [o.get_color() for o in curves]==[class_color(c) for c in range(4)]
    mask = np.zeros((1,20,20), int)
    mask[0,5:9,5:9] = 3
    fig = plot_volume(Volume(np.random.rand(1,20,20)), mask, zoom=False)
    assert to_hex(fig.axes[0].collections[0].get_edgecolor()[0])==class_color(3).lower()
    groups = plot_scores(pd.concat([scores.assign(by=i) for i in range(6)]), by='by').axes[0].patches
    assert not {to_hex(o.get_facecolor()) for o in groups} & {class_color(c).lower() for c in range(8)}

def test_terms_are_shown_in_words():
    log = pd.DataFrame(dict(global_mi=[-.5], local_mi=[-.1], consistency=[.2], made_up=[1.]))
    axs = plot_training(log).axes
    assert [o.get_title() for o in axs[:4]]==[
        'information between views:\nimages (higher is better)',
        'information between views:\npositions (higher is better)',
        'disagreement of two views\n(lower is better)', 'made up']
    assert axs[0].lines[0].get_ydata()[0]==.5 and axs[2].lines[0].get_ydata()[0]==.2

def test_nothing_of_the_curves_is_cut():
    names = ['dice','dice_right ventricle','dice_myocardium of the left ventricle',
             'global_mi','local_mi','mean_teacher']
    fig = plot_training(pd.DataFrame({k: [.1,.2] for k in ('train_loss','valid_loss',*names)}))
    fig.canvas.draw()
    inside = fig.bbox
    for ax in fig.axes[:5]:
        for o in (ax.title, ax.yaxis.label, ax.get_legend()):
            box = o and o.get_window_extent()
            assert not box or inside.x0<=box.x0<=box.x1<=inside.x1 and inside.y0<=box.y0<=box.y1<=inside.y1, o

def test_names_of_the_rows_of_clusters_are_not_cut(tmp_path):
    learn,reg = quiet(learner(tmp_path)),small_mireg()
    learn.fit(1, cbs=reg)
    fig = plot_clusters(learn, reg)
    fig.canvas.draw()
    boxes = {o.yaxis.label.get_text(): o.yaxis.label.get_window_extent() for o in fig.axes if o.get_ylabel()}
    assert 'slice' in boxes and any(o.startswith('clusters of') for o in boxes)
    for k,o in boxes.items(): assert fig.bbox.x0<=o.x0<o.x1<=fig.bbox.x1, k

def test_every_term_of_the_package_has_words():
    from fastmiseg.methods import methods
    without = {k for m in methods.values() for k in m.weights if not meaning_of(k).better}
    assert not without, f'give them words in `_meanings` of callback.log: {without}'

def test_legends_of_curves_lie_beside_them():
    fig = plot_training(pd.DataFrame(dict(train_loss=[1.,.5], valid_loss=[1.,.6], dice=[.1,.2], dice_RV=[.1,.2])))
    fig.canvas.draw()
    for ax in fig.axes: assert ax.get_legend().get_window_extent().x0>=ax.get_window_extent().x1

def test_the_organ_is_enlarged_and_the_crop_is_framed():
    mask = np.zeros((3,100,80), int)
    mask[1,40:50,30:42] = 1
    fig = plot_volume(Volume(np.random.rand(3,100,80)), mask, recipe=Recipe(spacing=2., size=(40,30)))
    whole,part = fig.axes[:2]
    frame,crop = whole.patches
    left,right = part.get_xlim()
    bottom,top = part.get_ylim()
    assert left<29.5 and right>41.5 and top<39.5 and bottom>49.5 and (right-left)*(bottom-top)<.2*100*80
    assert frame.get_bbox().bounds==pytest.approx((left, top, right-left, bottom-top))
    assert crop.get_bbox().bounds==pytest.approx((9.5, 9.5, 60, 80))

@pytest.mark.parametrize('shape', [(6,8),(1,8)])
def test_a_mask_that_fills_its_slice_is_outlined(shape):
    ax = show_slice(np.zeros((1,*shape)), np.ones(shape, int))
    path, = ax.collections[0].get_paths()
    low,high = path.vertices.min(0),path.vertices.max(0)
    assert np.abs(low+.5).max()<=.5 and np.abs(high-np.array(shape[::-1])+.5).max()<=.5
    assert ax.get_xlim()==(-.5,shape[1]-.5) and ax.get_ylim()==(shape[0]-.5,-.5)

# what has been learned
def test_a_stage_in_one_cluster_is_told_once(tmp_path):
    reg = small_mireg()
    learn = quiet(learner(tmp_path))
    learn.fit(1, cbs=reg)
    def collapse(name):
        head = reg.projector(name).head
        with torch.no_grad():
            head.weight.zero_()
            head.bias.view(reg.n_heads, -1)[:,0] = 9.
    def said(f):
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            f(learn, reg)
        return [str(o.message).split(',')[0] for o in w if 'cluster' in str(o.message)]
    text = 'all its projectors have fallen into one cluster'
    collapse('Upconv3')
    assert said(plot_joints)==[f'Upconv3: {text}'] and said(plot_clusters)==[]
    collapse('Conv5')
    assert said(plot_joints)==[f'Conv5: {text}'] and said(plot_joints)==[]
    plt.close('all')

# while a training runs
def test_the_curves_are_drawn_after_each_epoch(tmp_path):
    from fastai.basics import Callback
    seen = []
    class Look(Callback):
        order = TrainingLogCallback.order+1
        def after_epoch(self): seen.append((tmp_path/'figures'/'training.png').read_bytes())
    open_before = plt.get_fignums()
    log = TrainingLogCallback(tmp_path/'log.csv', tmp_path/'figures'/'training.png')
    quiet(learner(tmp_path)).fit(2, cbs=[small_mireg(), log, Look()])
    assert len(set(seen))==2 and plt.get_fignums()==open_before
    assert list(pd.read_csv(tmp_path/'log.csv'))==[
        'epoch','train_loss','valid_loss','global_mi','local_mi','consistency']

def test_fastais_live_curves_beside_our_callbacks(tmp_path, monkeypatch):
    from fastai.callback.progress import ProgressCallback, ShowGraphCallback
    drawn,before_epoch = [],ProgressCallback.before_epoch
    def watched(self):
        before_epoch(self)
        self.mbar.update_graph = lambda curves, *bounds: drawn.append([len(o[1]) for o in curves])
    monkeypatch.setattr(ProgressCallback, 'before_epoch', watched)
    learner(tmp_path).fit(2, cbs=[small_mireg(), ShowGraphCallback()])
    assert drawn==[[4,1],[8,2]] # losses of the steps so far, and of the validations
    learn = learner(tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[small_mireg(), ShowGraphCallback()])
    assert len(drawn)==2 and len(learn.recorder.values)==1 # it trains, and draws nothing

def test_slices_beside_clusters_are_shown_as_they_were_before_they_were_normalized(tmp_path):
    learn,reg = quiet(learner(tmp_path)),small_mireg()
    learn.fit(1, cbs=reg)
    def grey(): return plot_clusters(learn, reg, n=2).axes[0].images[0].get_array()
    before = grey()
    for dl in learn.dls.loaders: dl.after_batch.add(Normalize.from_stats([.45], [.2], cuda=False))
    np.testing.assert_allclose(grey(), before, atol=1e-5)

def test_names_of_classes_that_are_an_array(tmp_path):
    "as `np.loadtxt` reads them for fastai's `MaskBlock`"
    learn,reg = quiet(learner(tmp_path)),small_mireg()
    learn.fit(1, cbs=reg)
    for f in (plot_clusters,plot_joints):
        with pytest.raises(ValueError, match='head=2: each stage has 2 projectors, expected 0 to 1'):
            f(learn, reg, head=2)
    learn.dls.vocab = np.array(['background','disc'])
    assert [o.get_text() for o in plot_clusters(learn, reg, n=2).legends[0].get_texts()]==['disc']
    names = [o.get_text() for o in plot_tsne(learn, n=20, images=8).legends[0].get_texts()]
    assert [o.split(' (')[0] for o in names]==['background','disc']

def test_tsne_of_features_that_are_all_the_same(tmp_path):
    "scikit-learn's own start is NaN then, on which its tree ends the process"
    learn = learner(tmp_path)
    for p in learn.model.Upconv2.parameters(): p.data.zero_()
    z = np.concatenate([o.get_offsets() for o in plot_tsne(learn, n=20, images=8).axes[0].collections])
    assert np.isfinite(z).all()

# fastai's loggers
terms = ['valid_loss','global_mi','local_mi','consistency','dice']

def logged(path, cb, net=None):
    "The log of a small training beside `cb`"
    from fastmiseg.callback.log import training_log
    from fastmiseg.metrics import VolumeDice
    learn = quiet(learner(path, metrics=VolumeDice()))
    learn.fit(2, cbs=[small_mireg(), cb])
    log = training_log(learn)
    assert set(log)=={'train_loss',*terms} and log.notna().all(axis=None)
    return log

def test_csv_logger_has_every_term_and_the_dice(tmp_path):
    from fastai.callback.progress import CSVLogger
    log,table = logged(tmp_path, CSVLogger()),pd.read_csv(tmp_path/'history.csv')
    for k in terms: assert table[k].tolist()==pytest.approx(log[k].tolist())

def test_tensorboard_has_every_term_and_the_dice(tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = logged(tmp_path, TensorBoardCallback(tmp_path/'events', log_preds=False))
    events = EventAccumulator(str(tmp_path/'events'))
    events.Reload()
    for k in terms: assert [o.value for o in events.Scalars(k)]==pytest.approx(log[k].tolist(), rel=1e-5), k

def test_weights_and_biases_have_every_term_and_the_dice(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb', reason='wandb is not installed')
    from fastai.callback.wandb import WandbCallback
    sent = []
    monkeypatch.setenv('WANDB_SILENT', 'true')
    run = wandb.init(mode='offline', dir=tmp_path)
    monkeypatch.setattr(wandb, 'log', lambda o, **kw: (sent.append(dict(o)), run.log(o, **kw)))
    try: log = logged(tmp_path, WandbCallback(log_preds=False))
    finally:
        summary = dict(run.summary)
        run.finish()
    for k in terms:
        assert [o[k] for o in sent if k in o]==pytest.approx(log[k].tolist())
        assert summary[k]==pytest.approx(log[k].iloc[-1])
    assert list(tmp_path.rglob('*.wandb'))

def test_names_with_dollar_signs_are_no_formulas():
    a,b = 'cost_$_1$',r'b$\d$'
    scores = pd.DataFrame({'class':[a,b], 'dice':[.5,.6], 'training':[b,b]})
    mask = np.array([[[0,1],[2,0]]])
    for fig in (plot_scores(scores, by='training'), plot_volume(Volume(np.random.rand(1,2,2)), mask, classes=['',a,b])):
        fig.canvas.draw()
        texts = fig.findobj(lambda o: isinstance(o, Text) and '$' in o.get_text())
        assert texts and not any(o._preprocess_math(o.get_text())[1] for o in texts)

def test_scores_that_are_of_no_box():
    scores = pd.DataFrame({'class':list('aabb'), 'dice':[.8,.7,0,.6], 'training':['x','x','y',None]})
    with pytest.raises(ValueError, match="by: 'method' is not a column of the scores; there are class, dice, training"):
        plot_scores(scores, by='method')
    with pytest.raises(ValueError, match="by: 1 of 4 rows have nothing in the column 'training' and are of no box"):
        plot_scores(scores, by='training')
    with pytest.raises(ValueError, match="classes: the scores hold 'a', which is none of background, b; give all"):
        plot_scores(scores, classes=['background','b'])
    assert len(plot_scores(scores, classes=np.array(['background','a','b'])).axes[0].patches)==2

def test_a_missed_class_is_counted_beside_the_distances():
    from fastmiseg.plots import plot_scores
    scores = pd.DataFrame({'class':list('aabb'), 'dice':[.8,.7,0,.6], 'hd95':[3.,4.,np.nan,5.]})
    said = lambda metric: [o.get_text() for o in plot_scores(scores, metric).axes[0].texts]
    assert said('hd95')==['n=2','n=1\n1 missed'] and said('dice')==['n=2','n=2']
    scores.loc[2,'hd95'] = np.inf # as missed='inf' says it
    assert said('hd95')==['n=2','n=1\n1 missed']

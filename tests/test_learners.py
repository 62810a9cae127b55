"Regularisers on learners that people have: networks, data, optimisers and callbacks that know nothing of them"
import itertools
from contextlib import suppress
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Adam, Callback, CancelStepException, OptimWrapper, SGD, Transform, params
from fastai.callback.core import CancelBatchException
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import minimum, slide, steep, valley
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import ranger
from fastai.vision.learner import unet_learner
from fastmiseg.callback.baselines import ConsistencyCallback
from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.method import SemiSupCallback, sigmoid_rampdown, sigmoid_rampup
from fastmiseg.callback.paired import PairedBatchCallback
from fastmiseg.callback.pseudo import PseudoLabelCallback
from fastmiseg.callback.step import Step
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.data import SemiSupDataBlock
from fastmiseg.learner import Bfloat16Callback
from fastmiseg.models import create_unet, find_stages, stages
from fastmiseg.transforms import Pool, Transformation
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from toy import UNet, disc, hooks, learner, loaders, quiet, small_mireg

def values(ps): return [p.detach().clone() for p in ps]
def equal(ps, before): return all(torch.equal(p, o) for p,o in zip(ps, before, strict=True))

class Odd(SemiSupCallback):
    "A term that is no number at step 2"
    def __init__(self): super().__init__(odd=1.)
    def penalty(self, step): return step.logits['tx'].mean()*(float('nan') if self.train_iter==2 else 1)

def moved(cb, before): return any(not torch.equal(a, b) for a,b in zip(cb.projectors.parameters(), before))

@pytest.fixture(scope='module')
def rgb(tmp_path_factory):
    "RGB images and masks in folders, as fastai's users have them"
    from PIL import Image
    root,rng = tmp_path_factory.mktemp('rgb'),np.random.default_rng(0)
    for d in ('images','masks','more','other'): (root/d).mkdir()
    for i in range(12):
        y = np.zeros((32,32), np.uint8); y[8:20,4+i:16+i] = 1
        image = (rng.integers(0,80,(32,32,3))+120*y[...,None]).astype(np.uint8)
        Image.fromarray(image).save(root/('images' if i<6 else 'more')/f'{i}.png')
        if i<6: Image.fromarray(y).save(root/'masks'/f'{i}.png')
    Image.fromarray(np.zeros((48,32,3), np.uint8)).save(root/'other'/'0.png')
    Image.fromarray(np.zeros((48,32,3), np.uint8)).save(root/'other'/'1.png')
    return root

def unet(rgb, arch=None, batch_tfms=None, **kw):
    from fastai.vision.all import SegmentationDataLoaders, get_image_files, resnet18, unet_learner
    dls = SegmentationDataLoaders.from_label_func(rgb, get_image_files(rgb/'images'), lambda o: rgb/'masks'/o.name,
        codes=['background','square'], bs=2, valid_pct=.34, seed=0, num_workers=0, batch_tfms=batch_tfms)
    return quiet(unet_learner(dls, arch or resnet18, pretrained=False, n_out=2, **kw))

def files(rgb, d="more"):
    from fastai.vision.all import get_image_files
    return get_image_files(rgb/d)

def test_unlabelled_images_of_the_validation(rgb):
    learn = unet(rgb)
    both = [*files(rgb), *learn.dls.valid_ds.items]
    with pytest.warns(UserWarning, match=f'unlabeled: 2 of its {len(both)} images are of the validation'):
        learn.fit(1, cbs=ConsistencyCallback(unlabeled=both))

def test_unlabelled_images_whose_files_are_not_known(rgb, tmp_path, recwarn):
    "A table's columns were taken for files, and what a data set calls `items` for a list"
    from fastai.vision.all import ColReader, ColSplitter, DataBlock, ImageBlock, IndexSplitter, MaskBlock
    images = files(rgb, 'images').sorted()
    df = pd.DataFrame(dict(image=images, mask=[rgb/'masks'/o.name for o in images], is_valid=[False]*4+[True]*2))
    own = dict(get_x=ColReader('image'), get_y=ColReader('mask'))
    dls = DataBlock((ImageBlock,MaskBlock(['background','square'])), splitter=ColSplitter(), **own).dataloaders(
        df, bs=2, num_workers=0)
    more = pd.DataFrame(dict(image=files(rgb), mask=None, is_valid=False))
    more = DataBlock(ImageBlock, get_x=own['get_x'], splitter=IndexSplitter([])).dataloaders(
        more, bs=2, num_workers=0).train
    learn = quiet(unet_learner(dls, resnet18, pretrained=False, n_out=2))
    learn.fit(1, cbs=ConsistencyCallback(unlabeled=more))
    learn = quiet(learner(tmp_path))
    learn.fit(1, cbs=ConsistencyCallback(unlabeled=DataLoader({i:disc(i)[0] for i in range(6)}, 2)))
    assert not [o for o in recwarn if 'unlabeled' in str(o.message)]

def test_unet_learner_with_files(rgb):
    "Discriminative rates, freeze, unfreeze and fine_tune; the projectors follow the last group"
    learn = unet(rgb)
    cb = small_mireg(unlabeled=files(rgb))
    conv = [(p.detach().clone(),p) for p in params(learn.model[0]) if p.ndim==4]
    learn.freeze()
    learn.fit(1, 1e-3, cbs=cb)
    heads = [p.detach().clone() for p in cb.projectors.parameters()]
    learn.fit(1, 1e-3, cbs=cb)
    assert all(torch.equal(a,b) for a,b in conv) and moved(cb, heads) # a frozen encoder stays, projectors train
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-5,1e-3), cbs=cb)
    assert not all(torch.equal(a,b) for a,b in conv)
    rates = [h['lr'] for h in learn.opt.hypers]
    assert rates==sorted(rates) and rates[0]<rates[-1]
    learn.fine_tune(1, cbs=cb)
    test = learn.dls.test_dl(files(rgb)); assert learn.get_preds(dl=test)[0].shape==(6,2,32,32)

def test_intensities_of_normalised_images(rgb):
    """T changes them as they were before `Normalize`, not what the network gets: that is negative in places, and would
    be cut off"""
    from fastai.vision.all import Normalize, imagenet_stats
    from fastmiseg.transforms import RandomFlips, RandomLight
    class Sees(SemiSupCallback):
        def penalty(self, step):
            seen.append((step.x_u, step.T, step.images['tx']))
            return step.logits['tx'].mean()
    seen,learn = [],unet(rgb, batch_tfms=Normalize.from_stats(*imagenet_stats))
    learn.fit(1, 1e-3, cbs=Sees(unlabeled=files(rgb), T=RandomFlips()+RandomLight(.5), sees=1.))
    mean,std = (torch.tensor(o)[:,None,None] for o in imagenet_stats)
    for x,T,tx in seen:
        assert x.amin()<-1
        torch.testing.assert_close(tx*std+mean, T.images(x*std+mean), atol=1e-4, rtol=0)

def test_unlabelled_files_are_augmented(rgb):
    "As the labelled images are, in every epoch; what is predicted is not"
    from fastai.vision.all import TensorImage
    class Grey(Transform):
        order,split_idx = 99,0
        def encodes(self, x:TensorImage): return x*0+.5
    class Sees(SemiSupCallback):
        def penalty(self, step):
            seen.append(step.x_u.unique().tolist())
            return step.logits['tx'].mean()
    seen,learn = [],unet(rgb, batch_tfms=Grey())
    learn.fit(2, 1e-3, cbs=Sees(unlabeled=files(rgb), sees=1.))
    assert seen==[[.5]]*4
    for dl in (learn.dls.test_dl(files(rgb)), learn.dls.valid): assert len(dl.one_batch()[0].unique())>9

def mask_of(image): return image.parents[1]/'masks'/image.name
def all_three(items):
    own = [i for i,o in enumerate(items) if o.parent.name=='images']
    return own[2:],own[:2],[i for i in range(len(items)) if i not in own]

def test_paired_batches_of_files(rgb, tmp_path):
    """A learner on a `SemiSupDataBlock` of images predicts, and so does what it exports: that had lost the transforms
    that make a batch of an image"""
    from fastai.vision.all import ImageBlock, MaskBlock, Normalize, Resize, imagenet_stats, load_learner
    block = SemiSupDataBlock(blocks=(ImageBlock,MaskBlock(codes=['background','square'])), get_y=mask_of,
        splitter=all_three, item_tfms=Resize(32), batch_tfms=Normalize.from_stats(*imagenet_stats))
    dls = block.dataloaders([*files(rgb, 'images'),*files(rgb)], bs=2, unlabeled_bs=3, n_iters=2, path=tmp_path)
    learn = quiet(learner(tmp_path, net=UNet(3,2,width=2), dls=dls))
    learn.fit(1, 1e-3, cbs=ConsistencyCallback())
    mask,_,probs = learn.predict(files(rgb)[0])
    assert mask.shape==(32,32)
    torch.testing.assert_close(probs, learn.get_preds(dl=dls.test_dl(files(rgb)[:1]))[0][0])
    learn.export('all.pkl')
    other = load_learner(tmp_path/'all.pkl')
    assert torch.equal(other.predict(files(rgb)[0])[2], probs) and not len(other.dls.train_ds)

def test_unlabelled_of_another_size(rgb):
    with pytest.raises(ValueError, match=r'unlabelled images are \(3, 48, 32\) .*labelled ones \(3, 32, 32\)'):
        unet(rgb).fit(1, cbs=small_mireg(unlabeled=files(rgb, 'other')))

def test_a_network_is_no_name_of_one():
    with pytest.raises(ValueError, match=r'arch: is a network \(UNet\), expected the name .* Learner\(dls, net, '):
        create_unet(UNet(1, 2, width=2))

def test_timm_encoder(tmp_path):
    learn = quiet(learner(tmp_path, dls=loaders(size=32),
                          net=create_unet('mobilenetv3_small_050', n_in=1, n_out=2, size=(32,32))))
    learn.fit(1, 1e-3, cbs=[MIRegCallback(n_clusters=3, n_heads=2, global_layers='Conv4', local_layers='Upconv3'),
                            EMATeacherCallback()])
    assert hooks(learn.model)==hooks(create_unet('mobilenetv3_small_050', n_in=1, n_out=2, size=(32,32)))

def test_encoder_that_keeps_its_layers_in_one(tmp_path):
    "The stages of the default layers are found, and train"
    from torchvision.models import vgg11_bn
    net,cb = create_unet(vgg11_bn, n_in=1, n_out=2, size=(32,32)),MIRegCallback(n_clusters=3, n_heads=2)
    assert (net(torch.randn(2,1,32,32)).shape==(2,2,32,32)
            and [s.scale for s in find_stages(net, cb.layers).values()]==[16,2,1])
    learn = quiet(learner(tmp_path, dls=loaders(size=32, n_iters=1), net=net))
    learn.fit(1, 1e-3, cbs=cb)
    assert set(cb.projectors)=={'Conv5','Upconv3','Upconv2'} and np.isfinite(learn.recorder.values[-1]).all()

def test_foreign_network_by_module_paths(tmp_path):
    monai = pytest.importorskip('monai.networks.nets', reason='needs MONAI')
    net = monai.UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4,8,16), strides=(2,2))
    cb = MIRegCallback(n_clusters=3, n_heads=2, global_layers='model.1.submodule.1.submodule',
                       local_layers=('model.1.submodule.0','model.2'), neighborhood={'model.2':3})
    learn = quiet(learner(tmp_path, net=net)); learn.fit(1, 1e-3, cbs=cb)
    assert set(cb.projectors)=={'model/1/submodule/1/submodule','model/1/submodule/0','model/2'} and hooks(net)==0

def test_dictionary_output_is_explained(tmp_path):
    class Dict(UNet):
        def forward(self, x): return {'out': super().forward(x)}
    with pytest.raises(ValueError, match='Dict returns a dict, not a tensor of logits'):
        quiet(learner(tmp_path, net=Dict(1,2,width=2))).fit(1, cbs=small_mireg())

@pytest.mark.parametrize('channels', [1,2,3,4])
def test_channels_and_classes(tmp_path, channels):
    learn = quiet(learner(tmp_path, dls=loaders(channels=channels), net=UNet(channels, 1+channels, width=2)))
    learn.fit(1, 1e-3, cbs=small_mireg())
    assert all(np.isfinite(learn.recorder.values[0]))

@pytest.mark.parametrize('opt', [SGD, ranger, lambda p,**kw: OptimWrapper(p, torch.optim.AdamW, **kw)],
                         ids=['SGD','ranger','AdamW'])
def test_optimisers(tmp_path, opt):
    cb = small_mireg()
    learn = quiet(learner(tmp_path, opt_func=opt))
    learn.fit_one_cycle(1, 1e-2, cbs=cb); before = [p.detach().clone() for p in cb.projectors.parameters()]
    learn.fit_one_cycle(2, 1e-2, cbs=cb)
    assert moved(cb, before)
    n = sum(len(g) for g in learn.opt.param_lists); assert n==len(list(learn.model.parameters()))
    learn.save('m'); learn.load('m', weights_only=False)
    learn.fit(1, 1e-3, cbs=cb)

@pytest.mark.parametrize('opt', [Adam, ranger], ids=['Adam','ranger'])
def test_a_fresh_callback_trains_too(tmp_path, opt):
    learn = quiet(learner(tmp_path, opt_func=opt))
    for epochs in (2,2):
        cb = small_mireg()
        learn.fit(1, 0., cbs=cb); start = values(cb.projectors.parameters())
        learn.fit(epochs, 1e-2, cbs=cb)
        assert moved(cb, start)
        if opt is ranger: # Lookahead keeps no slow weights of ours
            assert [len(g) for g in learn.opt.slow_weights]==[len(g) for g in learn.opt.param_lists]
    first,second = small_mireg(),small_mireg()
    learn.fit(1, 1e-2, cbs=first); heads = values(first.projectors.parameters())
    class Start(Callback):
        def before_train(self): self.heads = values(second.projectors.parameters())
    learn.fit(1, 1e-2, cbs=[second, o:=Start()])
    assert moved(second, o.heads) and not moved(first, heads)

def test_weight_decay_of_the_projectors(tmp_path):
    "Without a gradient the weights shrink by the optimiser's decay, the biases stay"
    cb = small_mireg(global_weight=lambda t: 0., local_weight=lambda t: 0.)
    learn = quiet(learner(tmp_path, wd=.1)) # 4 steps
    learn.fit(1, 0., cbs=cb); start = values(cb.projectors.parameters())
    learn.fit(1, 1e-1, cbs=cb)
    for p,o in zip(cb.projectors.parameters(), start):
        torch.testing.assert_close(p.data, o*(1-.1*.1)**4 if p.ndim>1 else o)

@pytest.mark.parametrize('order', [PairedBatchCallback.order+1, 99])
def test_skipped_steps(tmp_path, order):
    "As where mixed precision finds its scale too large: network, teacher and heads wait"
    class Skip(Callback):
        def before_step(self): raise CancelStepException()
    Skip.order = order
    cb,ema = small_mireg(),EMATeacherCallback()
    learn = quiet(learner(tmp_path))
    learn.fit(1, 1e-2, cbs=[cb, ema])
    state = lambda: values([*cb.projectors.parameters(), *learn.model.parameters(), *ema.average.tensors.values()])
    before,steps = state(),ema.average.steps
    learn.fit(1, 1e-2, cbs=[cb, ema, Skip()])
    assert equal(state(), before) and ema.average.steps==steps==4
    learn.fit(1, 1e-2, cbs=[cb, ema])
    assert ema.average.steps==8 and not any(torch.equal(a, b) for a,b in zip(state(), before) if a.ndim>1)

def test_accumulated_gradients_are_those_of_the_sum(tmp_path):
    "Two batches of two accumulated are one step"
    class Gradients(Callback):
        order = 90
        def before_fit(self): self.found = []
        def before_step(self): self.found.append([p.grad.clone() for p in self.model.parameters()])
    def gradients(*cbs):
        learn = quiet(learner(tmp_path, dls=loaders(n_iters=6), opt_func=SGD))
        learn.fit(1, 0., cbs=[small_mireg(), *cbs, o:=Gradients()])
        return o.found
    one,two = gradients(),gradients(GradientAccumulation(4))
    assert len(one)==6 and len(two)==3
    for i,gs in enumerate(two):
        for g,a,b in zip(gs, one[2*i], one[2*i+1]): torch.testing.assert_close(g, (a+b)/2, atol=1e-6, rtol=1e-4)
    quiet(learner(tmp_path)).fit(1, 1e-3, cbs=[small_mireg(), GradientAccumulation(4), GradientClip(1.)])

def test_trackers(tmp_path):
    learn = quiet(learner(tmp_path))
    learn.fit(3, 1e-3, cbs=[small_mireg(), SaveModelCallback(monitor='local_mi', comp=np.less, with_opt=True),
                            EarlyStoppingCallback(patience=5), CSVLogger()])
    log = (learn.csv_logger.read_log() if hasattr(learn, 'csv_logger') else
           __import__('pandas').read_csv(tmp_path/'history.csv'))
    assert (list(log.columns)==['epoch','train_loss','valid_loss','global_mi','local_mi','consistency','time']
            and len(log)==3)
    state = torch.load(tmp_path/'models'/'model.pth', weights_only=False)
    assert (set(state['model'])==set(learn.model.state_dict())
            and len(state['opt']['state'])==len(list(learn.model.parameters())))

def test_early_stopping_with_a_teacher(tmp_path, capsys):
    "It stops while the teacher stands in for the student, who is there again afterwards"
    class Watch(Callback):
        order = EarlyStoppingCallback.order-1
        def after_train(self): self.student = values(self.model.parameters())
        def after_epoch(self): self.swapped = self.learn.ema_teacher._in_place
    learn,ema = quiet(learner(tmp_path)),EMATeacherCallback()
    learn.fit(9, 1e-2, cbs=[small_mireg(), ema, o:=Watch(), EarlyStoppingCallback(min_delta=100, patience=2)])
    assert 'early stopping' in capsys.readouterr().out and len(learn.recorder.values)==3 and o.swapped
    assert equal(learn.model.parameters(), o.student) and ema._in_place is None and hooks(learn.model)==0
    assert not torch.equal(ema.average.tensors['head.weight'], learn.model.head.weight)

def test_lr_find_gives_all_suggestions(tmp_path):
    learn = quiet(learner(tmp_path, cbs=[small_mireg(), EMATeacherCallback()]))
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    found = learn.lr_find(num_it=30, show_plot=False, suggest_funcs=(minimum, steep, valley, slide))
    assert found._fields==('minimum','steep','valley','slide') and np.isfinite(found).all()
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and learn.dls.train.epoch==0
    assert learn.ema_teacher.average is None or learn.ema_teacher.average.steps==0

def test_three_ways_to_attach(tmp_path):
    "In the constructor, in fit and by add_cb: the same training"
    def weights(how):
        cb = small_mireg()
        learn = quiet(learner(tmp_path, cbs=cb if how=='constructor' else None))
        if how=='add_cb': learn.add_cb(cb)
        learn.fit(1, 1e-2, cbs=cb if how=='fit' else None)
        return [p.detach() for p in [*learn.model.parameters(), *cb.projectors.parameters()]]
    a,b,c = (weights(o) for o in ('constructor','add_cb','fit'))
    assert all(torch.equal(p,q) and torch.equal(p,r) for p,q,r in zip(a,b,c))

def test_it_can_be_looked_at(tmp_path, capsys):
    learn = quiet(learner(tmp_path, cbs=small_mireg()))
    learn.show_training_loop()
    assert 'MIRegCallback' in capsys.readouterr().out
    assert 'Total trainable params' in str(learn.summary())
    learn.fit(1); assert 'Total params' in str(learn.summary())

def test_schedules_of_weights(tmp_path):
    seen = []
    cb = small_mireg(global_weight=lambda t: seen.append(t) or t, local_weight=0, consistency_weight=0)
    quiet(learner(tmp_path)).fit(2, 1e-3, cbs=cb)
    np.testing.assert_allclose(seen, np.arange(8)/8)

@pytest.mark.parametrize('until', [80,1.5,0.,-1.,float('nan')])
@pytest.mark.parametrize('ramp', [sigmoid_rampup, sigmoid_rampdown])
def test_ramps_end_within_the_training(ramp, until):
    "A ramp up to 80, meant in epochs or per cent, held the weight below a hundredth to the end, in silence"
    with pytest.raises(ValueError, match=rf'until: {until} is not a fraction of the training, above 0 and at most 1'):
        ramp(5., until)

def test_batch_of_one(tmp_path):
    "One labelled and one unlabelled image train; a single image with BatchNorm at a single pixel is explained"
    learn = quiet(learner(tmp_path, dls=loaders(bs=1, unlabeled_bs=1)))
    learn.fit(1, 1e-3, cbs=small_mireg())
    for cbs in ([], [EMATeacherCallback()]):
        with pytest.raises(ValueError, match='a batch of one image cannot train a network with BatchNorm'):
            learn.fit(1, 1e-3, cbs=cbs)

def test_bad_windows_and_layers(tmp_path):
    with pytest.raises(ValueError, match=r"neighborhood: 21 is more than the map of 'Upconv3' allows, "
                                         r"which is 8×8 \(at most 15\)"):
        quiet(learner(tmp_path)).fit(1, cbs=small_mireg(neighborhood={'Upconv3':21}))
    # a window under another name was passed over, and the stage had displacements of one pixel only
    with pytest.raises(ValueError, match=r"neighborhood: 5 is not a window for each .*; give \{'Upconv3': 5\}"):
        MIRegCallback(local_layers='Upconv3', neighborhood=5)
    with pytest.raises(ValueError, match=r'neighborhood: upconv3, Conv5 is not among the local layers \(Upconv3\)'):
        small_mireg(neighborhood={'Upconv3':3,'upconv3':3,'Conv5':3})
    assert small_mireg(neighborhood={'Upconv3':5,'Upconv2':7}).neighborhood['Upconv3']==5
    with pytest.raises(ValueError, match="no stage 'Conv9' in UNet; there are Conv1, "):
        quiet(learner(tmp_path)).fit(1, cbs=small_mireg(global_layers='Conv9'))
    with pytest.raises(ValueError, match='there are no unlabelled images. Either'):
        quiet(learner(tmp_path, dls=loaders(n=9))).fit(1, cbs=small_mireg())

@pytest.mark.skipif(not torch.cuda.is_available(), reason='mixed precision in fastai needs CUDA')
@pytest.mark.parametrize('bf16', [False,True])
def test_mixed_precision(tmp_path, bf16):
    dls = loaders(); dls.device = torch.device('cuda')
    learn = quiet(learner(tmp_path, dls=dls))
    learn.to_bf16() if bf16 else learn.to_fp16()
    learn.fit(2, 1e-3, cbs=[small_mireg(), EMATeacherCallback()])
    assert all(np.isfinite(learn.recorder.values[-1]))

class Precise(UNet):
    "Notes in which precision it has answered"
    def __init__(self): super().__init__(1,2,width=2); self.dtypes = []
    def forward(self, x):
        y = super().forward(x)
        self.dtypes.append(y.dtype)
        return y

@pytest.mark.parametrize('passes', [1,2,3])
def test_bf16_on_a_cpu(tmp_path, passes):
    "In each pass, for the teacher, in the validation; weights, terms and predictions are float32"
    learn = quiet(learner(tmp_path, net=Precise(), cbs=Bfloat16Callback()))
    learn.paired_batch.passes = passes
    before = values(learn.model.parameters())
    learn.fit(2, 1e-3, cbs=[small_mireg(), EMATeacherCallback()])
    found,*dtypes = learn.model.dtypes # the stages, with an image of zeros
    assert set(dtypes)=={torch.bfloat16} and len(dtypes)>=2*4*(min(passes, 2)+1)
    assert not equal(learn.model.parameters(), before) and all(np.isfinite(learn.recorder.values[-1]))
    assert {o.dtype for o in (*learn.model.parameters(), *learn.get_preds())}=={torch.float32, torch.int64}
    learn.to_fp32()
    learn.model.dtypes.clear()
    learn.fit(1, cbs=small_mireg())
    assert set(learn.model.dtypes)=={torch.float32}

def test_an_interrupted_batch_leaves_no_autocast_behind(tmp_path):
    "Inside of one that nobody left, later fits would see copies of the weights of that batch"
    class Stops(Callback):
        def after_pred(self):
            if self.training and self.train_iter==2: raise KeyboardInterrupt
    learn,x = quiet(learner(tmp_path, cbs=Bfloat16Callback())),torch.rand(2,1,16,16)
    with torch.autocast('cpu', torch.bfloat16):
        with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2, cbs=[ConsistencyCallback(), Stops()])
        assert torch.is_autocast_enabled('cpu') # one that is somebody else's
    assert not torch.is_autocast_enabled('cpu')
    learn.fit(1, 1e-2, cbs=ConsistencyCallback())
    with torch.autocast('cpu', torch.bfloat16): now = learn.model.eval()(x)
    with torch.no_grad():
        for p in learn.model.parameters(): p += 1
    with torch.autocast('cpu', torch.bfloat16): assert not torch.equal(now, learn.model(x))

@pytest.mark.parametrize('stop', [CancelBatchException, KeyError])
def test_a_cancelled_batch_or_validation_leaves_no_autocast_behind(tmp_path, stop):
    class Stops(Callback):
        def after_pred(self): raise stop
    learn = quiet(learner(tmp_path, cbs=Bfloat16Callback()))
    for f in (lambda: learn.fit(1, cbs=[small_mireg(), Stops()]), lambda: learn.validate(cbs=Stops())):
        with suppress(KeyError, IndexError, AttributeError): f()
        assert not torch.is_autocast_enabled('cpu')
        assert torch.autocast_increment_nesting()==1 and torch.autocast_decrement_nesting()==0

def test_float16_features_give_float32_information():
    "Autocast, on any device: the penalty is computed in float32"
    net,x = UNet(1,2,width=2),torch.randn(4,1,16,16)
    from fastmiseg.models import find_stages
    from fastmiseg.transforms import RandomFlips
    cb = small_mireg(); st = find_stages(net, cb.layers); cb.projectors = cb.make_projectors(st)
    f = {n: torch.randn(4,s.channels,16//s.scale,16//s.scale, dtype=torch.bfloat16) for n,s in st.items()}
    step = Step(x[:1], None, x, RandomFlips().draw(4))
    for k in ('x','tx'):
        step.see(k)
        step.logits[k],step.feats[k] = torch.randn(4,2,16,16, dtype=torch.bfloat16),f
    with torch.autocast('cpu', dtype=torch.bfloat16): terms = cb.penalty(step)
    assert {o.dtype for o in terms.values()}=={torch.float32}

def test_no_number_names_the_scans(tmp_path):
    "Those whose slices are in the batch, by their names in the cohort"
    from fastmiseg.scans.split import split_cohort
    from fastmiseg.data import MISegDataLoaders
    from fastmiseg.learner import miseg_learner
    from fastmiseg.scans.phantom import make_phantom
    from fastmiseg.scans.recipe import Recipe
    df = split_cohort(make_phantom(tmp_path/'scans', n_subjects=5, size=(32,40)), labeled=2, valid=1)
    dls = MISegDataLoaders.from_cohort(df, Recipe(size=(32,32), classes=df.attrs['classes'], flip='h'),
        store=tmp_path/'slices', bs=2, unlabeled_bs=2, n_iters=4, augment=None, workers=0)
    class Keep(Callback):
        order = PairedBatchCallback.order-1
        def before_batch(self): self.batch = [self.xb[0], self.yb[0]]
    learn = quiet(miseg_learner(dls, width=2, path=tmp_path))
    with pytest.raises(FloatingPointError, match=r'odd is nan at step 2 \(epoch 0, batch 2\).*'
                                                 r'The batch came from labelled: (.*); unlabelled: (.*)') as e:
        learn.fit(1, 1e-3, cbs=[Odd(), o:=Keep()])
    n = dls.store.scans.set_index('scan').n
    holds = lambda x: next(s for s in n.index for i in range(n[s]) if np.array_equal(dls.store.image(s, i), x.numpy()))
    want = '; '.join(f"{k}: {', '.join(dict.fromkeys(map(holds, xs)))}"
                     for k,xs in zip(('labelled','unlabelled'), o.batch))
    assert str(e.value).endswith(want)

def test_no_number_without_regularisers(tmp_path):
    "Paired batches, and nothing but the supervised loss"
    class Bad(Callback):
        def before_batch(self):
            if self.training and self.train_iter==2: self.learn.xb = (self.x*float('nan'),)
    learn = quiet(learner(tmp_path))
    with pytest.raises(FloatingPointError, match=r'the supervised loss is nan at step 2 '
                                                 r'.*labelled: [\d, ]+; unlabelled: \d'):
        learn.fit(1, 1e-3, cbs=Bad())
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_networks_of_monai_find_their_stages():
    monai = pytest.importorskip('monai.networks.nets', reason='needs MONAI')
    nets = [monai.UNet(2, 1, 3, (4,8,16,32,64), (2,2,2,2), num_res_units=n) for n in (0,2)]
    nets += [monai.AttentionUnet(2, 1, 3, (4,8,16,32,64), (2,2,2,2)), monai.BasicUNet(2, 1, 3, (4,4,8,16,32,4)),
             monai.SegResNet(2, 8, 1, 3), monai.DynUNet(2, 1, 3, [3]*5, [1,2,2,2,2], [2]*4, filters=[4,8,16,32,64])]
    for net in nets:
        found = list(find_stages(net, ['Conv5','Upconv3','Upconv2']).values())
        assert ([o.scale for o in found]==sorted((o.scale for o in found), reverse=True)
                and found[0].scale>found[1].scale>found[2].scale), (type(net).__name__, found)
        assert (all(net.get_submodule(o.module) is not None for o in found)
                and found[0].scale==max(o.scale for o in stages(net).values()))

def test_networks_of_segmentation_models_find_their_stages():
    smp = pytest.importorskip('segmentation_models_pytorch', reason='needs segmentation-models-pytorch')
    for arch,encoder in itertools.product((smp.Unet, smp.UnetPlusPlus, smp.MAnet, smp.Linknet),
                                          ('resnet18','efficientnet-b0')):
        if arch is smp.Linknet and encoder!='resnet18': continue
        found = find_stages(arch(encoder, encoder_weights=None, in_channels=1, classes=3),
                            ['Conv5','Upconv3','Upconv2'])
        assert [o.scale for o in found.values()]==[16,2,1], (arch.__name__, encoder, found)

def test_networks_of_others_train(tmp_path):
    smp = pytest.importorskip('segmentation_models_pytorch', reason='needs segmentation-models-pytorch')
    monai = pytest.importorskip('monai.networks.nets', reason='needs MONAI')
    for net in (monai.UNet(2, 1, 2, (4,8,16,32), (2,2,2)),
                smp.Unet('resnet18', encoder_weights=None, in_channels=1, classes=2)):
        cb = MIRegCallback(n_clusters=3, n_heads=2)
        learn = quiet(learner(tmp_path, dls=loaders(size=32, n_iters=1), net=net))
        learn.fit(1, 1e-3, cbs=cb)
        assert (set(cb.projectors)=={'Conv5','Upconv3','Upconv2'}
                and np.isfinite(learn.recorder.values[-1]).all() and hooks(net)==0)

@pytest.mark.parametrize('arch', ['unet','residual_unet','dynamic_unet'])
def test_weights_that_do_not_exist(arch):
    with pytest.raises(ValueError, match=f"pretrained: there are no pretrained weights of arch='{arch}'; "
                                         'leave pretrained out'):
        create_unet(arch, pretrained=True)

def test_a_residual_network_trains(tmp_path):
    cb = MIRegCallback(n_clusters=3, n_heads=2)
    net = create_unet('residual_unet', width=2)
    assert ({k:(s.channels,s.scale) for k,s in stages(net).items()}
            =={k:(s.channels,s.scale) for k,s in stages(UNet(width=2)).items()})
    learn = quiet(learner(tmp_path, net=net))
    learn.fit(1, 1e-3, cbs=cb)
    assert np.isfinite(learn.recorder.values[-1]).all() and hooks(net)==0

class Seen(Callback):
    order = 100
    def before_fit(self): self.terms = []
    def after_loss(self):
        if self.training: self.terms.append(float(self.loss_grad.detach()))

@pytest.mark.parametrize('passes,make', [(2, lambda: [small_mireg(), EMATeacherCallback()]),
                                         (1, lambda: [PseudoLabelCallback(threshold=.5)]),
                                         (1, lambda: [PseudoLabelCallback(threshold=.5, dropped=.5)]),
                                         (2, lambda: [PseudoLabelCallback(threshold=.5, dropped=.5)])],
                         ids=['mi and teacher','pseudo-labels','dropped features','dropped features, two passes'])
def test_a_compiled_network_trains_as_before(tmp_path, passes, make):
    "Maps are taken from inside one graph, and the teacher's weights go through it; a second fit goes on with it"
    def train(compiled):
        torch._dynamo.reset()
        learn = quiet(learner(tmp_path/str(compiled), seed=0, width=4, dls=loaders(size=32, n_iters=2, seed=0)))
        learn.paired_batch.passes = passes
        if compiled: learn.model.compile(backend='eager', fullgraph=True)
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            learn.fit(1, 1e-3, cbs=[*make(), seen := Seen()])
            found += seen.terms
        return found
    assert train(True)==pytest.approx(train(False), rel=1e-5)

class Mirrored(Transformation):
    "Not a dataclass, and nothing that would have to move to a device"
    def __init__(self, axis): self.axis = axis
    def __call__(self, x): return x.flip(self.axis)
    inverse = __call__

class AlwaysMirrored(Pool):
    def draw(self, n, generator=None): return Mirrored(-1)

def test_a_T_without_tensors(tmp_path):
    learn = quiet(learner(tmp_path, width=4))
    learn.fit(1, 1e-3, cbs=small_mireg(T=AlwaysMirrored()))
    assert np.isfinite(learn.recorder.values[-1]).all()

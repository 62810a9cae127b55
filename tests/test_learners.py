"Regularisers on learners that people have: networks, data, optimisers and callbacks that know nothing of them"
import numpy as np, pytest, torch
from torch import nn
from fastai.basics import Adam, Callback, L, Learner, OptimWrapper, SGD, params
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import minimum, slide, steep, valley
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import ranger
from fastmiseg.callback.baselines import ConsistencyCallback
from fastmiseg.callback.mireg import MIRegCallback
from fastmiseg.callback.semisup import SemiSupCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from fastmiseg.models import create_unet
from toy import UNet, hooks, disc, learner, loaders, quiet, small_mireg

def moved(cb, before): return any(not torch.equal(a, b) for a,b in zip(cb.projectors.parameters(), before))

@pytest.fixture(scope='module')
def rgb(tmp_path_factory):
    "RGB images and masks in folders, as fastai's users have them"
    from PIL import Image
    root,rng = tmp_path_factory.mktemp('rgb'),np.random.default_rng(0)
    for d in ('images','masks','more','other'): (root/d).mkdir()
    for i in range(12):
        y = np.zeros((32,32), np.uint8); y[8:20,4+i:16+i] = 1
        Image.fromarray((rng.integers(0,80,(32,32,3))+120*y[...,None]).astype(np.uint8)).save(root/('images' if i<6 else 'more')/f'{i}.png')
        if i<6: Image.fromarray(y).save(root/'masks'/f'{i}.png')
    Image.fromarray(np.zeros((48,32,3), np.uint8)).save(root/'other'/'0.png'); Image.fromarray(np.zeros((48,32,3), np.uint8)).save(root/'other'/'1.png')
    return root

def unet(rgb, arch=None, **kw):
    from fastai.vision.all import SegmentationDataLoaders, get_image_files, resnet18, unet_learner
    dls = SegmentationDataLoaders.from_label_func(rgb, get_image_files(rgb/'images'), lambda o: rgb/'masks'/o.name, codes=['background','square'], bs=2, valid_pct=.34, seed=0, num_workers=0)
    return quiet(unet_learner(dls, arch or resnet18, pretrained=False, n_out=2, **kw))

def files(rgb, d="more"):
    from fastai.vision.all import get_image_files
    return get_image_files(rgb/d)

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

def test_unlabelled_of_another_size(rgb):
    with pytest.raises(ValueError, match=r'unlabelled images are \(3, 48, 32\) .*labelled ones \(3, 32, 32\)'):
        unet(rgb).fit(1, cbs=small_mireg(unlabeled=files(rgb, 'other')))

def test_timm_encoder(tmp_path):
    learn = quiet(learner(tmp_path, dls=loaders(size=32), net=create_unet('mobilenetv3_small_050', n_in=1, n_out=2, size=(32,32))))
    learn.fit(1, 1e-3, cbs=[MIRegCallback(n_clusters=3, n_heads=2, layers=('Conv4','Upconv3')), EMATeacherCallback()])
    assert hooks(learn.model)==hooks(create_unet('mobilenetv3_small_050', n_in=1, n_out=2, size=(32,32)))

def test_foreign_network_by_module_paths(tmp_path):
    monai = pytest.importorskip('monai.networks.nets', reason='needs MONAI')
    net = monai.UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4,8,16), strides=(2,2))
    cb = MIRegCallback(n_clusters=3, n_heads=2, layers=('model.1.submodule.0','model.2'), neighborhood={'model.2':3})
    learn = quiet(learner(tmp_path, net=net)); learn.fit(1, 1e-3, cbs=cb)
    assert set(cb.projectors)=={'model/1/submodule/0','model/2'} and hooks(net)==0

def test_dictionary_output_is_explained(tmp_path):
    class Dict(UNet):
        def forward(self, x): return {'out': super().forward(x)}
    with pytest.raises(ValueError, match='Dict returns a dict, not a tensor of logits'): quiet(learner(tmp_path, net=Dict(1,2,width=2))).fit(1, cbs=small_mireg())

@pytest.mark.parametrize('channels', [1,2,3,4])
def test_channels_and_classes(tmp_path, channels):
    learn = quiet(learner(tmp_path, dls=loaders(channels=channels), net=UNet(channels, 1+channels, width=2)))
    learn.fit(1, 1e-3, cbs=small_mireg())
    assert all(np.isfinite(learn.recorder.values[0]))

@pytest.mark.parametrize('opt', [SGD, ranger, lambda p,**kw: OptimWrapper(p, torch.optim.AdamW, **kw)], ids=['SGD','ranger','AdamW'])
def test_optimisers(tmp_path, opt):
    cb = small_mireg()
    learn = quiet(learner(tmp_path, opt_func=opt))
    learn.fit_one_cycle(1, 1e-2, cbs=cb); before = [p.detach().clone() for p in cb.projectors.parameters()]
    learn.fit_one_cycle(2, 1e-2, cbs=cb)
    assert moved(cb, before)
    n = sum(len(g) for g in learn.opt.param_lists); assert n==len(list(learn.model.parameters()))
    learn.save('m'); learn.load('m', weights_only=False)
    learn.fit(1, 1e-3, cbs=cb)

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
    learn.fit(3, 1e-3, cbs=[small_mireg(), SaveModelCallback(monitor='local_mi', comp=np.less, with_opt=True), EarlyStoppingCallback(patience=5), CSVLogger()])
    log = learn.csv_logger.read_log() if hasattr(learn, 'csv_logger') else __import__('pandas').read_csv(tmp_path/'history.csv')
    assert list(log.columns)==['epoch','train_loss','valid_loss','global_mi','local_mi','consistency','time'] and len(log)==3
    state = torch.load(tmp_path/'models'/'model.pth', weights_only=False)
    assert set(state['model'])==set(learn.model.state_dict()) and len(state['opt']['state'])==len(list(learn.model.parameters()))

def test_lr_find_gives_all_suggestions(tmp_path):
    learn = quiet(learner(tmp_path, cbs=[small_mireg(), EMATeacherCallback()]))
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    found = learn.lr_find(num_it=30, show_plot=False, suggest_funcs=(minimum, steep, valley, slide))
    assert [n for n in found._fields]==['minimum','steep','valley','slide']
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and learn.dls.train.epoch==0
    assert learn.ema_teacher.average is None or learn.ema_teacher.steps==0

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

def test_batch_of_one(tmp_path):
    "One labelled and one unlabelled image train; a single image with BatchNorm at a single pixel is explained"
    learn = quiet(learner(tmp_path, dls=loaders(bs=1, unlabeled_bs=1)))
    learn.fit(1, 1e-3, cbs=small_mireg())
    for cbs in ([], [EMATeacherCallback()]):
        with pytest.raises(ValueError, match='a batch of one image cannot train a network with BatchNorm'): learn.fit(1, 1e-3, cbs=cbs)

def test_bad_windows_and_layers(tmp_path):
    with pytest.raises(ValueError, match=r"neighborhood: 21 is more than the map of 'Upconv3' allows, which is 8×8 \(at most 15\)"):
        quiet(learner(tmp_path)).fit(1, cbs=small_mireg(neighborhood={'Upconv3':21}))
    with pytest.raises(ValueError, match="no stage 'Conv9' in UNet; there are Conv1, "): quiet(learner(tmp_path)).fit(1, cbs=small_mireg(layers='Conv9'))
    with pytest.raises(ValueError, match='there are no unlabelled images. Either'): quiet(learner(tmp_path, dls=loaders(n=9))).fit(1, cbs=small_mireg())

@pytest.mark.skipif(not torch.cuda.is_available(), reason='mixed precision in fastai needs CUDA')
@pytest.mark.parametrize('bf16', [False,True])
def test_mixed_precision(tmp_path, bf16):
    dls = loaders(); dls.device = torch.device('cuda')
    learn = quiet(learner(tmp_path, dls=dls))
    learn.to_bf16() if bf16 else learn.to_fp16()
    learn.fit(2, 1e-3, cbs=[small_mireg(), EMATeacherCallback()])
    assert all(np.isfinite(learn.recorder.values[-1]))

def test_float16_features_give_float32_information():
    "Autocast, on any device: the penalty is computed in float32"
    net,x = UNet(1,2,width=2),torch.randn(4,1,16,16)
    from fastmiseg.callback.semisup import Views
    from fastmiseg.models import find_stages
    from fastmiseg.views import RandomFlips
    cb = small_mireg(); st = find_stages(net, cb.layers); cb.projectors = cb.make_projectors(st)
    f = {n: torch.randn(4,s.channels,16//s.scale,16//s.scale, dtype=torch.bfloat16) for n,s in st.items()}
    v = Views(RandomFlips().draw(4), 0., x, *(torch.randn(4,2,16,16, dtype=torch.bfloat16) for _ in range(3)), f, f)
    with torch.autocast('cpu', dtype=torch.bfloat16): terms = cb.penalty(v)
    assert {o.dtype for o in terms.values()}=={torch.float32}

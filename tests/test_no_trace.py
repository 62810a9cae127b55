"After a fit, however it ended, the learner is as it was; what is exported needs no fastmiseg"
import subprocess, sys
import pytest, torch
from fastai.basics import (Callback, CancelBatchException, CancelEpochException, CancelFitException,
                           CancelStepException, CancelTrainException, CancelValidException)
from fastmiseg.callback.baselines import ConsistencyCallback, EntropyMinCallback
from fastmiseg.callback.copypaste import CopyPasteCallback
from fastmiseg.callback.pseudo import PseudoLabelCallback
from fastmiseg.callback.teacher import EMATeacherCallback
from toy import SemiSupCallback, UNet, hooks, learner, quiet, small_mireg
from fastmiseg.models import create_unet

METHODS = [
    lambda: [ConsistencyCallback()],
    lambda: [EntropyMinCallback(.1), CopyPasteCallback()],
    lambda: [PseudoLabelCallback(threshold=.5, dropped=.5), EMATeacherCallback()],
    lambda: [small_mireg(), EMATeacherCallback()]]

class Bomb(Callback):
    order = 70
    def __init__(self, exc, when, training):
        def go(self):
            if self.learn.training==training and self.learn.train_iter>=2: raise exc
        super().__init__(**{when: go})

def state(learn):
    "Everything that a method could have left something in"
    return dict(hooks=hooks(learn.model), groups=[[id(p) for p in g] for g in learn.opt.param_lists],
                state={id(p) for p in learn.opt.state}, cbs=[type(cb).__name__ for cb in learn.cbs],
                attributes=set(vars(learn)), modules=[n for n,_ in learn.model.named_modules()],
                storages={p.data_ptr() for p in learn.model.parameters()})

@pytest.mark.parametrize('net', ['unet','dynamic_unet'])
def test_any_end(tmp_path, net):
    learn = quiet(learner(tmp_path, net=create_unet(net, n_in=1, n_out=2, size=(16,16), width=2)))
    learn.fit(1)
    before = state(learn)
    ends = [(e,w,t) for e in (ValueError('boom'), KeyboardInterrupt(), CancelFitException(), CancelEpochException())
                    for w,t in (('before_batch',True), ('after_pred',True), ('after_loss',True),
                                ('after_backward',True), ('before_step',True), ('after_step',True),
                                ('after_batch',False), ('after_epoch',False))]
    ends += [(CancelBatchException(),'after_pred',True), (CancelStepException(),'before_step',True),
             (CancelTrainException(),'after_loss',True), (CancelValidException(),'after_batch',False)]
    for i,(exc,when,training) in enumerate(ends):
        cbs = METHODS[i%4]() if i%8<4 else METHODS[3]()
        try: learn.fit(1, 1e-3, cbs=[*cbs, Bomb(exc, when, training)])
        # some of them fastai itself lets through
        except (ValueError, KeyboardInterrupt, RuntimeError, CancelEpochException): pass
        learn._end_cleanup(); learn.opt.zero_grad()
        assert state(learn)==before, (type(exc).__name__, when)
        assert not any(isinstance(cb, SemiSupCallback) for cb in learn.cbs)
    learn.fit(1)
    assert state(learn)==before

def test_batch_is_given_back(tmp_path):
    "A fit that breaks in the network leaves the labelled batch"
    class Breaks(UNet):
        def forward(self, x):
            if self.training and len(x)>4: raise RuntimeError('in the network')
            return super().forward(x)
    learn = quiet(learner(tmp_path, net=Breaks(1,2,width=2)))
    with pytest.raises(RuntimeError): learn.fit(1, cbs=ConsistencyCallback())
    assert len(learn.x)==2 and learn.paired_batch.step is None

EXPORT = '''
import sys; sys.modules['fastmiseg'] = None
import warnings; warnings.filterwarnings('ignore')
from fastai.learner import load_learner
import torch
learn = load_learner(sys.argv[1])
assert not any(m.split('.')[0]=='fastmiseg' for m,o in sys.modules.items() if o is not None)
mask,_,probs = learn.predict(sys.argv[2])
torch.save(probs, sys.argv[3])
'''

def test_export_needs_only_fastai(tmp_path):
    "Network and data are fastai's own: the file opens and predicts where there is no fastmiseg"
    from PIL import Image
    from fastai.vision.all import SegmentationDataLoaders, get_image_files, resnet18, unet_learner
    import numpy as np
    rng = np.random.default_rng(0)
    for d in ('images','masks','more'): (tmp_path/d).mkdir()
    for i in range(8):
        y = np.zeros((32,32), np.uint8); y[8:20,6+i:20+i] = 1
        image = (rng.integers(0,80,(32,32,3))+120*y[...,None]).astype(np.uint8)
        Image.fromarray(image).save(tmp_path/('images' if i<5 else 'more')/f'{i}.png')
        if i<5: Image.fromarray(y).save(tmp_path/'masks'/f'{i}.png')
    masks = tmp_path/'masks'
    dls = SegmentationDataLoaders.from_label_func(tmp_path, get_image_files(tmp_path/'images'), lambda o: masks/o.name,
        codes=['background','square'], bs=2, valid_pct=.4, seed=0, num_workers=0)
    learn = quiet(unet_learner(dls, resnet18, pretrained=False, n_out=2))
    learn.fit(1, cbs=[small_mireg(unlabeled=get_image_files(tmp_path/'more')), EMATeacherCallback()])
    want = learn.predict(get_image_files(tmp_path/'images')[0])[2]
    learn.export(tmp_path/'net.pkl')
    assert b'fastmiseg' not in (tmp_path/'net.pkl').read_bytes()
    script = tmp_path/'load.py'; script.write_text(EXPORT)
    res = subprocess.run([sys.executable, str(script), str(tmp_path/'net.pkl'),
                          str(get_image_files(tmp_path/'images')[0]), str(tmp_path/'probs.pt')],
                         capture_output=True, text=True, env={'PATH':'/usr/bin','OMP_NUM_THREADS':'1'}, cwd=tmp_path)
    assert res.returncode==0, res.stderr
    torch.testing.assert_close(torch.Tensor(torch.load(tmp_path/'probs.pt', weights_only=False)),
                               torch.Tensor(want), rtol=1e-3, atol=1e-4)

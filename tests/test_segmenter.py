"""Model files: what comes back, and every way in which a file can be wrong"""
import errno, json, os, pickle, subprocess, sys

import numpy as np, pytest, torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fastmiseg.segmenter as S
from fastmiseg.models import create_unet
from fastmiseg.segmenter import SegmenterError, export_onnx, export_segmenter, load_segmenter
from fastmiseg.scans.recipe import Recipe

recipe = Recipe(spacing=2., size=(32,48), classes=('background','a','b'), labels={0:0, 7:1, 9:2},
                window=(-10,300), axis=0)

class Untrained:
    "Looks like a learner, as far as export looks"
    def __init__(self, arch='unet', **kwargs):
        self.arch = dict(arch=arch, n_in=1, n_out=3, size=(32,48), **kwargs)
        self.model,self.recipe,self.cbs,self.dls = create_unet(**self.arch),recipe,[],None

@pytest.fixture(scope='module')
def file(tmp_path_factory):
    return export_segmenter(Untrained(width=2), tmp_path_factory.mktemp('seg')/'a.safetensors',
                            seed=3, dice=float('nan'))

def parts(file):
    with safe_open(file, 'pt') as f: return json.loads(f.metadata()['fastmiseg']),{k:f.get_tensor(k) for k in f.keys()}

def again(file, tmp_path, change):
    "The file with something about it changed"
    about,tensors = parts(file)
    change(about, tensors)
    out = tmp_path/'b.safetensors'
    text = json.dumps(about)
    save_file(tensors, out, metadata=dict(fastmiseg=text, checksum=S._sum_of(text, tensors)))
    return out

# -- there and back ----------------------------------------------------------------------------------------------------
def test_all_comes_back(file):
    seg = load_segmenter(file)
    assert seg.recipe==recipe and seg.classes==recipe.classes and not seg.model.training
    assert seg.about['provenance']==dict(seed=3, dice=None) and seg.about['versions']['torch']==torch.__version__

def test_with_another_process(heart, tmp_path):
    "Another process, with nothing but the file, gives the same mask"
    scan = heart.df.image[0]
    export_segmenter(heart.learn, tmp_path/'heart.safetensors')
    code = ('import sys; from fastmiseg.segmenter import load_segmenter; '
            'load_segmenter(sys.argv[1]).predict(sys.argv[2], out=sys.argv[3])')
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code,
                    tmp_path/'heart.safetensors', scan, tmp_path/'seg.nii.gz'], check=True)
    from fastmiseg.inference import predict_volume
    from fastmiseg.scans.volume import read_volume
    assert np.array_equal(read_volume(tmp_path/'seg.nii.gz').array, predict_volume(heart.learn, scan).array)

def test_the_metrics_are_those_of_the_weights_in_the_file(hearts, tmp_path):
    "Not of the teacher, which validated in the student's place, of another epoch, or of a later validation"
    from fastai.basics import set_seed
    from fastai.callback.tracker import SaveModelCallback
    from fastmiseg.callback.resume import ResumeCallback
    from fastmiseg.callback.teacher import EMATeacherCallback
    from fastmiseg.data import MISegDataLoaders
    from fastmiseg.learner import miseg_learner
    df = hearts.df.copy()
    df.loc[df.index[df.split=='labeled'][:2],'split'] = 'unlabeled'
    dls = MISegDataLoaders.from_cohort(df, hearts.recipe, store=hearts.root/'slices', n_iters=2, workers=0)
    def trained(epochs, cbs):
        set_seed(0)
        learn = miseg_learner(dls, width=2, path=tmp_path)
        with learn.no_bar(),learn.no_logging(): learn.fit(epochs, 1e-2, cbs=cbs)
        return learn
    def said(learn):
        file = export_segmenter(learn, tmp_path/'a.safetensors')
        return load_segmenter(file, 'cpu').about['provenance'].get('metrics')
    learn = trained(1, teacher := EMATeacherCallback())
    assert said(learn) is None
    teacher.to_model(learn.model)
    with learn.no_bar(): loss, = learn.validate()
    assert said(learn)['valid_loss']==pytest.approx(loss)
    learn = trained(3, SaveModelCallback('train_loss', np.greater, fname='worst'))
    with learn.no_bar(): loss, = learn.validate()
    assert said(learn)['valid_loss']==pytest.approx(loss)
    whole = said(trained(1, ResumeCallback(tmp_path/'checkpoints')))
    assert whole and said(trained(1, ResumeCallback(tmp_path/'checkpoints')))==whole

def test_one_file_under_two_names_is_one_model(file, monkeypatch):
    "It would count twice"
    monkeypatch.chdir(file.parent)
    with pytest.raises(SegmenterError, match='a.safetensors: is named more than once; a model agrees with itself'):
        load_segmenter([file, f'./{file.name}'])

def test_timm(tmp_path):
    l = Untrained('resnet10t')
    seg = load_segmenter(export_segmenter(l, tmp_path/'t.safetensors'))
    x = torch.rand(1,1,32,64)
    with torch.no_grad(): assert torch.equal(seg.model(x), l.model.eval()(x))

def test_random_state_is_left_alone(file):
    torch.manual_seed(0); a = torch.rand(3)
    torch.manual_seed(0); load_segmenter(file)
    assert torch.equal(torch.rand(3), a)

# -- loading never runs code -------------------------------------------------------------------------------------------
class Evil:
    def __reduce__(self): return (os.mkdir, (os.environ['EVIL'],))

@pytest.mark.parametrize('save', [
    lambda o,f: torch.save(o, f), lambda o,f: torch.save(o, f, _use_new_zipfile_serialization=False),
    *(lambda o,f,p=p: pickle.dump(o, open(f,'wb'), p) for p in range(6))])
def test_pickles(tmp_path, monkeypatch, save):
    monkeypatch.setenv('EVIL', str(tmp_path/'ran'))
    save(Evil(), tmp_path/'a.safetensors')
    with pytest.raises(SegmenterError, match='is a pickle|is not a safetensors file'):
        load_segmenter(tmp_path/'a.safetensors')
    assert not (tmp_path/'ran').exists()

def test_nothing_unpickles(file, monkeypatch):
    def no(*args, **kwargs): raise AssertionError('something was unpickled')
    for m,k in [(pickle,'load'),(pickle,'loads'),(pickle,'Unpickler'),(torch,'load')]: monkeypatch.setattr(m, k, no)
    load_segmenter(file)

def test_no_download(tmp_path, file, monkeypatch):
    "A name in a file never makes the network be asked for weights"
    import socket
    def no(*args, **kwargs): raise AssertionError('the network was asked')
    monkeypatch.setattr(socket, 'socket', no)
    for name in ('hf-hub:somebody/model', 'hf_hub:somebody/model', 'local-dir:/tmp', 'timm/resnet18',
                 'https://example.org/a'):
        with pytest.raises(SegmenterError, match='cannot be built'):
            load_segmenter(again(file, tmp_path, lambda a,t: a['arch'].update(arch=name)))

# -- wrong files -------------------------------------------------------------------------------------------------------
def put(*keys, value):
    def f(a, t):
        for k in keys[:-1]: a = a[k]
        a[keys[-1]] = value
    return f

@pytest.mark.parametrize('change,say', [
    (put('format', value=3), r'has format 3, this fastmiseg \(.*\) knows formats up to 2; upgrade'),
    (put('format', value='1'), 'does not say which format'),
    (lambda a,t: a.pop('recipe'), 'its header lacks recipe'),
    (lambda a,t: a.clear(), 'does not say which format'),
    (put('extra', value=1), "unknown entry 'extra'"),
    (put('recipe','colour', value=1), "its recipe cannot be used .*'colour'"),
    (put('recipe','size', value=-1), 'its recipe cannot be used .*two positive numbers'),
    (put('recipe', value=[1]), 'its recipe cannot be used'),
    (lambda a,t: a['recipe'].update(classes=['background','a'], labels=None),
     'the network has n_out=3, but the recipe says 2'),
    (put('recipe','channels', value=2), 'the network has n_in=1, but the recipe says 2'),
    (put('arch', value='unet'), 'arch is not a table'),
    (lambda a,t: a['arch'].pop('n_out'), 'the network has n_out=None'),
    (put('training', value=dict(spacing=3)), 'what it says of the training scans cannot be used'),
    (put('arch','arch', value='nonet'), "the architecture 'nonet' cannot be built "
                                        ".*neither 'unet', 'residual_unet', 'dynamic_unet' nor a timm model"),
    (put('arch','arch', value=None), 'the architecture None cannot be built'),
    (put('arch','arch', value='torchvision.models.resnet.os.system'), 'cannot be built'),
    (put('arch','pretrained', value=True), 'pretrained=True is not an argument'),
    (put('arch','width', value=1e9), 'width=1000000000.0 is not an argument, or not a value'),
    (put('arch','width', value=True), 'width=True is not an argument, or not a value'),
    (put('arch','width', value=3), r'has shape .* but the network needs'),
    (lambda a,t: t.pop('head.bias'), 'lacks 1 of .* tensors of its network, for example head.bias'),
    (lambda a,t: t.update(foot=torch.zeros(1)), 'has 1 tensors that its network does not have, for example foot'),
    (lambda a,t: t.update({'head.bias':torch.zeros(4)}), r'head.bias has shape \(4,\), but the network needs \(3,\)'),
    (lambda a,t: t.update({'head.bias':torch.full((3,), float('nan'))}), 'head.bias holds NaN'),
])
def test_refused(file, tmp_path, change, say):
    with pytest.raises(SegmenterError, match=say) as e: load_segmenter(again(file, tmp_path, change))
    assert 'b.safetensors' in str(e.value)

def test_not_there_and_folder(tmp_path):
    with pytest.raises(SegmenterError, match='a.safetensors: does not exist; '
                                             'expected a run folder, or a .safetensors file'):
        load_segmenter(tmp_path/'a.safetensors')
    with pytest.raises(SegmenterError, match='cannot be opened'): load_segmenter(tmp_path)

def test_foreign(tmp_path):
    save_file({'a':torch.zeros(1)}, tmp_path/'a.safetensors')
    with pytest.raises(SegmenterError, match='is a safetensors file, but not a segmenter'):
        load_segmenter(tmp_path/'a.safetensors')
    save_file({'a':torch.zeros(1)}, tmp_path/'a.safetensors', metadata={'fastmiseg':'{'})
    with pytest.raises(SegmenterError, match='its header is damaged'): load_segmenter(tmp_path/'a.safetensors')
    (tmp_path/'a.safetensors').write_bytes(b'')
    with pytest.raises(SegmenterError, match='is not a safetensors file'): load_segmenter(tmp_path/'a.safetensors')

def test_damage(file, tmp_path):
    "A cut file or a flipped bit is refused, in a weight too; never anything but a sentence"
    data,rng,out = file.read_bytes(),np.random.default_rng(0),tmp_path/'a.safetensors'
    for i in range(60):
        if i%3==0: bad = data[:rng.integers(len(data))]
        else:
            bad = bytearray(data)
            bad[rng.integers(6000 if i%3==1 else len(data))] ^= 1<<rng.integers(8)
        out.write_bytes(bytes(bad))
        if bytes(bad)!=data:
            with pytest.raises(SegmenterError) as e: load_segmenter(out)
            assert str(out) in str(e.value)

# -- writing -----------------------------------------------------------------------------------------------------------
def test_full_disk(tmp_path, monkeypatch):
    old = export_segmenter(Untrained(width=2), tmp_path/'a.safetensors').read_bytes()
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for where,name in ((S, 'save_file'), (os, 'replace')):
        with monkeypatch.context() as m:
            m.setattr(where, name, full)
            with pytest.raises(SegmenterError, match='a.safetensors: cannot be written .No space left'):
                export_segmenter(Untrained(width=2), tmp_path/'a.safetensors')
        assert os.listdir(tmp_path)==['a.safetensors'] and (tmp_path/'a.safetensors').read_bytes()==old

def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(SegmenterError, match="act_cls='ReLU' is not an argument"):
        export_segmenter(Untrained('dynamic_unet', width=2, act_cls=nn.ReLU), tmp_path/'a.safetensors')
    foreign = Untrained(width=2); foreign.model = nn.Conv2d(1, 3, 1)
    with pytest.raises(SegmenterError, match='would not come back from it: lacks'):
        export_segmenter(foreign, tmp_path/'a.safetensors')
    changed = Untrained(width=2)
    for m in changed.model.modules(): # as if trained: signals that arrive
        if isinstance(m, nn.BatchNorm2d): m.running_var.fill_(.01)
    changed.model.Conv5[2] = nn.Tanh()
    with pytest.raises(SegmenterError, match='would not come back from it: the network was changed after'):
        export_segmenter(changed, tmp_path/'a.safetensors')
    assert not os.listdir(tmp_path)
    foreign.arch = lambda: None # as `unet_learner` leaves it
    with pytest.raises(SegmenterError, match='was not made by miseg_learner'):
        export_segmenter(foreign, tmp_path/'a.safetensors')

# -- ONNX --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('arch,kw', [('unet',dict(width=4)), ('dynamic_unet',dict(width=4)), ('resnet10t',{})])
def test_onnx(tmp_path, arch, kw):
    pytest.importorskip('onnx', reason='the extra `onnx` is not installed')
    ort = pytest.importorskip('onnxruntime', reason='the extra `onnx` is not installed')
    l = Untrained(arch, **kw)
    for m in l.model.modules(): # statistics as after some training
        if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(-.1, .1); m.running_var.uniform_(.8, 1.2)
    l.model.train()
    export_onnx(l, tmp_path/'a.onnx')
    assert l.model.training and os.listdir(tmp_path)==['a.onnx']
    l.model.eval()
    s = ort.InferenceSession(str(tmp_path/'a.onnx'))
    for shape in ((1,1,32,32), (3,1,64,96), (2,1,96,64)):
        x = torch.rand(shape)
        with torch.no_grad(): want = l.model(x)
        got = s.run(None, dict(image=x.numpy()))[0]
        assert (got.shape==want.shape and np.allclose(got, want, atol=1e-4)
                and (got.argmax(1)==want.argmax(1).numpy()).mean()>.999)

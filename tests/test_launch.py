"The command in two processes on the CPU, as `torchrun` and `accelerate launch` start them"
import os, socket, subprocess, sys
from pathlib import Path

import pandas as pd, pytest, torch
from torch import nn

from fastmiseg import training
from fastmiseg.callback.state import checkpoints, load_state
from fastmiseg.commands import prepare_run
from fastmiseg.models import create_unet
from fastmiseg.processes import sync_batchnorm
from fastmiseg.scans.cohort import save_cohort
from fastmiseg.segmenter import load_segmenter
from fastmiseg.settings import Settings
from fastmiseg.training import check_machine

pytest.importorskip('accelerate')
tiny = ['--epochs=1', '--n-iters=3', '--width=2', '--bs=2', '--unlabeled-bs=2', '--workers=0']

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])

def torchrun(): return ['-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', free_port()]
def accelerate():
    return ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_machines', '1', '--num_processes', '2',
            '--main_process_port', free_port(), '--mixed_precision', 'no', '--dynamo_backend', 'no']

def train(how, folder, *args):
    "The command, as pip makes it, in processes started by `how`"
    script = Path(folder)/'fastmiseg-train'
    script.write_text('import sys\nfrom fastmiseg.cli import train\nif __name__=="__main__": sys.exit(train())\n')
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'CUDA_VISIBLE_DEVICES':''}
    return subprocess.run([sys.executable, *how, str(script), *map(str, args), *tiny], env=env, capture_output=True,
                          text=True, timeout=600)

@pytest.fixture(scope='module')
def prepared(hearts, tmp_path_factory):
    out = tmp_path_factory.mktemp('launch')/'prepared'
    df = hearts.df[:7].drop(columns='split')
    df.attrs.update(hearts.df.attrs)
    csv = save_cohort(df, out.parent/'seven.csv')
    prepare_run(csv, out, recipe=hearts.recipe, labeled=2, valid=1, test=1, workers=0)
    return out

@pytest.fixture(scope='module')
def runs(prepared):
    res = {}
    for how in (torchrun, accelerate):
        out = prepared.parent/how.__name__
        done = train(how(), prepared.parent, prepared, '--out', out)
        assert done.returncode==0, done.stderr[-4000:]
        res[how.__name__] = out,done.stdout
    return res

@pytest.mark.parametrize('how', ['torchrun','accelerate'])
def test_one_run_of_two_processes(runs, how):
    "What one of them writes is there once, and nobody else speaks"
    out,said = runs[how]
    assert {o.name for o in out.iterdir()}>={
        'config.json','split.csv','log.csv','checkpoints','model.safetensors','metrics.csv','figures'}
    assert len(pd.read_csv(out/'log.csv'))==1
    assert said.count('hd95')==1
    assert '2 processes: each normalises with the statistics of its own part of a batch (BatchNorm)' in said
    assert len(load_state(checkpoints(out/'checkpoints')[-1])['ranks'])==2

def test_both_ways_end_with_the_same_weights(runs):
    a,b = (load_segmenter(o/'model.safetensors', 'cpu').model.state_dict() for o,_ in runs.values())
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_sync_bn_on_the_cpu_is_refused_before_any_work(prepared, tmp_path):
    "The first process says so, once, and both end"
    done = train(torchrun(), tmp_path, prepared, '--out', tmp_path/'run', '--sync-bn')
    assert done.returncode and not (tmp_path/'run').exists()
    assert done.stderr.count('fastmiseg-train: --sync-bn: PyTorch takes the statistics of BatchNorm '
                             'over several processes on GPUs only')==1
    check_machine(Settings(sync_bn=True)) # alone there is nothing to synchronise

def test_sync_bn_converts_the_layers_and_gives_them_back():
    net = create_unet('unet', n_in=1, n_out=3, size=(32,32), width=2)
    before = [o for o in net.modules() if isinstance(o, nn.BatchNorm2d)]
    with sync_batchnorm(net):
        inside = [o for o in net.modules() if isinstance(o, nn.SyncBatchNorm)]
        assert len(inside)==len(before) and not [o for o in net.modules() if type(o) is nn.BatchNorm2d]
        for p in net.parameters(): p.data += 1
        inside[0].running_mean = torch.full_like(inside[0].running_mean, 3.)
        net.eval()
    after = [o for o in net.modules() if isinstance(o, nn.BatchNorm2d)]
    assert (all(p is q for p,q in zip(before, after)) and after[0].running_mean.eq(3).all()
            and after[0].weight.eq(2).all())
    assert not any(o.training for o in after)
    net(torch.randn(2, 1, 32, 32))

@pytest.mark.parametrize('sync_bn', [False, True])
def test_the_argument_reaches_the_layers(monkeypatch, sync_bn):
    "As in one of two processes; PyTorch's own part of the work needs GPUs"
    from contextlib import nullcontext
    from types import SimpleNamespace
    monkeypatch.setattr('fastmiseg.processes.processes', lambda: (0,2))
    learn = SimpleNamespace(model=create_unet('unet', n_in=1, n_out=3, size=(32,32), width=2),
                            distrib_ctx=lambda **kw: nullcontext())
    with training._in_all_processes(learn, Settings(sync_bn=sync_bn)):
        assert any(isinstance(o, nn.SyncBatchNorm) for o in learn.model.modules())==sync_bn

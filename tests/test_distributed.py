"Two processes on the CPU, started by `accelerate launch`, do what one does with the batch of both"
import os, re, socket, subprocess, sys
from pathlib import Path
import pytest, torch

pytest.importorskip('accelerate', reason="needs accelerate, as fastai's distrib_ctx does")

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp('distributed')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    launch = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_machines', '1', '--num_processes', '2',
              '--main_process_port', str(port), '--mixed_precision', 'no', '--dynamo_backend', 'no']
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'CUDA_VISIBLE_DEVICES':''}
    started = [subprocess.Popen([sys.executable, *how, str(Path(__file__).with_name('two_processes.py')), str(path)],
                                env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for how in (launch, [])]
    for p in started:
        out,_ = p.communicate(timeout=600)
        assert p.returncode==0, out[-4000:]
    return [torch.load(path/f'{n}.pt', weights_only=False) for n in ('2-0','2-1','1-0')]

def close(a, b, atol=1e-4):
    assert a.keys()==b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=atol)

def test_same_result_as_one_process_with_the_double_batch(results):
    a,b,one = (r['paired'] for r in results)
    assert len(a['terms'])==8
    for s,t,o in zip(a['terms'], b['terms'], one['terms']):
        for k in ('global_mi','local_mi'):
            assert s[k]==pytest.approx(t[k], abs=1e-9) # the information is that of the whole batch, for every process
            assert s[k]==pytest.approx(o[k], abs=1e-5)
        assert (s['consistency']+t['consistency'])/2==pytest.approx(o['consistency'], abs=1e-6)
    for k in ('model','heads','teacher'): close(a[k], one[k])
    logs = [dict(zip(r['names'], r['values'])) for r in (a,b,one)]
    for k in ('train_loss','dice','global_mi','local_mi','consistency'): # fastai's valid_loss counts the padding
        assert logs[0][k]==pytest.approx(logs[1][k], rel=1e-6) and logs[0][k]==pytest.approx(logs[2][k], rel=1e-3)

def test_streams_are_shared_out(results):
    a,b,one = (r['paired'] for r in results)
    for x,y,o in zip(a['x'], b['x'], one['x']): assert x+y==pytest.approx(o)
    for x,y,o in zip(a['T'], b['T'], one['T']): assert x+y==o
    a,b,one = (r['files'] for r in results)
    for x,y in zip(a['x'], b['x']): assert not set(x)&set(y)

@pytest.mark.parametrize('kind', ['paired','norm','files'])
def test_projectors_and_teacher_are_identical(results, kind):
    a,b,_ = (r[kind] for r in results)
    for k in ('heads','teacher'):
        for n in a[k]: assert torch.equal(a[k][n], b[k][n]), n
    assert a['hooks']==b['hooks']==0

def test_dice_counts_every_slice_once(results):
    "Five images for two processes: one is padding"
    a,b,one = (dict(zip((r:=o['paired'])['names'], r['values']))['dice'] for o in results)
    assert a==b and a==pytest.approx(one, abs=1e-6) and a>0

@pytest.mark.parametrize('kind', ['paired','files'])
def test_interrupted_and_gone_on(results, kind):
    "Each process finds its own random numbers again"
    (a,a2),(b,b2) = (r[f'resumed {kind}'] for r in results[:2])
    for one,two in ((a,a2), (b,b2)):
        for k in one:
            for n in one[k]: assert torch.equal(one[k][n], two[k][n]), (k,n)
    assert not torch.equal(a['random']['torch'], b['random']['torch'])

def test_folders_that_do_not_fit_are_refused(results):
    "By all processes, with the same words"
    for r in results[:2]:
        apart,alone,used,other = r['refused']
        assert 'the processes find different checkpoints' in apart and re.search(r'\(\d{6}\.pt, none\)', apart)
        assert 'was written by a training in 1 processes, here are 2' in alone
        assert re.search(r'paired0: is in use by process \d+ on ', used)
        assert 'lr: 0.0004 at 0%' in other and 'here 4e-05 at 0%' in other
    assert results[0]['refused'][2:]==results[1]['refused'][2:]

def test_methods_that_mix_images(results):
    "Random boxes, pairs of images, and what is remembered are those of one process with the double batch"
    a,b,one = (r['own'] for r in results)
    assert set(a)=={'SameSizeCallback','CutMixCallback','PasteCallback','FollowingCallback','pseudo_labels',
                    'CopyPasteCallback','balanced_mireg','all_together'}
    for name in a:
        close(a[name], b[name], atol=0)
        close(a[name], one[name])

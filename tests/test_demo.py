"The demo end to end, as a command, on a tiny budget"
import os, subprocess, sys

import nibabel as nib, numpy as np, pandas as pd, pytest

def demo(*args):
    env = {**os.environ, 'OMP_NUM_THREADS':'1'}
    return subprocess.run([sys.executable, '-m', 'fastmiseg.demo', *map(str, args)], capture_output=True, text=True, env=env)

def check(out, res, n_scans, n_classes):
    assert res.returncode==0, res.stderr
    scores = pd.read_csv(out/'scores.csv')
    assert scores.training.unique().tolist()==['labelled only', 'MIRegCallback + teacher']
    assert len(scores)==2*n_scans*n_classes and scores.dice.between(0, 1).all()
    assert 'MIRegCallback' in res.stdout and 'Dice on unseen subjects' in res.stdout
    assert (out/'demo_0.png').stat().st_size>10_000
    return scores

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo')
    return out, demo('--out', out, '--subjects', 7, '--labeled', 1, '--test', 2, '--epochs', 1, '--n-iters', 2, '--width', 2)

def test_phantom(run):
    scores = check(*run, n_scans=2, n_classes=3)
    assert set(scores['class'])=={'RV','Myo','LV'}

def test_geometry_of_a_predicted_scan(run):
    out,_ = run
    preds = sorted(out.glob('*MIRegCallback_teacher.nii.gz'))
    assert len(preds)==1
    seg = nib.load(preds[0])
    scan = nib.load(out/'scans'/'images'/preds[0].name.replace('_MIRegCallback_teacher', ''))
    assert seg.shape==scan.shape and seg.get_data_dtype()==np.uint8
    np.testing.assert_allclose(seg.affine, scan.affine, atol=1e-4)
    assert np.abs(scan.affine[0,1])>1e-3 # oblique

def test_same_seed_same_numbers(run, tmp_path):
    out,_ = run
    demo('--out', tmp_path, '--subjects', 7, '--labeled', 1, '--test', 2, '--epochs', 1, '--n-iters', 2, '--width', 2)
    pd.testing.assert_frame_equal(pd.read_csv(out/'scores.csv'), pd.read_csv(tmp_path/'scores.csv'), check_exact=True)

def test_real_scans(tmp_path):
    data = os.environ.get('FASTMISEG_DATA')
    if not data: pytest.skip('FASTMISEG_DATA does not name a folder with Decathlon scans')
    res = demo('--data', data, '--out', tmp_path, '--labeled', 1, '--test', 2, '--epochs', 1, '--n-iters', 2, '--width', 2)
    assert res.returncode==0, res.stderr
    assert set(pd.read_csv(tmp_path/'scores.csv')['class'])=={'anterior','posterior'} or 'Anterior' in res.stdout

@pytest.mark.parametrize('args,says', [
    (('--data', 'no/such/folder'), 'no/such/folder'),
    (('--subjects', 5, '--labeled', 9), 'labeled=9'),
    (('--test', 0), 'test: 0 subjects leave nothing to score'),
])
def test_wrong_input_is_a_sentence(tmp_path, args, says):
    res = demo('--out', tmp_path, *args)
    assert res.returncode==2 and says in res.stderr and 'Traceback' not in res.stderr

"The demo end to end, as a command, on a tiny budget"
import os, subprocess, sys

import nibabel as nib, numpy as np, pandas as pd, pytest

def demo(*args):
    env = {**os.environ, 'OMP_NUM_THREADS':'1'}
    return subprocess.run([sys.executable, '-m', 'fastmiseg.demo', *map(str, args)],
                          capture_output=True, text=True, env=env)

def check(out, res, n_scans, n_classes):
    assert res.returncode==0, res.stderr
    scores = pd.read_csv(out/'scores.csv')
    assert scores.training.unique().tolist()==['labelled only', 'recommended']
    assert len(scores)==2*n_scans*n_classes and scores.dice.between(0, 1).all()
    assert 'recommended' in res.stdout and f'Dice on {n_scans} unseen scan' in res.stdout
    assert (out/'demo_0.png').stat().st_size>10_000
    return scores

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo')
    return out, demo('--out', out, '--subjects', 7, '--labeled', 1, '--test', 2,
                     '--epochs', 1, '--n-iters', 2, '--width', 2)

def test_phantom(run):
    scores = check(*run, n_scans=2, n_classes=3)
    assert set(scores['class'])=={'RV','Myo','LV'}

def test_geometry_of_a_predicted_scan(run):
    out,_ = run
    preds = sorted(out.glob('*_recommended_0.nii.gz'))
    assert len(preds)==1
    seg = nib.load(preds[0])
    scan = nib.load(out/'scans'/'images'/preds[0].name.replace('_recommended_0', ''))
    assert seg.shape==scan.shape and seg.get_data_dtype()==np.uint8
    np.testing.assert_allclose(seg.affine, scan.affine, atol=1e-4)
    assert np.abs(scan.affine[0,1])>1e-3 # oblique

def test_same_seed_same_numbers(run, tmp_path):
    out,_ = run
    demo('--out', tmp_path, '--subjects', 7, '--labeled', 1, '--test', 2, '--epochs', 1, '--n-iters', 2, '--width', 2)
    pd.testing.assert_frame_equal(pd.read_csv(out/'scores.csv'), pd.read_csv(tmp_path/'scores.csv'), check_exact=True)

def test_threads_do_not_change_the_numbers(run, tmp_path):
    "The demo computes on one thread, whatever the machine offers"
    out,_ = run
    env = {k:o for k,o in os.environ.items() if k not in ('OMP_NUM_THREADS','MKL_NUM_THREADS')}
    args = ['--out', tmp_path, '--subjects', 7, '--labeled', 1, '--test', 2,
            '--epochs', 1, '--n-iters', 2, '--width', 2]
    res = subprocess.run([sys.executable, '-m', 'fastmiseg.demo', *map(str, args)],
                         capture_output=True, text=True, env={**env, 'OMP_NUM_THREADS':'2'})
    assert res.returncode==0, res.stderr
    pd.testing.assert_frame_equal(pd.read_csv(out/'scores.csv'), pd.read_csv(tmp_path/'scores.csv'), check_exact=True)

def folder(run, path, n, masks):
    "A folder of a user: scans, of which the first ones have masks"
    scans = run[0]/'scans'
    for o in ('images','masks'): (path/o).mkdir(parents=True)
    files = sorted((scans/'images').glob('*.nii.gz'))[:n]
    for i,o in enumerate(files):
        os.link(o, path/'images'/o.name)
        if i<masks: os.link(scans/'masks'/o.name, path/'masks'/o.name)
    return path

tiny = ['--epochs', 1, '--n-iters', 2, '--width', 2, '--size', 32]

@pytest.mark.parametrize('masks,labelled', [(2,1), (4,3)])
def test_few_annotated_scans_are_enough(run, tmp_path, masks, labelled):
    res = demo('--data', folder(run, tmp_path/'scans', 7, masks), '--out', tmp_path/'demo', *tiny)
    assert res.returncode==0, res.stderr
    assert f'split of {masks} annotated subjects: {labelled} labelled, 1 for validation, 0 for test' in res.stdout
    assert f"{labelled} labelled ({labelled} subject{'s'*(labelled>1)}), {7-masks} unlabelled" in res.stdout
    assert 'no scan is kept for the test' in res.stdout and 'Dice on 1 unseen scan\n' in res.stdout
    scores = pd.read_csv(tmp_path/'demo'/'scores.csv')
    assert scores.scan.nunique()==1 and set(scores.split)=={'valid'}
    assert 'next: fastmiseg-train' in res.stdout and 'scores.csv' in res.stdout and '\r' not in res.stdout

def test_all_annotated(run, tmp_path):
    "Some are used without their masks, and that is said"
    res = demo('--data', folder(run, tmp_path/'scans', 5, 5), '--out', tmp_path/'demo', '--valid', 1, *tiny)
    assert res.returncode==0, res.stderr
    assert 'every scan has a mask; to show what scans without one bring, most are used without it here' in res.stdout
    assert '1 of 5 annotated subjects is used as unlabelled' in res.stdout

def test_real_scans(tmp_path):
    data = os.environ.get('FASTMISEG_DATA')
    if not data: pytest.skip('FASTMISEG_DATA does not name a folder with Decathlon scans')
    res = demo('--data', data, '--out', tmp_path, '--labeled', 1, '--test', 2,
               '--epochs', 1, '--n-iters', 2, '--width', 2)
    assert res.returncode==0, res.stderr
    assert set(pd.read_csv(tmp_path/'scores.csv')['class'])=={'anterior','posterior'} or 'Anterior' in res.stdout

@pytest.mark.parametrize('args,says', [
    (('--data', 'no/such/folder'), 'no/such/folder'),
    (('--subjects', 5, '--labeled', 9), '--labeled 9'),
    (('--test', 0, '--valid', 0, '--subjects', 5), '--test: 0 subjects for test and validation leave nothing to score'),
])
def test_wrong_input_is_a_sentence(tmp_path, args, says):
    res = demo('--out', tmp_path, *args)
    assert res.returncode==2 and says in res.stderr and 'Traceback' not in res.stderr

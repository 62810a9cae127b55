"The package as `pip install .` leaves it, used from elsewhere"
import os, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
setuptools = pytest.importorskip('setuptools', minversion='77')

@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "Built from a copy, so that nothing is left in the repository"
    import shutil
    here = tmp_path_factory.mktemp('install')
    for o in ('setup.py','settings.ini','pyproject.toml','README.md','LICENSE'): shutil.copy(root/o, here)
    shutil.copytree(root/'fastmiseg', here/'fastmiseg', ignore=shutil.ignore_patterns('__pycache__'))
    target = here/'site'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-build-isolation',
                    '--target', target, here],
                   check=True, capture_output=True, text=True, timeout=300)
    return target

def test_every_module_is_there(installed):
    names = lambda folder: sorted(str(o.relative_to(folder)) for o in (folder/'fastmiseg').rglob('*.py'))
    assert names(installed)==names(root)

def test_commands_are_there_and_work_elsewhere(installed, tmp_path):
    config = ConfigParser()
    config.read(root/'settings.ini', encoding='utf-8')
    wanted = {o.split('=')[0] for o in config['DEFAULT']['console_scripts'].split()}
    assert {o.stem for o in (installed/'bin').iterdir()}>=wanted
    env = {**os.environ, 'PYTHONPATH':str(installed)}
    for command in ('fastmiseg-demo','fastmiseg-train'):
        said = subprocess.run([sys.executable, installed/'bin'/command, '--help'],
                              cwd=tmp_path, env=env, capture_output=True, text=True)
        assert said.returncode==0 and f'usage: {command}' in said.stdout, said.stderr
    where = subprocess.run([sys.executable, '-c', 'import fastmiseg; print(fastmiseg.__file__)'],
                           cwd=tmp_path, env=env, capture_output=True, text=True)
    assert Path(where.stdout.strip()).is_relative_to(installed)

# Imported before anything else: the finder of what is on the path finds none of these
absent = '''
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None): return None if name.split('.')[0] in {names} else find(name, path, target)
PathFinder.find_spec = find_spec
'''

def test_commands_need_only_what_pip_installs_with_them(installed, tmp_path):
    "Scans in, masks out, where nothing is installed that only development or an extra asks for"
    from fastmiseg.scans.phantom import make_phantom
    config = ConfigParser()
    config.read(root/'settings.ini', encoding='utf-8')
    more = ' '.join(config['DEFAULT'][f'{o}_requirements'] for o in ('dev','onnx','viewer')).split()
    names = {re.split('[<>=;]', o)[0].replace('-', '_') for o in more}
    assert {'accelerate','onnx','ipyniivue'}<=names
    (tmp_path/'site').mkdir()
    (tmp_path/'site'/'sitecustomize.py').write_text(absent.format(names=names))
    env = {**os.environ, 'PYTHONPATH':f'{installed}{os.pathsep}{tmp_path/"site"}', 'OMP_NUM_THREADS':'1'}
    def run(command, *args):
        return subprocess.run([sys.executable, installed/'bin'/command, *map(str, args)], cwd=tmp_path, env=env,
                              capture_output=True, text=True, timeout=300)
    refused = subprocess.run([sys.executable, '-c', 'import accelerate'], env=env, capture_output=True, text=True)
    assert "No module named 'accelerate'" in refused.stderr
    make_phantom(tmp_path/'scans', n_subjects=5, seed=0, size=(32,40), n_slices=(3,4))
    few = ['--labeled=2', '--valid=1', '--test=1', '--epochs=1', '--n-iters=2', '--width=2', '--bs=2',
           '--unlabeled-bs=2', '--workers=0']
    done = run('fastmiseg-train', 'scans', '--out', 'run', *few)
    assert done.returncode==0 and 'Traceback' not in done.stderr, done.stderr
    scan = next((tmp_path/'scans').rglob('*.nii.gz'))
    done = run('fastmiseg-predict', 'run', scan, '--out', 'masks')
    assert done.returncode==0 and list((tmp_path/'masks').glob('*.nii.gz')), done.stderr

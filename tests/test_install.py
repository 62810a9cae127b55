"The package as `pip install .` leaves it, used from elsewhere"
import os, subprocess, sys
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
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-build-isolation', '--target', target, here],
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
        said = subprocess.run([sys.executable, installed/'bin'/command, '--help'], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert said.returncode==0 and f'usage: {command}' in said.stdout, said.stderr
    where = subprocess.run([sys.executable, '-c', 'import fastmiseg; print(fastmiseg.__file__)'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert Path(where.stdout.strip()).is_relative_to(installed)

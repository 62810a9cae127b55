"The package's metadata and requirements are in `settings.ini`; the version is in `fastmiseg/__init__.py`."
import ast
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
init = ast.parse((here/'fastmiseg'/'__init__.py').read_text(encoding='utf-8'))
version = next(o.value.value for o in init.body if isinstance(o, ast.Assign) and o.targets[0].id=='__version__')

setup(
    version=version,
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    license=cfg['license'],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={'onnx': cfg['onnx_requirements'].split(), 'viewer': cfg['viewer_requirements'].split(), 'dev': (cfg['dev_requirements']+'\n'+cfg['onnx_requirements']).split()},
    packages=find_packages(include=['fastmiseg', 'fastmiseg.*']),
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['fastmiseg=fastmiseg._modidx:d']},
)

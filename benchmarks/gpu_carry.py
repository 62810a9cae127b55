"""What a machine with one GPU and no network lacks for `gpu.sh`, in one folder that git ignores.

    python benchmarks/gpu_carry.py FOLDER [DATA]   # make gpu-carry DATA=/my/acdc

FOLDER gets wheels for Python 3.12 on Linux of what is not in THERE, in the versions that are installed
here; and, of the scans in DATA (or FASTMISEG_DATA), slices/ to train on (gpu_slices.py), unless it has
them. FOLDER and the repository's files together are to fit in 64 MiB.
"""
import configparser, importlib.metadata, os, subprocess, sys, tempfile
from pathlib import Path
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MOST = 64<<20
PYTHON = '3.12'
# what a Python with PyTorch has (or, as spacy, is not imported); what reads scans has stand-ins
THERE = {'torch','torchvision','triton','numpy','pandas','scipy','matplotlib','pillow','scikit-learn','pyyaml',
         'requests','timm','safetensors','psutil','filelock','spacy','setuptools','pip'}
STOOD_IN = {'simpleitk','nibabel','pydicom'}
TESTS = 'pytest','pytest-xdist','hypothesis'

def wanted():
    "Names of our requirements, what they require in turn, and what runs the tests, without what is there"
    settings = configparser.ConfigParser()
    settings.read(ROOT/'settings.ini')
    there = dict(python_version=PYTHON, python_full_version=f'{PYTHON}.0', sys_platform='linux',
                 platform_system='Linux', platform_machine='x86_64', implementation_name='cpython',
                 platform_python_implementation='CPython', os_name='posix', extra='')
    todo,found = [*settings['DEFAULT']['requirements'].split('\n'), *TESTS],{}
    while todo:
        r = Requirement(todo.pop())
        name = canonicalize_name(r.name)
        if name in found or name in THERE|STOOD_IN or r.marker and not r.marker.evaluate(there): continue
        try: found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f'gpu_carry.py: {name} is not installed here, and its version is to be that of here; '
                     "make the environment anew: pip install -e '.[dev]'")
        todo += importlib.metadata.requires(name) or []
    return dict(sorted(found.items()))

def wheels(folder):
    for o in folder.glob('*.whl'): o.unlink()
    platforms = [f'manylinux{o}_x86_64' for o in ('_2_28','_2_27','_2_24','_2_17','2014','_2_12','2010','_2_5','1')]
    subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:',
                    '--python-version', PYTHON, '--implementation', 'cp',
                    *(o for p in platforms for o in ('--platform', p)), '-d', str(folder),
                    *(f'{k}=={v}' for k,v in wanted().items())], check=True)

def slices(folder, data):
    if (folder/'index.json').exists(): return print(f'{folder}: is there; delete it to have it made again')
    if not data:
        return print('No slices: give the folder of ACDC (DATA, or FASTMISEG_DATA); without them the part '
                     '`train` of gpu.sh refuses')
    from gpu_slices import pack
    with tempfile.TemporaryDirectory() as tmp: pack(data, folder, os.environ.get('FASTMISEG_STORE', tmp))

def check(folder):
    "An error where it is too much"
    tracked = subprocess.run(['git','ls-files','-z','-co','--exclude-standard'], cwd=ROOT, check=True,
                             capture_output=True, text=True).stdout.split('\0')
    size = lambda files: sum(o.stat().st_size for o in files if o.is_file())
    ours,theirs = size(o for o in folder.rglob('*')),size(ROOT/o for o in tracked if o)
    said = f'{folder}: {ours/2**20:.1f} MiB, and the repository {theirs/2**20:.1f} MiB'
    if ours+theirs<=MOST: return print(f'{said}, of {MOST>>20}')
    large = sorted((o for o in folder.rglob('*') if o.is_file()), key=lambda o: -o.stat().st_size)[:3]
    sys.exit(f'{said}: more than the {MOST>>20} that can be carried; the largest: '
             + ', '.join(f'{o.relative_to(folder)} {o.stat().st_size/2**20:.1f} MiB' for o in large))

if __name__=='__main__':
    if len(sys.argv) not in (2,3): sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    wheels(folder)
    slices(folder/'slices', sys.argv[2] if len(sys.argv)>2 else os.environ.get('FASTMISEG_DATA'))
    check(folder)

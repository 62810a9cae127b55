"What importing any room of this wing changes in fastai is in `install`"
from . import install

"""RD-MLDG as a plug-in of stock DomainBed."""

import pathlib as _pathlib

__version__ = "0.1.0"

# In a checkout `algorithms/`, `datasets/` and `sweeps/` stand beside this package; installed, they are inside of it.
_root = _pathlib.Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "algorithms").is_dir():
    __path__.append(str(_root))

"""Where Python looks for modules, here and in all processes that are started from here: never in the user's folder.

A `sampling.py`, `json.py` or `torch.py` there would be taken for one of the house, of Python or of a library.
"""

import os
import site
import sys
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent


def keep_safe_path() -> None:
    """Take the working folder from `sys.path`, unless it is the house's own, and keep children from looking there."""
    here = Path.cwd()
    if here != HOUSE:
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    os.environ["PYTHONSAFEPATH"] = "1"
    # An empty entry, as `PYTHONPATH=$PYTHONPATH:/x` often has, is the working folder.
    typed = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    own = [] if _is_installed() or str(HOUSE) in typed else [str(HOUSE)]
    if own or typed:
        os.environ["PYTHONPATH"] = os.pathsep.join(own + typed)
    else:
        os.environ.pop("PYTHONPATH", None)


def _is_installed() -> bool:
    """Whether any Python of this environment finds the house, and not this one alone."""
    return str(HOUSE) in {*map(os.path.realpath, (*site.getsitepackages(), site.getusersitepackages()))}

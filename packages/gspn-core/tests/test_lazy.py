"""Importing the package: no torch until it is used, and the operators registered whichever is imported first."""

import pkgutil
import subprocess
import sys

import pytest

import gspn_core

PROGRAMS = {
    "the package alone": "import gspn_core, sys; assert 'torch' not in sys.modules; gspn_core.__version__",
    "then torch": "import gspn_core, torch; torch.ops.gspn.propagate",
    "torch before": "import torch, gspn_core; torch.ops.gspn.propagate",
    "a name of the package": "import gspn_core; gspn_core.propagate; import torch; torch.ops.gspn.line_scan",
    "from the package": "from gspn_core import SpatialPropagation, reference, DIRECTIONS, info; reference.propagate",
    "someone asks whether torch exists": (
        "import gspn_core, importlib.util, sys; assert importlib.util.find_spec('torch')\n"
        "assert 'torch' not in sys.modules; import torch; torch.ops.gspn.propagate"
    ),
    "torch is left as it was": (
        "import gspn_core, torch, inspect, sys; assert 'gspn' not in repr(torch.__loader__) + repr(torch.__spec__)\n"
        "assert inspect.getsource(torch)\n"
        "assert not [f for f in sys.meta_path if type(f).__module__ == 'gspn_core._lazy']"
    ),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_imports(program):
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gspn_core' has no attribute 'propogate'"):
        gspn_core.propogate  # noqa: B018
    assert all(hasattr(gspn_core, name) for name in gspn_core.__all__)


SUBMODULES = [
    module.name for module in pkgutil.iter_modules(gspn_core.__path__) if module.name not in ("_C", "__main__")
]


@pytest.mark.parametrize("name", SUBMODULES)
def test_any_submodule_may_be_imported_first(name):
    """Importing torch, which many do first of all, imports the operators in the middle of it."""
    program = f"import gspn_core.{name}, torch; torch.ops.gspn.propagate; import gspn_core.ops, gspn_core._flops"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

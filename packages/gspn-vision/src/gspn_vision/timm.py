"""Run a script of timm's that knows the models of this package.

python -m gspn_vision.timm train.py DATA --model gspn2_tiny --num-classes 10
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> int:
    """Register the models and run the script; its words are those that follow it."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m gspn_vision.timm SCRIPT [ITS OPTIONS]", file=sys.stderr)
        return 0 if len(sys.argv) > 1 else 2
    script = Path(sys.argv[1])
    if not script.is_file():
        print(f"gspn_vision.timm: error: no script {sys.argv[1]!r}", file=sys.stderr)
        return 2
    from . import models  # noqa: F401  (registers them)

    del sys.argv[0]
    sys.path[0] = str(script.parent)  # where Python itself looks for what a script imports
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())

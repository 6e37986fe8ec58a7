"""Lets the tests import the demonstrations, which are scripts and belong to no package."""

import os
import sys
from pathlib import Path

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
sys.path.insert(0, str(Path(__file__).parent))

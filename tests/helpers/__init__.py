"""What tests share: small models and data, loops, the command line."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REAL_FSYNC = os.fsync
"""The others wait for no disk, see ``conftest.py``."""

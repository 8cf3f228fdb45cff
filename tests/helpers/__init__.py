"""What tests share: small models and data, loops, the command line."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

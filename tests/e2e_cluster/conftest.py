"""Puts `e2e` on the path, where the cluster's modules are: it is a tool of the repository and in no wheel."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "e2e"))

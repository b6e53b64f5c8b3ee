"""Makes this folder's helper modules (`engine_fakes`, `loop_fakes`) importable by its tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

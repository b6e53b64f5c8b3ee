"""What the client costs to import: none of the official package's typed models, which an image does not even hold."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOW = """
import json, sys
import quire_operator.process.process
print(json.dumps([m.__file__ for name, m in sys.modules.items() if name.startswith("kubernetes")]))
"""


def test_no_typed_model_of_the_asynchronous_part_is_imported() -> None:
    shown = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    loaded = [Path(file) for file in json.loads(shown.stdout)]
    assert any(path.match("kubernetes/aio/client/rest.py") for path in loaded)
    unread = runpy.run_path(str(ROOT / "deploy" / "image" / "venv.py"))["UNREAD"]
    patterns = [pattern for pattern in unread if pattern.startswith("kubernetes/")]
    assert len(patterns) == 3
    assert [path for path in loaded for pattern in patterns if path.match(pattern)] == []

"""The models that the hub mirror serves: SmolLM2 from its GGUF file, and one of random weights that starts at once."""

import os
import subprocess
import sys
from pathlib import Path

from hub_mirror.make_smollm2 import make_directory
from tiny_model import save_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
GGUF = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_tiny(folder: Path) -> Path:
    folder.mkdir()
    return save_tiny_llama(folder)


def make_smollm2() -> Path:
    """Return SmolLM2 as safetensors, made once and kept in the cache."""
    cache = Path(os.environ.get("QUIRE_CACHE") or Path.home() / ".cache" / "quire").expanduser()
    folder = cache / "models" / "SmolLM2-135M-Instruct-safetensors"
    if not (folder / "model.safetensors").exists():
        if not GGUF.exists():
            subprocess.run([sys.executable, "-m", "quire_cli.demo", "fetch", str(GGUF)], cwd=ROOT, check=True)
        make_directory(GGUF, folder)
    return folder

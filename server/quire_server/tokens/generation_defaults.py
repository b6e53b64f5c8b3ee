"""What a model's makers recommend for sampling: its generation_config.json. Shared by the server and by `LLM`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quire_server.weights.stored import read_json

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_generation_defaults(path: Path) -> Mapping[str, Any]:
    """Return the sampling parameters that a model directory's generation_config.json sets."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    config = read_json(file)
    defaults = {name: config[name] for name in _SAMPLING_DEFAULTS if config.get(name) is not None}
    if config.get("max_new_tokens") is not None:
        defaults["max_tokens"] = config["max_new_tokens"]
    return defaults

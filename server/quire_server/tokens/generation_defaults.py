"""What a model's makers recommend for sampling: its generation config. Shared by the server and by `LLM`."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quire_server.shared.errors import InvalidRequestError
from quire_server.shared.sampling_params import SamplingParams
from quire_server.tokens.tokenizer_files import gguf_file
from quire_server.weights.gguf import GgufCheckpoint
from quire_server.weights.stored import read_json

log = logging.getLogger(__name__)

_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""From the file's names to ours."""


def read_generation_defaults(path: Path) -> Mapping[str, Any]:
    """Return the sampling parameters that a model recommends: its generation_config.json, or its GGUF file.

    One that no request could use is left out with a warning. Raises CheckpointError for a file that cannot be read.
    """
    config = _read_generation_config(path)
    declared = {ours: config[theirs] for theirs, ours in _DEFAULTS.items() if config.get(theirs) is not None}
    return {name: value for name, value in declared.items() if _is_usable(name, value)}


def _read_generation_config(path: Path) -> Mapping[str, Any]:
    gguf = gguf_file(path)
    if gguf is not None:
        return GgufCheckpoint(gguf).generation_config
    file = path / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def _is_usable(name: str, value: Any) -> bool:
    try:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_whole = isinstance(value, int) or name not in ("top_k", "max_tokens")
        if is_number and is_whole and (name != "max_tokens" or value > 0):
            SamplingParams(**{name: value})
            return True
        problem = f"{name} must be a {'positive whole ' if name == 'max_tokens' else ''}number"
    except InvalidRequestError as error:
        problem = str(error)
    log.warning("The model's own default of %s, %s, is left out: %s", name, json.dumps(value), problem)
    return False

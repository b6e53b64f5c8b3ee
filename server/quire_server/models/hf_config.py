"""Reading Hugging Face configs: a missing field, or a value that means something we do not run, fails with its name."""

import sys
from collections.abc import Mapping
from typing import Any, Literal

from quire_server.shared.errors import CheckpointError, UnsupportedModelError

_MAX_SIZE = 2**31 - 1
_DEFAULT_WINDOW = 4096
_LAYER_TYPES = ("full_attention", "sliding_attention")

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def require(config: Mapping[str, Any], key: str) -> Any:
    """Return a field. Raises CheckpointError naming it."""
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"The model's config has no {key!r}.")
    return value


def require_size(config: Mapping[str, Any], key: str) -> int:
    """Return how many there are of something. Raises CheckpointError naming the field."""
    return check_size(key, require(config, key))


def read_size(config: Mapping[str, Any], key: str, default: int) -> int:
    """Return a size that need not be given, or be null. Raises CheckpointError naming the field."""
    value = config.get(key)
    return default if value is None else check_size(key, value)


def check_size(name: str, value: object, what: str = "whole number") -> int:
    """Return a value that is a size. Raises CheckpointError: 64.0, "64" and true are none."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_SIZE:
        raise _unusable(name, value, f"{what} of at least 1")
    return value


def require_number(config: Mapping[str, Any], key: str) -> float:
    """Return a finite number above 0. Raises CheckpointError naming the field."""
    return _check_number(key, require(config, key))


def read_number(config: Mapping[str, Any], key: str, default: float, *, can_be_zero: bool = False) -> float:
    """Return a finite number above 0 that need not be given, or be null. Raises CheckpointError naming the field."""
    value = config.get(key)
    return default if value is None else _check_number(key, value, can_be_zero=can_be_zero)


def _check_number(name: str, value: Any, *, can_be_zero: bool = False) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value <= sys.float_info.max or (can_be_zero and value == 0)):
        raise _unusable(name, value, "number of at least 0" if can_be_zero else "number above 0")
    number: float = value
    return number


def _unusable(name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"The model's config is not usable: {name!r} is {value!r}, not a {wanted}.")


def parse_activation(name: object) -> Activation:
    """Raises UnsupportedModelError."""
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"activation {name!r} is not supported ({', '.join(_ACTIVATIONS)} are).")
    return _ACTIVATIONS[name]


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Return `head_dim`, or what the hidden size makes it. Raises CheckpointError."""
    return derived_head_dim(config) if config.get("head_dim") is None else require_size(config, "head_dim")


def derived_head_dim(config: Mapping[str, Any]) -> int:
    """Return what the hidden size makes a head. Raises CheckpointError."""
    head_dim = require_size(config, "hidden_size") // require_size(config, "num_attention_heads")
    return check_size("hidden_size / num_attention_heads", head_dim)


def sliding_window_of(config: Mapping[str, Any]) -> int | None:
    """Return `sliding_window`; null means none, and without the field there is the default. Raises CheckpointError."""
    window = config.get("sliding_window", _DEFAULT_WINDOW)
    return None if window is None else check_size("sliding_window", window, "window")


def layer_types_of(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the kind of attention of each layer, as many as `num_hidden_layers` says; None: nothing is said of it.

    Pruned models keep the longer list of what they were made of: its end is left out. Raises CheckpointError for a
    list that is too short, UnsupportedModelError for other kinds than full and sliding attention.
    """
    layer_types, num_layers = config.get("layer_types"), require_size(config, "num_hidden_layers")
    if layer_types is None:
        return None
    if not isinstance(layer_types, list | tuple) or len(layer_types) < num_layers:
        raise _unusable("layer_types", layer_types, f"list of one kind for each of {num_layers} layers")
    used = tuple(layer_types[:num_layers])
    for kind in used:
        if kind not in _LAYER_TYPES:
            raise UnsupportedModelError(f"layer type {kind!r} is not supported ({', '.join(_LAYER_TYPES)} are).")
    return used

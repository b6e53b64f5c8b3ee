"""Reading Hugging Face configs: a missing field, or a value that means something we do not run, fails with its name."""

from collections.abc import Mapping
from typing import Any, Literal

from quire_server.errors import CheckpointError, UnsupportedModelError

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


def parse_activation(name: str) -> Activation:
    """Raises UnsupportedModelError."""
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"activation {name!r} is not supported ({', '.join(_ACTIVATIONS)} are).")
    return _ACTIVATIONS[name]


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Return `head_dim`, or what the hidden size makes it."""
    return int(config.get("head_dim") or require(config, "hidden_size") // require(config, "num_attention_heads"))

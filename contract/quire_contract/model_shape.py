"""What a model's memory depends on, read from a Hugging Face config or from GGUF metadata. Plain integers.

Knows no checkpoint and no device. A family is one function from its config to a `ModelShape`; a new kind of layer
(experts, latent attention) is a further `ParameterGroup` or `KVLayers`, and `fit.py` stays as it is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final

Config = Mapping[str, Any]


class FitError(ValueError):
    """The memory of this model cannot be told. The message names the field or the family."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters that are stored, split and quantised alike."""

    name: str
    count: int
    """In the whole model."""
    is_per_layer: bool
    """Dealt out to pipeline stages with the layers; otherwise held by the first or last stage."""
    is_split: bool = True
    """Each device of a tensor-parallel group holds its share; otherwise all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayers:
    """Layers whose keys and values have one shape."""

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None = None
    """Tokens that a layer looks back on, itself included; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of the whole model; tied parameters are counted once."""

    family: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    qkv_width: int
    """Query, key and value of one token in one layer, in elements."""
    mlp_width: int
    """Widest moment of one token in the MLP: all outputs of its first projection, and what is made of them."""
    parameters: tuple[ParameterGroup, ...]
    kv_layers: tuple[KVLayers, ...]
    checkpoint_dtype: str | None = None
    stored_weights_bytes: int | None = None
    """Size of the tensors on disk, where known (GGUF)."""

    @property
    def num_parameters(self) -> int:
        return sum(group.count for group in self.parameters)

    @property
    def uniform_sliding_window(self) -> int | None:
        """The window that every layer has; None where any layer sees everything, or another window."""
        windows = {layers.sliding_window for layers in self.kv_layers}
        return windows.pop() if len(windows) == 1 else None


def shape_from_hf_config(config: Config) -> ModelShape:
    """Read a `config.json`.

    Raises:
        FitError: an unknown family, quantised weights, or a field that is missing.
    """
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise FitError(f"quantised weights (quant_method {method}) are not counted")
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise FitError(f"model_type {family!r} is not known; known are {', '.join(sorted(_FAMILIES))}")
    shape = _FAMILIES[family](config)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return replace(shape, checkpoint_dtype=str(dtype).removeprefix("torch.") if dtype else None)


def shape_from_gguf(metadata: Mapping[str, Any], tensor_bytes: Mapping[str, int] | None = None) -> ModelShape:
    """Read the metadata of a GGUF file; `tensor_bytes` maps its tensors' names to their sizes on disk.

    Without the tensors, an output matrix of its own is assumed where the family usually has one.

    Raises:
        FitError: an unknown architecture, or a key that is missing.
    """
    architecture = metadata.get("general.architecture")
    family = _GGUF_FAMILIES.get(str(architecture))
    if family is None:
        raise FitError(f"architecture {architecture!r} is not known; known are {', '.join(sorted(_GGUF_FAMILIES))}")
    config = _config_from_gguf(str(architecture), metadata)
    is_tied = family in ("gemma", "gemma2")
    if tensor_bytes is not None:
        is_tied = "output.weight" not in tensor_bytes
    shape = _FAMILIES[family]({**config, "model_type": family, "tie_word_embeddings": is_tied})
    return replace(shape, stored_weights_bytes=None if tensor_bytes is None else sum(tensor_bytes.values()))


_GGUF_FAMILIES: Final = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gptneox": "gpt_neox",
}
_GGUF_KEYS: Final = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "vocab_size": "vocab_size",
}


def _config_from_gguf(architecture: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name, key in _GGUF_KEYS.items():
        value = metadata.get(f"{architecture}.{key}")
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(set(value)) != 1:
                raise FitError(f"{architecture}.{key} differs from layer to layer, which is not counted")
            value = value[0]
        if value is not None:
            config[name] = int(value)
    if "vocab_size" not in config and "tokenizer.ggml.tokens" in metadata:
        config["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    return config


def _need(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise FitError(f"the model's config has no usable {key!r}")
    return value


def _kv_layers(windows: Iterable[int | None], num_kv_heads: int, head_dim: int) -> tuple[KVLayers, ...]:
    by_window = groupby(sorted(windows, key=lambda window: window or 0))
    return tuple(
        KVLayers(
            num_layers=len(list(layers)),
            num_kv_heads=num_kv_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            sliding_window=window,
        )
        for window, layers in by_window
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gated:
    """How a Llama-like family differs from Llama."""

    num_norms: int = 2
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    is_tied: bool = False
    has_bias_options: bool = False
    """Heeds `attention_bias` and `mlp_bias`."""
    num_kv_heads: int | None = None
    """Where the config is silent; None: as many as heads."""
    head_dim: int | None = None
    """Where the config is silent; None: hidden size by heads."""
    windows: Callable[[Config, int], tuple[int | None, ...]] = lambda _, num_layers: (None,) * num_layers


def _gated_shape(config: Config, family: str, how: _Gated) -> ModelShape:
    hidden, layers = _need(config, "hidden_size"), _need(config, "num_hidden_layers")
    vocab, intermediate = _need(config, "vocab_size"), _need(config, "intermediate_size")
    heads = _need(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or how.num_kv_heads or heads
    head_dim = config.get("head_dim") or how.head_dim or hidden // heads
    query, key_value = heads * head_dim, 2 * kv_heads * head_dim
    has_attention_bias = how.has_bias_options and bool(config.get("attention_bias", False))
    has_mlp_bias = how.has_bias_options and bool(config.get("mlp_bias", False))
    biases = (query + key_value) * (has_attention_bias or how.has_qkv_bias) + hidden * has_attention_bias
    biases += (2 * intermediate + hidden) * has_mlp_bias
    norms = how.num_norms * hidden + 2 * head_dim * how.has_qk_norm
    parameters = [
        _per_layer("attention", layers * (hidden * (query + key_value) + query * hidden)),
        _per_layer("mlp", layers * 3 * hidden * intermediate),
        _per_layer("biases", layers * biases),
        _per_layer("norms", layers * norms, is_split=False),
        ParameterGroup(name="embedding", count=vocab * hidden, is_per_layer=False),
        ParameterGroup(name="final_norm", count=hidden, is_per_layer=False, is_split=False),
    ]
    if not config.get("tie_word_embeddings", how.is_tied):
        parameters.append(ParameterGroup(name="lm_head", count=vocab * hidden, is_per_layer=False))
    return ModelShape(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=vocab,
        max_position_embeddings=_need(config, "max_position_embeddings"),
        qkv_width=query + key_value,
        mlp_width=3 * intermediate,
        parameters=tuple(parameters),
        kv_layers=_kv_layers(how.windows(config, layers), kv_heads, head_dim),
    )


def _per_layer(name: str, count: int, *, is_split: bool = True) -> ParameterGroup:
    return ParameterGroup(name=name, count=count, is_per_layer=True, is_split=is_split)


def _mistral_windows(config: Config, num_layers: int) -> tuple[int | None, ...]:
    return (config.get("sliding_window", 4096),) * num_layers


def _qwen_windows(config: Config, num_layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window", 4096)
    if not config.get("use_sliding_window") or window is None:
        return (None,) * num_layers
    if config.get("layer_types"):
        return _windows_by_type(config, window)
    first = config.get("max_window_layers", 28)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _gemma2_windows(config: Config, num_layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window", 4096)
    if config.get("layer_types"):
        return _windows_by_type(config, window)
    return tuple(window if layer % 2 == 0 else None for layer in range(num_layers))


def _windows_by_type(config: Config, window: int) -> tuple[int | None, ...]:
    return tuple(window if kind == "sliding_attention" else None for kind in config["layer_types"])


def _plain_shape(
    config: Config, family: str, intermediate: int, per_layer: list[ParameterGroup], other: list[ParameterGroup]
) -> ModelShape:
    """Build the shape of a family with as many key-value heads as heads, no gate and no window (OPT, GPT-NeoX)."""
    hidden, layers, heads = (_need(config, f) for f in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    return ModelShape(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=_need(config, "vocab_size"),
        max_position_embeddings=_need(config, "max_position_embeddings"),
        qkv_width=3 * hidden,
        mlp_width=2 * intermediate,
        parameters=(*per_layer, *other),
        kv_layers=_kv_layers((None,) * layers, heads, hidden // heads),
    )


def _opt_shape(config: Config) -> ModelShape:
    hidden, layers, vocab = (_need(config, f) for f in ("hidden_size", "num_hidden_layers", "vocab_size"))
    ffn, positions = _need(config, "ffn_dim"), _need(config, "max_position_embeddings") + 2
    embedding = config.get("word_embed_proj_dim") or hidden
    has_bias, is_affine = config.get("enable_bias", True), config.get("layer_norm_elementwise_affine", True)
    norm = 2 * hidden * is_affine
    has_final_norm = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
    per_layer = [
        _per_layer("attention", layers * 4 * hidden * hidden),
        _per_layer("mlp", layers * 2 * hidden * ffn),
        _per_layer("biases", layers * (4 * hidden + ffn + hidden) * has_bias),
        _per_layer("norms", layers * 2 * norm, is_split=False),
    ]
    other = [
        ParameterGroup(name="embedding", count=vocab * embedding, is_per_layer=False),
        ParameterGroup(name="positions", count=positions * hidden, is_per_layer=False, is_split=False),
        ParameterGroup(name="final_norm", count=norm * has_final_norm, is_per_layer=False, is_split=False),
    ]
    if embedding != hidden:
        other.append(ParameterGroup(name="projections", count=2 * embedding * hidden, is_per_layer=False))
    if not config.get("tie_word_embeddings", True):
        other.append(ParameterGroup(name="lm_head", count=vocab * embedding, is_per_layer=False))
    return _plain_shape(config, "opt", ffn, per_layer, other)


def _gpt_neox_shape(config: Config) -> ModelShape:
    hidden, layers, vocab = (_need(config, f) for f in ("hidden_size", "num_hidden_layers", "vocab_size"))
    intermediate = _need(config, "intermediate_size")
    attention_bias = 4 * hidden * config.get("attention_bias", True)
    per_layer = [
        _per_layer("attention", layers * 4 * hidden * hidden),
        _per_layer("mlp", layers * 2 * hidden * intermediate),
        _per_layer("biases", layers * (attention_bias + intermediate + hidden)),
        _per_layer("norms", layers * 4 * hidden, is_split=False),
    ]
    other = [
        ParameterGroup(name="embedding", count=vocab * hidden, is_per_layer=False),
        ParameterGroup(name="final_norm", count=2 * hidden, is_per_layer=False, is_split=False),
    ]
    if not config.get("tie_word_embeddings", False):
        other.append(ParameterGroup(name="lm_head", count=vocab * hidden, is_per_layer=False))
    return _plain_shape(config, "gpt_neox", intermediate, per_layer, other)


def _gated(family: str, how: _Gated) -> Callable[[Config], ModelShape]:
    return lambda config: _gated_shape(config, family, how)


_FAMILIES: Final[dict[str, Callable[[Config], ModelShape]]] = {
    "llama": _gated("llama", _Gated(has_bias_options=True)),
    "mistral": _gated("mistral", _Gated(num_kv_heads=8, windows=_mistral_windows)),
    "qwen2": _gated("qwen2", _Gated(num_kv_heads=32, has_qkv_bias=True, windows=_qwen_windows)),
    "qwen3": _gated(
        "qwen3", _Gated(num_kv_heads=32, head_dim=128, has_qk_norm=True, has_bias_options=True, windows=_qwen_windows)
    ),
    "gemma": _gated("gemma", _Gated(num_kv_heads=16, head_dim=256, is_tied=True, has_bias_options=True)),
    "gemma2": _gated(
        "gemma2",
        _Gated(num_kv_heads=4, head_dim=256, num_norms=4, is_tied=True, has_bias_options=True, windows=_gemma2_windows),
    ),
    "opt": _opt_shape,
    "gpt_neox": _gpt_neox_shape,
}

"""GGUF metadata in the shape of Hugging Face's config.json and generation_config.json. Pure: metadata in, dicts out."""

import math
import struct
from collections.abc import Sequence
from typing import Any

from quire_server.shared.errors import CheckpointError, UnsupportedModelError
from quire_server.weights.gguf_metadata import check_metadata
from quire_server.weights.gguf_names import GgufArchitecture
from quire_server.weights.gguf_reader import F32, GgufFile, tensor_bytes

_GEMMA2_27B_LAYERS = 46
_ROPE_DIVISORS = "rope_freqs.weight"


class _Metadata:
    """The keys of one architecture, and which of a model's files has a tensor. The first file holds the keys."""

    def __init__(self, files: Sequence[GgufFile]) -> None:
        self._files = files
        self.path = files[0].path
        self.architecture = files[0].metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the one that all layers have. Raises CheckpointError for a text where none belongs."""
        value = self._files[0].metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModelError(f"{self.path}: {self.architecture}.{key} differs by layer: not supported.")
            value = value[0]
        if isinstance(value, str) and not isinstance(default, str):
            raise CheckpointError(f"{self.path}: metadata {self.architecture}.{key} is {value!r}, not a number.")
        return value

    def require(self, key: str) -> Any:
        value = self.get(key)
        if not value:
            raise CheckpointError(f"{self.path}: metadata {self.architecture}.{key} is missing or zero.")
        return value

    def file_of(self, tensor: str) -> GgufFile | None:
        return next((file for file in self._files if tensor in file.tensors), None)


def build_config(files: Sequence[GgufFile], architecture: GgufArchitecture) -> dict[str, Any]:
    """Build a config from a model's files.

    Raises CheckpointError for a missing key, UnsupportedModelError for one that asks for what is not done.
    """
    metadata = _Metadata(files)
    if metadata.get("expert_count", 0):
        raise UnsupportedModelError(f"{metadata.path}: a mixture of experts in GGUF is not supported.")
    num_heads, hidden_size = metadata.require("attention.head_count"), metadata.require("embedding_length")
    head_dim = metadata.get("attention.key_length", hidden_size // num_heads)
    config = {
        "architectures": [architecture.hf_architecture],
        "model_type": architecture.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": metadata.require("feed_forward_length"),
        "num_hidden_layers": metadata.require("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.require("context_length"),
        "vocab_size": _vocab_size(metadata),
        "rope_theta": metadata.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata),
        "tie_word_embeddings": metadata.file_of("output.weight") is None,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "gguf"},
    }
    config |= _family_keys(metadata, architecture, config)
    check_metadata(files[0], config)
    return config | build_generation_config(files[0])


def _family_keys(metadata: _Metadata, architecture: GgufArchitecture, config: dict[str, Any]) -> dict[str, Any]:
    if architecture.model_type == "gpt_neox":
        return {
            "layer_norm_eps": metadata.require("attention.layer_norm_epsilon"),
            "use_parallel_residual": metadata.get("use_parallel_residual", True),
            "rotary_pct": metadata.get("rope.dimension_count", config["head_dim"]) / config["head_dim"],
            "rotary_emb_base": config["rope_theta"],
            "attention_bias": metadata.file_of("blk.0.attn_qkv.bias") is not None,
            "hidden_act": "gelu",
        }
    keys = {
        "rms_norm_eps": metadata.require("attention.layer_norm_rms_epsilon"),
        "hidden_act": "gelu_pytorch_tanh" if architecture.model_type.startswith("gemma") else "silu",
        "attention_bias": metadata.file_of("blk.0.attn_q.bias") is not None,
        "mlp_bias": metadata.file_of("blk.0.ffn_up.bias") is not None,
    }
    if architecture.model_type == "gemma2":
        # llama.cpp's rule: only the 27B model scales by the hidden size per head.
        is_27b = config["num_hidden_layers"] == _GEMMA2_27B_LAYERS
        keys |= {
            "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
            if is_27b
            else config["head_dim"],
            "attn_logit_softcapping": metadata.get("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": metadata.get("final_logit_softcapping", 30.0),
            "sliding_window": metadata.get("attention.sliding_window", 4096),
        }
    return keys


def _vocab_size(metadata: _Metadata) -> int:
    file = metadata.file_of("token_embd.weight")
    if file is None or len(file.tensors["token_embd.weight"].shape) != 2:
        raise CheckpointError(f"{metadata.path}: tensor token_embd.weight is missing.")
    return file.tensors["token_embd.weight"].shape[0]


def _rope_scaling(metadata: _Metadata) -> dict[str, Any] | None:
    """llama.cpp's rules: a factor without a type is linear, and an older file calls it `scale_linear`."""
    kind = metadata.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"{metadata.path}: rope scaling {kind!r} in GGUF is not supported.")
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0.0))
    if kind == "none" or factor == 0.0:
        factor = 1.0
    if kind == "yarn" and factor != 1.0:
        return _yarn(metadata, factor)
    if metadata.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"{metadata.path}: rope.scaling.attn_factor is supported with yarn alone.")
    if (file := metadata.file_of(_ROPE_DIVISORS)) is not None:
        return _worked_out(metadata.require("context_length"), [factor * each for each in _rope_divisors(file)])
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _yarn(metadata: _Metadata, factor: float) -> dict[str, Any]:
    if metadata.file_of(_ROPE_DIVISORS) is not None:
        raise UnsupportedModelError(f"{metadata.path}: tensor {_ROPE_DIVISORS} together with yarn is not supported.")
    original = metadata.get("rope.scaling.original_context_length", metadata.require("context_length"))
    parameters = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if (value := metadata.get(f"rope.scaling.yarn_{name}")) is not None:
            parameters[name] = value
    attn_factor = metadata.get("rope.scaling.attn_factor", 1.0)
    if attn_factor != 1.0 and factor > 1.0:
        parameters["attention_factor"] = attn_factor * (1.0 + 0.1 * math.log(factor))
    return parameters


def _worked_out(max_position: int, divisors: list[float]) -> dict[str, Any]:
    """What each frequency is divided by: as longrope has it, with one list for all lengths."""
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": max_position,
    }


def _rope_divisors(file: GgufFile) -> list[float]:
    """Read Llama 3's scaling, already worked out."""
    info = file.tensors[_ROPE_DIVISORS]
    if info.type_id != F32:
        raise CheckpointError(f"{file.path}: tensor {_ROPE_DIVISORS} is not of type F32.")
    tensor_bytes(file, info)
    return list(struct.unpack_from(f"<{info.num_elements}f", file.mapping, info.offset))


def build_generation_config(file: GgufFile) -> dict[str, Any]:
    """Build a generation config: the tokens that begin and end, and the sampling that the author recommends."""
    metadata = file.metadata
    end_keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ends = [metadata[f"tokenizer.ggml.{key}"] for key in end_keys if f"tokenizer.ggml.{key}" in metadata]
    named = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "temperature": metadata.get("general.sampling.temp"),
        "top_k": metadata.get("general.sampling.top_k"),
        "top_p": metadata.get("general.sampling.top_p"),
        "min_p": metadata.get("general.sampling.min_p"),
        "repetition_penalty": metadata.get("general.sampling.penalty_repeat"),
    }
    generation_config: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    if ends:
        generation_config["eos_token_id"] = sorted(set(ends)) if len(set(ends)) > 1 else ends[0]
    return generation_config

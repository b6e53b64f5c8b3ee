"""GGUF metadata in the shape of Hugging Face's config.json and generation_config.json. Pure: metadata in, dicts out."""

import struct
from typing import Any

from quire_server.shared.errors import CheckpointError, UnsupportedModelError
from quire_server.weights.gguf_names import GgufArchitecture
from quire_server.weights.gguf_reader import GgufFile

_GEMMA2_27B_LAYERS = 46


class _Metadata:
    """The keys of one architecture."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._prefix = file.metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        value = self._file.metadata.get(f"{self._prefix}.{key}", default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise UnsupportedModelError(f"{self._file.path}: {self._prefix}.{key} differs by layer: not supported.")
        return value[0]

    def require(self, key: str) -> Any:
        value = self.get(key)
        if not value:
            raise CheckpointError(f"{self._file.path}: metadata {self._prefix}.{key} is missing or zero.")
        return value


def build_config(file: GgufFile, architecture: GgufArchitecture) -> dict[str, Any]:
    """Build a config. Raises CheckpointError for a missing key, UnsupportedModelError for a mixture of experts."""
    metadata = _Metadata(file)
    if metadata.get("expert_count", 0):
        raise UnsupportedModelError(f"{file.path}: a mixture of experts in GGUF is not supported.")
    num_heads, hidden_size = metadata.require("attention.head_count"), metadata.require("embedding_length")
    config = {
        "architectures": [architecture.hf_architecture],
        "model_type": architecture.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": metadata.require("feed_forward_length"),
        "num_hidden_layers": metadata.require("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", num_heads),
        "head_dim": metadata.get("attention.key_length", hidden_size // num_heads),
        "max_position_embeddings": metadata.require("context_length"),
        "vocab_size": _vocab_size(file),
        "rope_theta": metadata.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, metadata),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "gguf"},
    }
    config |= _family_keys(file, metadata, architecture, config)
    return config | build_generation_config(file)


def _family_keys(
    file: GgufFile, metadata: _Metadata, architecture: GgufArchitecture, config: dict[str, Any]
) -> dict[str, Any]:
    if architecture.model_type == "gpt_neox":
        rotary_dim = metadata.get("rope.dimension_count", config["head_dim"])
        return {
            "layer_norm_eps": metadata.require("attention.layer_norm_epsilon"),
            "use_parallel_residual": metadata.get("use_parallel_residual", True),
            "rotary_pct": rotary_dim / config["head_dim"],
            "rotary_emb_base": config["rope_theta"],
            "attention_bias": "blk.0.attn_qkv.bias" in file.tensors,
            "hidden_act": "gelu",
        }
    keys = {
        "rms_norm_eps": metadata.require("attention.layer_norm_rms_epsilon"),
        "hidden_act": "gelu_pytorch_tanh" if architecture.model_type.startswith("gemma") else "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
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


def _vocab_size(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing.")
    return embedding.shape[0]


def _rope_scaling(file: GgufFile, metadata: _Metadata) -> dict[str, Any] | None:
    max_position = metadata.require("context_length")
    if "rope_freqs.weight" in file.tensors:
        # Llama 3's scaling, already worked out: what each frequency is divided by.
        info = file.tensors["rope_freqs.weight"]
        try:
            factors = list(struct.unpack_from(f"<{info.num_elements}f", file.mapping, info.offset))
        except struct.error as error:
            raise CheckpointError(f"{file.path}: tensor rope_freqs.weight is cut short.") from error
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": max_position,
        }
    kind = metadata.get("rope.scaling.type", "none")
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear"))
    if kind == "none" or factor in (None, 0.0, 1.0):
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"{file.path}: rope scaling {kind!r} in GGUF is not supported.")
    original = metadata.get("rope.scaling.original_context_length", int(max_position / factor))
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}


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
    }
    generation_config: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    if ends:
        generation_config["eos_token_id"] = sorted(set(ends)) if len(set(ends)) > 1 else ends[0]
    return generation_config

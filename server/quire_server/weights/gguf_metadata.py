"""What becomes of each metadata key that llama.cpp knows: read, harmless, or refused by name. A table, and its check.

Owns the judgement on keys; what the read ones mean is `gguf_config`'s, and `tokenizer.*` the tokenizer's. Keys are
without the architecture's prefix. Judge: `load_hparams` of llama.cpp's src/llama-model.cpp and of src/models/.
"""

from collections.abc import Mapping
from typing import Any

from quire_server.shared.errors import UnsupportedModelError
from quire_server.weights.gguf_reader import GgufFile

_READ = frozenset({
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "rope.freq_base", "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.type", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
})  # fmt: skip
_READ_OF_ONE = {
    "gptneox": frozenset({"attention.layer_norm_epsilon", "rope.dimension_count", "use_parallel_residual"}),
    "gemma2": frozenset({"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}),
}

_HARMLESS = frozenset({
    "attention.layer_norm_epsilon",  # of another kind of norm
    "attention.sliding_window",  # llama.cpp reads it of Gemma 2 alone
    "classifier.output_labels", "pooling_type",  # of embeddings
    "expert_feed_forward_length", "expert_gating_func", "expert_shared_count", "expert_used_count",
    "expert_weights_norm", "expert_weights_scale",  # without experts
    "rope.dimension_sections",  # the same for text
    "rope.scaling.finetuned", "tensor_data_layout", "vocab_size",
})  # fmt: skip
"""Says nothing of the arithmetic of an architecture that is served."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window_pattern": (2,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "swin_norm": (False,),
    "use_parallel_residual": (False,),
}
"""Refused with any other value than these, which mean what the architecture does anyway."""

_SAME_AS = {
    "attention.key_length_swa": "head_dim",
    "attention.value_length": "head_dim",
    "attention.value_length_swa": "head_dim",
    "embedding_length_out": "hidden_size",
    "rope.dimension_count": "head_dim",
    "rope.freq_base_swa": "rope_theta",
}
"""Refused unless the value is that of the config's field."""

_NAMESPACES = ("general.", "imatrix.", "quantize.", "split.", "tokenizer.")
"""Of no architecture, and none of the arithmetic."""


def check_metadata(file: GgufFile, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that are in no list here, in the file's order.

    Raises UnsupportedModelError naming a key that asks for what is not done.
    """
    prefix = f"{file.metadata['general.architecture']}."
    unknown = []
    for key, value in file.metadata.items():
        if key.startswith(prefix):
            if not _is_known(file, prefix, key.removeprefix(prefix), value, config):
                unknown.append(key)
        elif not key.startswith(_NAMESPACES):
            unknown.append(key)
    return tuple(unknown)


def _is_known(file: GgufFile, prefix: str, key: str, value: object, config: Mapping[str, Any]) -> bool:
    if key in _READ or key in _READ_OF_ONE.get(prefix.removesuffix("."), ()):
        return True
    wanted = (config[_SAME_AS[key]],) if key in _SAME_AS else _NEUTRAL.get(key)
    if wanted is None:
        return key in _HARMLESS
    values = value if isinstance(value, list) else [value]
    if not all(each in wanted for each in values):
        raise UnsupportedModelError(
            f"{file.path}: metadata {prefix}{key} is {value!r}, and the server runs this architecture only with "
            f"{' or '.join(map(repr, wanted))}.",
            hint="Choose another file, or another model.",
        )
    return True

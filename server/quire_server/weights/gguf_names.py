"""GGUF's architectures in Hugging Face's words: tensor names, row orders and value offsets. Pure data."""

from dataclasses import dataclass

from quire_server.shared.errors import UnsupportedModelError
from quire_server.weights.stored import RowOrder

_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_QWEN3 = _LLAMA | {
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
_GEMMA2 = _LLAMA | {
    "post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_GPT_NEOX = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "lm_head",
    "attn_norm": "gpt_neox.layers.{}.input_layernorm",
    "attn_qkv": "gpt_neox.layers.{}.attention.query_key_value",
    "attn_output": "gpt_neox.layers.{}.attention.dense",
    "ffn_norm": "gpt_neox.layers.{}.post_attention_layernorm",
    "ffn_up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "ffn_down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}
_TABLES = frozenset({"rope_freqs", "attn_rot_embd"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufArchitecture:
    """One value of `general.architecture`."""

    hf_architecture: str
    model_type: str
    modules: dict[str, str]
    """GGUF's module to Hugging Face's; {} is the layer."""
    interleaved: frozenset[str] = frozenset()
    """Modules whose rows llama.cpp's converter reordered for interleaved rotation."""
    stacked: frozenset[str] = frozenset()
    """Modules whose rows it reordered from [heads, 3, dim] to [3, heads, dim]."""
    norm_offset: float = 0.0

    def row_order(self, module: str, num_heads: int, num_kv_heads: int) -> RowOrder | None:
        if module in self.interleaved:
            return RowOrder("interleaved_rope", num_kv_heads if module == "attn_k" else num_heads)
        if module in self.stacked:
            return RowOrder("stacked_qkv", num_heads)
        return None


ARCHITECTURES = {
    "llama": GgufArchitecture(
        hf_architecture="LlamaForCausalLM",
        model_type="llama",
        modules=_LLAMA,
        interleaved=frozenset({"attn_q", "attn_k"}),
    ),
    "qwen2": GgufArchitecture(hf_architecture="Qwen2ForCausalLM", model_type="qwen2", modules=_LLAMA),
    "qwen3": GgufArchitecture(hf_architecture="Qwen3ForCausalLM", model_type="qwen3", modules=_QWEN3),
    "gemma": GgufArchitecture(hf_architecture="GemmaForCausalLM", model_type="gemma", modules=_LLAMA, norm_offset=-1.0),
    "gemma2": GgufArchitecture(
        hf_architecture="Gemma2ForCausalLM", model_type="gemma2", modules=_GEMMA2, norm_offset=-1.0
    ),
    "gptneox": GgufArchitecture(
        hf_architecture="GPTNeoXForCausalLM",
        model_type="gpt_neox",
        modules=_GPT_NEOX,
        stacked=frozenset({"attn_qkv"}),
    ),
}


def find_architecture(name: str, source: object) -> GgufArchitecture:
    """Raises UnsupportedModelError listing what is supported."""
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"{source}: GGUF architecture {name!r} is not supported ({known} are).")
    return ARCHITECTURES[name]


def is_table(name: str) -> bool:
    """Return whether a tensor is of rotary positions, which the config tells: no weight."""
    return name.removesuffix(".weight").rpartition(".")[2] in _TABLES


def hf_name(architecture: GgufArchitecture, name: str) -> tuple[str, str]:
    """Return Hugging Face's name for a GGUF tensor, and its module in GGUF's words.

    One that the architecture does not have keeps its name, so that it can be said that nothing reads it.
    """
    stem, _, suffix = name.rpartition(".")
    layer = ""
    if stem.startswith("blk."):
        layer, _, stem = stem.removeprefix("blk.").partition(".")
    module = architecture.modules.get(stem)
    if module is None or suffix not in ("weight", "bias") or ("{}" in module) != bool(layer):
        return name, ""
    return f"{module.format(layer)}.{suffix}", stem

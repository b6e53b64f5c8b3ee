"""Tiny GGUF files, written as llama.cpp's converter writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor


def permute(weights: Tensor, num_heads: int) -> Tensor:
    """convert_hf_to_gguf.py, LlamaModel.permute."""
    grouped = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return grouped.swapaxes(1, 2).reshape(weights.shape)


def convert(architecture: str, config: Any, name: str, tensor: Tensor) -> Tensor:
    """convert_hf_to_gguf.py, modify_tensors of each architecture."""
    if architecture == "llama" and ".q_proj." in name:
        return permute(tensor, config.num_attention_heads)
    if architecture == "llama" and ".k_proj." in name:
        return permute(tensor, config.num_key_value_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if ".query_key_value." in name:
        per_head = tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:])
        return torch.cat([per_head[:, part].reshape(-1, *tensor.shape[1:]) for part in range(3)])
    return tensor


def write_metadata(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture == "gptneox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_rope_dimension_count(int(head_dim * config.rope_parameters["partial_rotary_factor"]))
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if architecture == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture.startswith("gemma"):
        return
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def add_byte_vocabulary(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Add a SentencePiece vocabulary, without which llama.cpp runs nothing: special tokens, bytes, and words."""
    words = [f"▁{index}" for index in range(vocab_size - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(words)])


def write_gguf(
    path: Path,
    architecture: str,
    reference: Any,
    encoding: gguf.GGMLQuantizationType | None = None,
    plain: tuple[str, ...] = (),
    edit: Callable[[gguf.GGUFWriter, dict[str, Tensor]], None] = lambda writer, state: None,
) -> None:
    """Write a model; tensors whose names contain one of `plain` are not encoded. `edit` may add and take away."""
    config = reference.config
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, architecture, config)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    state = reference.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    if architecture == "llama" and config.rope_parameters["rope_type"] == "llama3":
        rotary = reference.model.rotary_emb
        exponents = torch.arange(0, rotary.inv_freq.numel()) / rotary.inv_freq.numel()
        unscaled = config.rope_parameters["rope_theta"] ** -exponents
        writer.add_tensor("rope_freqs.weight", (unscaled / rotary.inv_freq).float().numpy())
    edit(writer, state)
    for name, tensor in state.items():
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new_name is not None, name
        data = convert(architecture, config, name, tensor).numpy().astype(np.float32)
        if encoding is None or data.ndim == 1 or any(part in name for part in plain):
            writer.add_tensor(new_name, data)
        else:
            writer.add_tensor(new_name, gguf.quants.quantize(data, encoding), raw_dtype=encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

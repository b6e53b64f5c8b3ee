"""What a checkpoint stores overrules what its config says. The judge is `transformers`' model of the same weights.

Where the config alone is edited, the reference is the model whose weights were saved; of the tied head it is what
`transformers` makes of the edited directory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quire_contract.memory.fit import FitRequest, device_memory
from quire_server.models.footprint import shape_of_checkpoint
from quire_server.shared.errors import CheckpointError
from quire_server.weights.checkpoint import open_checkpoint

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
OPT = SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64}
HEAD_BYTES = 97 * 64 * 4


@pytest.fixture
def agree(harness: Callable[..., Any], prompt_of: Callable[[int], list[int]]) -> Callable[..., int]:
    """Check logits against a reference's, and what is foretold of memory against what is held; return that."""

    def check(tiny: Any, reference: Any = None) -> int:
        tiny.reference = tiny.reference if reference is None else reference
        model = tiny.load()
        prompt = prompt_of(20)
        torch.testing.assert_close(harness(model).prefill(prompt), tiny.reference_logits(prompt), atol=1e-4, rtol=1e-4)
        shape = shape_of_checkpoint(open_checkpoint(tiny.path))
        request = FitRequest(shape=shape, dtype="float32", memory_bytes=0, max_num_seqs=1, max_num_batched_tokens=8)
        assert device_memory(request).weights_bytes == model.num_parameter_bytes
        held: int = model.num_parameter_bytes
        return held

    return check


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma", "gpt_neox"])
def test_a_head_that_differs_is_used_though_the_config_ties_it(
    build_tiny_model: Callable[..., Any], agree: Callable[..., int], model_type: str
) -> None:
    tiny = build_tiny_model(model_type, **GROUPED | {"head_dim": 16, "tie_word_embeddings": False})
    tiny.edit_config(lambda config: config.update(tie_word_embeddings=True))
    agree(tiny, AutoModelForCausalLM.from_pretrained(tiny.path, attn_implementation="eager").eval())


def test_a_head_that_is_the_embedding_once_more_is_stored_once(
    build_tiny_model: Callable[..., Any], agree: Callable[..., int], rewrite_tensors: Callable[..., None]
) -> None:
    tiny = build_tiny_model("llama", **GROUPED | {"tie_word_embeddings": True})
    alone = agree(tiny)
    rewrite_tensors(tiny, lambda stored: stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()})
    assert agree(tiny) == alone


def test_without_a_head_the_embedding_is_one(build_tiny_model: Callable[..., Any], agree: Callable[..., int]) -> None:
    """As vLLM does; `transformers` would make one at random."""
    tiny = build_tiny_model("llama", **GROUPED | {"tie_word_embeddings": True})
    tied = agree(tiny)
    tiny.edit_config(lambda config: config.update(tie_word_embeddings=False))
    assert agree(tiny) == tied


BIASED = [
    pytest.param("llama", GROUPED | {"attention_bias": True, "mlp_bias": True}, id="llama"),
    pytest.param("qwen3", GROUPED | {"head_dim": 16, "attention_bias": True}, id="qwen3"),
    pytest.param("gemma", GROUPED | {"head_dim": 16, "attention_bias": True}, id="gemma"),
    pytest.param("gpt_neox", SIZES | {"attention_bias": True}, id="gpt_neox"),
    pytest.param("opt", OPT, id="opt"),
]
SILENT = {"attention_bias": False, "mlp_bias": False, "enable_bias": False}


@pytest.mark.parametrize(("model_type", "fields"), BIASED)
def test_biases_are_used_though_the_config_denies_them(
    build_tiny_model: Callable[..., Any], agree: Callable[..., int], model_type: str, fields: Mapping[str, Any]
) -> None:
    tiny = build_tiny_model(model_type, **fields)
    tiny.edit_config(lambda config: config.update(SILENT))
    agree(tiny)


def without(*endings: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda stored: {name: tensor for name, tensor in stored.items() if not name.endswith(endings)}


@pytest.mark.parametrize(
    ("model_type", "fields", "missing"),
    [
        pytest.param("qwen2", GROUPED, ("q_proj.bias", "k_proj.bias", "v_proj.bias"), id="qwen2-none"),
        pytest.param("qwen2", GROUPED, ("k_proj.bias",), id="qwen2-no-k"),
        pytest.param("llama", GROUPED | {"attention_bias": True}, ("o_proj.bias",), id="llama-no-o"),
        pytest.param("llama", GROUPED | {"mlp_bias": True}, ("gate_proj.bias", "down_proj.bias"), id="llama-up-alone"),
        pytest.param("gpt_neox", SIZES, ("attention.dense.bias", "h_to_4h.bias"), id="gpt_neox"),
        pytest.param("opt", OPT, ("fc2.bias", "out_proj.bias"), id="opt"),
    ],
)
def test_biases_that_no_layer_stores_are_none(
    build_tiny_model: Callable[..., Any],
    agree: Callable[..., int],
    rewrite_tensors: Callable[..., None],
    model_type: str,
    fields: Mapping[str, Any],
    missing: tuple[str, ...],
) -> None:
    """Of the reference they are zero, which is what `transformers` gives a bias that it does not find."""
    tiny = build_tiny_model(model_type, **fields)
    with torch.no_grad():
        for name, parameter in tiny.reference.named_parameters():
            if name.endswith(missing):
                parameter.zero_()
    rewrite_tensors(tiny, without(*missing))
    agree(tiny)


def test_a_bias_that_other_layers_store_is_missing(
    build_tiny_model: Callable[..., Any], rewrite_tensors: Callable[..., None]
) -> None:
    tiny = build_tiny_model("qwen2", **GROUPED)
    rewrite_tensors(tiny, without("layers.1.self_attn.k_proj.bias"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias is missing"):
        tiny.load()

"""What is said of a checkpoint that holds other things than its config speaks of: by name, and not without end."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quire_server.models.differences import find_differences
from quire_server.models.registry import plan_model
from quire_server.runner.executor import start_executor
from quire_server.runner.worker import Stopwatch
from quire_server.shared.config import EngineConfig, ModelConfig
from quire_server.weights.checkpoint import lookup_in, open_checkpoint

FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
UNREAD = "The checkpoint stores tensors that nothing reads: "
DENIED = "The checkpoint stores tensors that its config denies; they are used: "
PROMISED = "The config promises tensors that the checkpoint does not store; the model runs without: "


def differences_of(tiny: Any) -> list[str]:
    checkpoint = open_checkpoint(tiny.path)
    return list(find_differences(plan_model(checkpoint.config, lookup_in(checkpoint)), checkpoint))


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", FIELDS),
        ("llama", FIELDS | {"tie_word_embeddings": True, "attention_bias": True}),
        ("gpt_neox", FIELDS),
        ("opt", FIELDS | {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    ],
)
def test_a_checkpoint_as_transformers_saves_it_is_not_spoken_of(
    build_tiny_model: Callable[..., Any], model_type: str, fields: dict[str, Any]
) -> None:
    assert differences_of(build_tiny_model(model_type, **fields)) == []


def test_tables_masks_and_copies_are_harmless(
    build_tiny_model: Callable[..., Any], rewrite_tensors: Callable[..., None]
) -> None:
    def add(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return stored | {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "model.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
            "model.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "lm_head.weight": stored["model.embed_tokens.weight"].clone(),
        }

    tiny = build_tiny_model("llama", **FIELDS | {"tie_word_embeddings": True})
    rewrite_tensors(tiny, add)
    assert differences_of(tiny) == []


def test_what_nothing_reads_is_named_with_an_end(
    build_tiny_model: Callable[..., Any], rewrite_tensors: Callable[..., None]
) -> None:
    tiny = build_tiny_model("llama", **FIELDS)
    norms = {f"model.layers.{layer}.self_attn.q_norm.weight": torch.ones(16) for layer in range(2)}
    rewrite_tensors(tiny, lambda stored: stored | norms | {f"extra_{index}": torch.ones(1) for index in range(7)})
    assert differences_of(tiny) == [f"{UNREAD}extra_0, extra_1, extra_2, extra_3, extra_4, and 3 more"]


def test_where_config_and_checkpoint_disagree_is_named(
    build_tiny_model: Callable[..., Any], rewrite_tensors: Callable[..., None]
) -> None:
    tiny = build_tiny_model("qwen2", **FIELDS)
    rewrite_tensors(tiny, lambda stored: {name: stored[name] for name in stored if not name.endswith("k_proj.bias")})
    tiny.edit_config(lambda config: config.update(tie_word_embeddings=True))
    assert differences_of(tiny) == [
        f"{DENIED}lm_head.weight",
        f"{PROMISED}model.layers.*.self_attn.k_proj.bias (2 times)",
    ]


def test_a_starting_engine_says_it(
    build_tiny_model: Callable[..., Any],
    rewrite_tensors: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny = build_tiny_model("llama", **FIELDS)
    rewrite_tensors(tiny, lambda stored: stored | {"adapter": torch.ones(1)})
    model = ModelConfig(model="m", path=tiny.path, served_model_names=("m",), dtype="float32")
    with caplog.at_level(logging.WARNING):
        start_executor(EngineConfig(model=model, device="cpu"), on_progress=lambda _: None, stopwatch=Stopwatch({}))
    assert [record.message for record in caplog.records] == [f"{UNREAD}adapter"]

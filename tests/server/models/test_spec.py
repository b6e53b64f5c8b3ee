"""What a spec and a plan refuse to be, and how tensors are found under other names."""

import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire_server.models.families.llama import FAMILY, LLAMA_LAYER, LLAMA_WEIGHTS
from quire_server.models.planning.linear_method import QUANTIZATIONS, UnquantizedMethod
from quire_server.models.planning.parts import NormSpec, StoredLookup
from quire_server.models.planning.plan import build_plan
from quire_server.models.planning.spec import LayerNorms
from quire_server.models.registry import plan_model
from quire_server.shared.errors import UnsupportedModelError
from quire_server.weights.checkpoint import open_checkpoint
from quire_server.weights.stored import StoredTensor

NORM = NormSpec(kind="rms", eps=1e-6)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "vocab_size": 11,
}


def unquantized(name: str, stored: StoredLookup) -> UnquantizedMethod:
    return UnquantizedMethod()


def test_a_placement_has_its_norms_and_no_others() -> None:
    with pytest.raises(ValueError, match="'output' has norms for attention_output, feed_forward_output, not for atten"):
        LayerNorms(placement="output", attention=NORM, feed_forward=NORM)
    with pytest.raises(ValueError, match=r"'pre' has norms for attention, feed_forward, not for attention$"):
        LayerNorms(placement="pre", attention=NORM)
    assert LayerNorms.alike("parallel_shared", NORM) == LayerNorms(placement="parallel_shared", attention=NORM)


def test_a_tied_head_has_no_bias() -> None:
    spec = FAMILY.build_spec(CONFIG)
    with pytest.raises(ValueError, match="tied"):
        replace(spec, tie_word_embeddings=True, has_lm_head_bias=True)


def test_a_norm_with_weights_needs_a_name() -> None:
    weights = replace(LLAMA_WEIGHTS, layers=(replace(LLAMA_LAYER, feed_forward_norm=None),))
    with pytest.raises(ValueError, match="has no name in the weight map"):
        build_plan(FAMILY.build_spec(CONFIG), weights, unquantized)


def test_windows_and_rotations_are_the_layers() -> None:
    config = CONFIG | {"architectures": ["Gemma2ForCausalLM"], "num_key_value_heads": 1, "head_dim": 4}
    spec = plan_model(config).spec
    assert spec.num_layers == 2
    assert spec.sliding_windows == (4096, None)
    assert spec.ropes == (spec.layers[0].attention.rope,)
    assert [layer.attention.kv_shape.sliding_window for layer in spec.layers] == [4096, None]


def test_every_tensor_is_planned_once_and_placed() -> None:
    plan = plan_model(CONFIG)
    places = [placed.place for placed in plan.tensors()]
    names = [placed.tensor.name for placed in plan.tensors()]
    assert len(set(names)) == len(names) == 2 * 9 + 3
    assert places == ["first"] + [0] * 9 + [1] * 9 + ["last"] * 2
    tied = plan_model(CONFIG | {"tie_word_embeddings": True})
    assert [placed.tensor.name for placed in tied.tensors() if placed.place == "last"] == ["model.norm.weight"]
    assert next(tied.head().tensors()).name == "model.embed_tokens.weight"


def test_what_is_stored_is_found_under_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base model is saved without `model.`, and methods that look at what is stored see it all the same."""
    asked: list[str] = []
    seen: dict[str, StoredTensor | None] = {}
    name = "layers.1.self_attn.q_proj.weight"
    there = StoredTensor(
        name=name, file=Path("m"), shape=(8, 8), encoding="F32", mapping=mmap.mmap(-1, 256), offset=0, num_bytes=256
    )

    def stored(name: str) -> StoredTensor | None:
        asked.append(name)
        return there if name == there.name else None

    def method_for(module: str, lookup: StoredLookup) -> UnquantizedMethod:
        seen[module] = lookup(f"{module}.weight")
        return UnquantizedMethod()

    monkeypatch.setitem(QUANTIZATIONS, "toy", lambda quantization: method_for)
    plan_model(CONFIG | {"quantization_config": {"quant_method": "toy"}}, stored)
    assert "model.layers.1.self_attn.q_proj.weight" in asked
    assert "layers.1.self_attn.q_proj.weight" in asked
    assert {module for module, tensor in seen.items() if tensor is not None} == {"model.layers.1.self_attn.q_proj"}
    assert seen["model.layers.1.self_attn.q_proj"] is there


def test_an_rms_norm_with_a_bias_is_refused(build_tiny_model: Callable[..., Any]) -> None:
    """A spec can say it; no kernel has it."""
    norm = NormSpec(kind="rms", eps=1e-6, has_weight=False, has_bias=True)
    tiny = build_tiny_model(
        "gpt_neox", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    whole = plan_model(open_checkpoint(tiny.path).config)
    with pytest.raises(UnsupportedModelError, match="final_layer_norm: an RMS norm with a bias"):
        tiny.load_as(replace(whole.spec, final_norm=norm), whole.weights)

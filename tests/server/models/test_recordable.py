"""Decode steps of every placement of norms can be recorded: replayed, they give the same logits, bit for bit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire_kernels._cpu import native
from quire_kernels._cpu.variants import library_path
from quire_kernels.recording import Workspace, record
from quire_server.models.attention import AttentionMetadata
from quire_server.models.families.llama import LLAMA_WEIGHTS
from quire_server.models.kinds.attention import AttentionSpec
from quire_server.models.planning.spec import LayerNorms, LayerSpec
from quire_server.models.registry import plan_model
from quire_server.weights.checkpoint import open_checkpoint

BACKENDS = [isa for isa in native.supported_isas() if library_path(isa).exists()]
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
LLAMA = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
FAMILIES = [
    pytest.param("llama", LLAMA, id="llama"),
    pytest.param("qwen3", LLAMA | {"head_dim": 32}, id="qwen3"),
    pytest.param("gemma2", LLAMA | {"head_dim": 16, "sliding_window": 8}, id="gemma2"),
    pytest.param("gpt_neox", SIZES | {"intermediate_size": 96}, id="gpt_neox"),
    pytest.param("opt", SIZES | {"ffn_dim": 96}, id="opt"),
    pytest.param(
        "opt", SIZES | {"ffn_dim": 96, "do_layer_norm_before": False, "word_embed_proj_dim": 32}, id="opt-350m"
    ),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_isa(request.param):
        yield request.param


def replay_equals_eager(runner: Any) -> None:
    """Decode one token of two sequences, eagerly and from a recording, from the same cache."""
    model, caches = runner.model, runner.kv_caches
    with torch.inference_mode():
        for cache in caches:
            cache.key.zero_()
            cache.value.zero_()
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32),
            seq_lens=torch.tensor([4, 2], dtype=torch.int32),
            block_table=torch.tensor([[1], [2]], dtype=torch.int32),
            slot_mapping=torch.tensor([7, 9]),
            max_seq_len=4,
        )
        ids, positions = torch.tensor([3, 4]), torch.tensor([3, 1])

        def compute() -> Tensor:
            return model.compute_logits(model.forward(ids, positions, metadata, caches))

        model.reserve_positions(4)
        recording = record(compute, Workspace())
        ids.copy_(torch.tensor([50, 60]))
        replayed = recording.replay().clone()
        assert torch.equal(replayed, compute())
        ids.copy_(torch.tensor([3, 4]))
        assert not torch.equal(replayed, compute())


@pytest.mark.parametrize(("model_type", "fields"), FAMILIES)
def test_families(
    backend: str,
    model_type: str,
    fields: dict[str, Any],
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
) -> None:
    replay_equals_eager(harness(build_tiny_model(model_type, **fields).load(dtype=torch.bfloat16)))


def test_what_no_family_has_yet(
    backend: str, build_tiny_model: Callable[..., Any], harness: Callable[..., Any]
) -> None:
    """Output norms, a shared norm, norms over all heads, a layer without positions, and scaled logits."""
    tiny = build_tiny_model("llama", **LLAMA)
    whole = plan_model(open_checkpoint(tiny.path).config).spec
    norm = whole.final_norm
    assert norm is not None
    weightless = replace(norm, has_weight=False)

    def change(index: int, layer: LayerSpec) -> LayerSpec:
        attention = layer.attention
        assert isinstance(attention, AttentionSpec)
        attention = replace(
            attention, qk_norm=weightless, qk_norm_scope="projection", rope=None if index else attention.rope
        )
        placement = ("output", "parallel_shared", "post")[index]
        return replace(layer, attention=attention, norms=LayerNorms.alike(placement, weightless))

    spec = replace(whole.map_layers(change), logit_scale=0.5)
    replay_equals_eager(harness(tiny.load_as(spec, LLAMA_WEIGHTS, dtype=torch.bfloat16)))

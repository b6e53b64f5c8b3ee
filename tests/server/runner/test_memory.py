"""The arithmetic of the KV cache."""

import dataclasses
from pathlib import Path

import pytest

from quire_server.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from quire_server.errors import ConfigError, OutOfMemoryError
from quire_server.models.kinds.attention import AttentionSpec
from quire_server.models.kinds.mlp import MlpSpec
from quire_server.models.parts import NormSpec
from quire_server.models.spec import DecoderSpec, LayerNorms, LayerSpec
from quire_server.runner.memory import KVCachePlan, kv_bytes_per_token, log_plan, plan_kv_cache, workspace_bytes

GIB = 1 << 30

NORM = NormSpec(kind="rms", eps=1e-5)
LAYER = LayerSpec(
    attention=AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=32, scale=1.0),
    feed_forward=MlpSpec(intermediate_size=512, activation="silu", is_gated=True),
    norms=LayerNorms.alike("pre", NORM),
)
SPEC = DecoderSpec(
    architecture="LlamaForCausalLM",
    layers=(LAYER,) * 4,
    hidden_size=256,
    vocab_size=1000,
    max_position_embeddings=4096,
    final_norm=NORM,
    embedding_size=256,
)
BYTES_PER_TOKEN = 2 * 4 * 2 * 32 * 2  # key and value, layers, heads, head_dim, bfloat16


def plan(
    available_bytes: int = 8 * GIB,
    *,
    weights_bytes: int = 100 << 20,
    max_model_len: int | None = None,
    cache: CacheConfig | None = None,
    max_num_seqs: int = 8,
    is_cpu: bool = True,
) -> KVCachePlan:
    config = EngineConfig(
        model=ModelConfig(model="m", path=Path("m"), served_model_names=("m",), max_model_len=max_model_len),
        cache=cache or CacheConfig(),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=512),
    )
    return plan_kv_cache(
        SPEC, config, available_bytes=available_bytes, weights_bytes=weights_bytes, itemsize=2, is_cpu=is_cpu
    )


WORKSPACE = workspace_bytes(SPEC, max_num_batched_tokens=512, max_num_seqs=8, itemsize=2)


def test_bytes_per_token() -> None:
    assert kv_bytes_per_token(SPEC, 2) == BYTES_PER_TOKEN


def test_a_cpu_takes_no_more_than_its_sequences_can_need() -> None:
    made = plan()
    assert made.max_model_len == 4096
    assert made.num_blocks == 8 * 4096 // 16 + 1
    assert made.num_tokens == 8 * 4096
    assert made.budget.free > 0


def test_a_gpu_takes_all() -> None:
    made = plan(is_cpu=False)
    room = int(8 * GIB * 0.9) - (100 << 20) - WORKSPACE
    assert made.num_blocks == room // (16 * BYTES_PER_TOKEN)
    assert 0 <= made.budget.free < 16 * BYTES_PER_TOKEN


def test_the_budget_adds_up() -> None:
    made = plan(is_cpu=False, cache=CacheConfig(gpu_memory_utilization=0.5, block_size=32))
    budget = made.budget
    assert budget.usable == 4 * GIB
    assert budget.weights == 100 << 20
    assert budget.kv_cache == made.num_blocks * made.bytes_per_block == made.num_blocks * 32 * BYTES_PER_TOKEN
    assert budget.weights + budget.workspace + budget.kv_cache + budget.free == budget.usable
    assert [line.split()[0] for line in budget.as_table().splitlines()] == [
        "usable",
        "weights",
        "workspace",
        "kv_cache",
        "free",
    ]


def test_an_open_context_length_is_lowered_to_what_fits(caplog: pytest.LogCaptureFixture) -> None:
    kv_bytes = 65 * 16 * BYTES_PER_TOKEN
    made = plan(int((WORKSPACE + (100 << 20) + kv_bytes) / 0.9) + 2)
    assert made.num_blocks == 65
    assert made.max_model_len == 64 * 16
    assert "Lowered max_model_len from 4096 to 1024" in caplog.text


def test_a_demanded_context_length_is_never_lowered() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        plan(max_model_len=2048, cache=CacheConfig(kv_cache_memory_bytes=65 * 16 * BYTES_PER_TOKEN))
    termination = caught.value.termination
    assert termination.code == "OutOfMemory"
    assert termination.need_bytes == 129 * 16 * BYTES_PER_TOKEN
    assert termination.have_bytes == 65 * 16 * BYTES_PER_TOKEN
    assert "at most 1024" in termination.hint


def test_what_the_hint_says_works() -> None:
    made = plan(max_model_len=1024, cache=CacheConfig(kv_cache_memory_bytes=65 * 16 * BYTES_PER_TOKEN))
    assert made.max_model_len == 1024


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        plan(1 * GIB, weights_bytes=1 * GIB)
    termination = caught.value.termination
    assert termination.have_bytes == int(0.9 * GIB)
    assert termination.need_bytes is not None
    assert termination.need_bytes > 1 * GIB


def test_a_context_length_beyond_the_models_positions() -> None:
    with pytest.raises(ConfigError, match="4096"):
        plan(max_model_len=4097)


def test_kv_cache_memory_bytes_goes_before_utilization() -> None:
    made = plan(cache=CacheConfig(kv_cache_memory_bytes=1000 * 16 * BYTES_PER_TOKEN))
    assert made.num_blocks == 1000


def test_num_gpu_blocks_override_goes_before_all() -> None:
    made = plan(cache=CacheConfig(num_gpu_blocks_override=5, kv_cache_memory_bytes=GIB))
    assert made.num_blocks == 5
    assert made.max_model_len == 64


def test_workspace_grows_with_the_step_and_with_the_vocabulary() -> None:
    larger_vocab = dataclasses.replace(SPEC, vocab_size=100_000)
    more = workspace_bytes(SPEC, max_num_batched_tokens=1024, max_num_seqs=8, itemsize=2)
    assert more > WORKSPACE
    assert workspace_bytes(larger_vocab, max_num_batched_tokens=512, max_num_seqs=8, itemsize=2) > WORKSPACE


def test_the_plan_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log_plan(plan())
    assert "2048 blocks of 16 tokens = 32768 tokens, 8.0 sequences of max_model_len=4096" in caplog.text

"""The arithmetic of the KV cache."""

from pathlib import Path

import pytest

from quire_contract.memory.model_shape import ModelShape
from quire_server.models.footprint import shape_of_config
from quire_server.runner.kv_cache_plan import KVCachePlan, agree_on_kv_cache, log_plan, plan_kv_cache
from quire_server.shared.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from quire_server.shared.errors import ConfigError, OutOfMemoryError

GIB = 1 << 30


def shape_of(**fields: object) -> ModelShape:
    return shape_of_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 4,
            "hidden_size": 256,
            "vocab_size": 1000,
            "max_position_embeddings": 4096,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 512,
            "tie_word_embeddings": True,
            **fields,
        }
    )


LAYER = 2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 512
WEIGHTS = 2 * (4 * LAYER + 1000 * 256) + 4 * (4 * 2 + 1) * 256  # norms are float32
BYTES_PER_TOKEN = 2 * 4 * 2 * 32 * 2  # key and value, layers, heads, head_dim, bfloat16


def plan(
    available_bytes: int = 8 * GIB,
    *,
    max_model_len: int | None = None,
    cache: CacheConfig | None = None,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 512,
    is_cpu: bool = True,
    **fields: object,
) -> KVCachePlan:
    config = EngineConfig(
        model=ModelConfig(model="m", path=Path("m"), served_model_names=("m",), max_model_len=max_model_len),
        cache=cache or CacheConfig(),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
    )
    return plan_kv_cache(shape_of(**fields), config, available_bytes=available_bytes, dtype="bfloat16", is_cpu=is_cpu)


# 4 × hidden, and the MLP (3 × 512) is wider than two of query, key and value (2 × 384); three copies of logits.
WORKSPACE = 512 * (4 * 256 + 3 * 512) * 2 + 512 * 1000 * 4 * 3


def test_fixed_bytes() -> None:
    made = plan()
    assert made.spec.bytes_per_block(16) == 16 * BYTES_PER_TOKEN
    assert (made.budget.weights, made.budget.workspace) == (WEIGHTS, WORKSPACE)


@pytest.mark.parametrize(("window", "expected"), [(64, 64), (None, None)])
def test_blocks_go_behind_a_window_of_all_layers(window: int | None, expected: int | None) -> None:
    assert plan(architectures=["MistralForCausalLM"], sliding_window=window).whole.uniform_window == expected
    assert plan(architectures=["Gemma2ForCausalLM"], sliding_window=window).whole.uniform_window is None


def test_a_cpu_takes_no_more_than_its_sequences_can_need() -> None:
    made = plan()
    assert made.max_model_len == 4096
    assert made.num_blocks == 8 * 4096 // 16 + 1
    assert made.num_tokens == 8 * 4096
    assert made.budget.free > 0


def test_a_gpu_takes_all() -> None:
    made = plan(is_cpu=False)
    room = int(8 * GIB * 0.9) - WEIGHTS - WORKSPACE
    assert made.num_blocks == room // (16 * BYTES_PER_TOKEN)
    assert 0 <= made.budget.free < 16 * BYTES_PER_TOKEN


def test_the_budget_adds_up() -> None:
    made = plan(is_cpu=False, cache=CacheConfig(gpu_memory_utilization=0.5, block_size=32))
    budget = made.budget
    assert budget.usable == 4 * GIB
    assert budget.weights == WEIGHTS
    assert budget.kv_cache == made.num_blocks * 32 * BYTES_PER_TOKEN
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
    made = plan(int((WORKSPACE + WEIGHTS + kv_bytes) / 0.9) + 2)
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
        plan(WEIGHTS)
    termination = caught.value.termination
    assert termination.have_bytes == int(0.9 * WEIGHTS)
    assert termination.need_bytes == WEIGHTS + WORKSPACE + 2 * 16 * BYTES_PER_TOKEN


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
    assert plan(max_num_batched_tokens=1024).budget.workspace > WORKSPACE
    assert plan(vocab_size=100_000).budget.workspace > WORKSPACE


def test_the_plan_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log_plan(plan())
    assert "2048 blocks of 16 tokens = 32768 tokens, 8.0 sequences of max_model_len=4096" in caplog.text


def test_workers_agree_on_what_the_smallest_can_hold() -> None:
    """Of five layers the first of two stages has three, so that its blocks are larger and fewer."""
    block_bytes = 16 * (BYTES_PER_TOKEN // 4)  # of one layer
    config = EngineConfig(
        model=ModelConfig(model="m", path=Path("m"), served_model_names=("m",)),
        cache=CacheConfig(kv_cache_memory_bytes=1 << 20),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512),
        parallel=ParallelConfig(pipeline_parallel_size=2),
    )
    plans = [
        plan_kv_cache(
            shape_of(num_hidden_layers=5), config, available_bytes=GIB, dtype="bfloat16", is_cpu=False, stage=stage
        )
        for stage in range(2)
    ]
    own = [(1 << 20) // (num_layers * block_bytes) for num_layers in (3, 2)]
    assert [made.num_blocks for made in plans] == own
    assert [made.max_model_len for made in plans] == [(num_blocks - 1) * 16 for num_blocks in own]
    agreed = agree_on_kv_cache(plans)
    assert [(made.num_blocks, made.max_model_len) for made in agreed] == [(own[0], (own[0] - 1) * 16)] * 2
    assert [made.budget.kv_cache for made in agreed] == [own[0] * num_layers * block_bytes for num_layers in (3, 2)]
    assert agreed[0] == plans[0]
    assert agree_on_kv_cache(plans[1:]) == (plans[1],)

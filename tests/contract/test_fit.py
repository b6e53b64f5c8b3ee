"""The memory-fit arithmetic, by hand on a small model, and by its own laws on any."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_contract.memory.dtypes import dtype_bytes
from quire_contract.memory.fit import FitError, FitRequest, ModelShape, check_fit, device_memory, stage_layers
from quire_contract.memory.model_shape import LayerShares, WeightShare
from quire_server.models.footprint import shape_of_config

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
MIB = 1 << 20
# A layer: query and output 64 × 64 each, key and value 64 × 32 each, three of 64 × 128 in the MLP; two norms.
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
NORMS = 2 * 64
TABLE = 100 * 64


def _shape(config: dict[str, Any] | None = None, checkpoint_dtype: str | None = "bfloat16") -> ModelShape:
    return replace(shape_of_config({**TINY, **(config or {})}), checkpoint_dtype=checkpoint_dtype)


def _request(config: dict[str, Any] | None = None, **changes: Any) -> FitRequest:
    given_fields = {"memory_bytes": 1000 * MIB, "max_num_seqs": 8, "max_num_batched_tokens": 128, **changes}
    return FitRequest(**{"shape": _shape(config), **given_fields})


def _weights_bytes(request: FitRequest) -> int:
    return check_fit(request).weights_bytes


def _kv_bytes_per_token(request: FitRequest) -> int:
    return check_fit(request).kv_bytes_per_token


def test_a_small_model_by_hand() -> None:
    request = _request(gpu_memory_utilization=1.0)
    assert request.shape.num_parameters == 2 * (LAYER + NORMS) + TABLE + 64
    report = check_fit(request)
    assert report.weights_bytes == 2 * (2 * LAYER + TABLE) + 4 * (2 * NORMS + 64)  # norms are float32
    assert report.kv_bytes_per_token == 2 * (2 * 2 * 16) * 2
    # 4 × hidden, and the MLP (3 × 128) is wider than two of query, key and value (2 × 128); logits for 128 rows.
    assert report.workspace_bytes == 128 * (4 * 64 + 3 * 128) * 2 + 128 * 100 * 4 * 3
    left = 1000 * MIB - report.weights_bytes - report.workspace_bytes
    assert report.kv_capacity_tokens == (left // (256 * 16) - 1) * 16
    assert report.need_bytes == report.weights_bytes + report.workspace_bytes + (256 + 16) * 256
    assert (report.fits, report.max_concurrent_sequences, report.max_model_len) == (True, 8, 256)


def test_exactly_enough_is_enough_and_a_byte_less_is_not() -> None:
    need = check_fit(_request()).need_bytes
    enough = check_fit(_request(memory_bytes=need, gpu_memory_utilization=1.0))
    assert (enough.fits, enough.max_concurrent_sequences, enough.max_model_len) == (True, 1, 256)
    short = check_fit(_request(memory_bytes=need - 1, gpu_memory_utilization=1.0))
    assert (short.fits, short.max_concurrent_sequences, short.max_model_len) == (False, 0, 240)


def test_what_would_fit_fits() -> None:
    short = check_fit(_request(memory_bytes=550_000))
    assert 0 < short.max_model_len < 256
    assert not short.fits
    assert check_fit(_request(memory_bytes=550_000, max_model_len=short.max_model_len)).fits


def test_weights_that_do_not_fit_leave_nothing() -> None:
    report = check_fit(_request(memory_bytes=1000))
    assert (report.fits, report.kv_capacity_tokens, report.max_model_len) == (False, 0, 0)
    assert report.need_bytes > report.have_bytes == 900


@pytest.mark.parametrize(
    ("checkpoint", "dtype", "kv_cache_dtype", "weight", "kv"),
    [
        ("bfloat16", "auto", "auto", 2, 2),
        ("float32", "auto", "auto", 4, 4),
        ("float32", "bfloat16", "auto", 2, 2),
        ("float8_e4m3fn", "auto", "auto", 2, 2),
        (None, "auto", "auto", 2, 2),
        ("bfloat16", "float32", "fp8", 4, 1),
        ("bfloat16", "auto", "float16", 2, 2),
    ],
)
def test_dtypes(checkpoint: str | None, dtype: str, kv_cache_dtype: str, weight: int, kv: int) -> None:
    request = _request(shape=_shape(None, checkpoint), dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    assert _weights_bytes(request) == weight * (2 * LAYER + TABLE) + 4 * (2 * NORMS + 64)
    assert _kv_bytes_per_token(request) == 128 * kv


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(FitError, match="dtype 'int3' is not known; known are"):
        dtype_bytes("int3")
    with pytest.raises(FitError, match="dtype 'int3' is not known; known are"):
        check_fit(_request(kv_cache_dtype="int3"))


class TestSlidingWindows:
    def test_layers_are_grouped_by_what_they_see(self) -> None:
        config = {"architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 5, "sliding_window": 32}
        request = _request(config)
        groups = {group.layers: (group.kind, group.window) for group in request.shape.kv_groups}
        assert groups == {(0, 2, 4): ("window", 32), (1, 3): ("full", None)}
        assert request.kv_cache.uniform_window is None

    def test_a_window_of_all_layers_bounds_what_a_sequence_holds(self) -> None:
        config = {"architectures": ["MistralForCausalLM"], "sliding_window": 32}
        changes = {"max_num_seqs": 1000, "max_num_batched_tokens": 16, "memory_bytes": 2 * MIB}
        windowed, full = (check_fit(_request({**config, **c}, **changes)) for c in ({}, {"sliding_window": None}))
        assert windowed.kv_capacity_tokens == full.kv_capacity_tokens
        num_blocks = full.kv_capacity_tokens // 16
        assert full.max_concurrent_sequences == num_blocks // 16
        assert windowed.max_concurrent_sequences == num_blocks // 4  # 31 + 16 tokens are three blocks, or four

    @pytest.mark.parametrize(
        ("config", "windows"),
        [
            ({"architectures": ["Qwen2ForCausalLM"]}, [(4, None)]),
            (
                {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 1},
                [(1, None), (3, 4096)],
            ),
            (
                {
                    "architectures": ["Qwen2ForCausalLM"],
                    "use_sliding_window": True,
                    "sliding_window": 8,
                    "layer_types": ["sliding_attention", "full_attention"] * 2,
                },
                [(2, None), (2, 8)],
            ),
            ({"architectures": ["MistralForCausalLM"]}, [(4, 4096)]),
            ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, [(4, None)]),
            ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["sliding_attention"] * 4}, [(4, 4096)]),
        ],
    )
    def test_each_family_says_it_its_own_way(
        self, config: dict[str, Any], windows: list[tuple[int, int | None]]
    ) -> None:
        groups = _shape({"num_hidden_layers": 4, **config}).kv_groups
        assert sorted(((len(group.layers), group.window) for group in groups), key=str) == sorted(windows, key=str)


class TestParallel:
    def test_devices_share_what_can_be_split(self) -> None:
        one, two = _request(), _request(tensor_parallel_size=2)
        assert _weights_bytes(two) == 2 * (2 * LAYER + TABLE) // 2 + 4 * (2 * NORMS + 64)
        assert _kv_bytes_per_token(two) == _kv_bytes_per_token(one) // 2

    def test_more_devices_than_heads_copy_them(self) -> None:
        four = _request(tensor_parallel_size=4)
        assert _kv_bytes_per_token(four) == _kv_bytes_per_token(_request()) // 2
        layer = 2 * 64 * 16 + 2 * 64 * 16 + 3 * 64 * 32  # one head of query, and a whole one of key and value
        assert _weights_bytes(four) == 2 * (2 * layer + TABLE // 4) + 4 * (2 * NORMS + 64)

    def test_stages_share_the_layers_and_both_ends_hold_the_table(self) -> None:
        one, two = _request(), _request(pipeline_parallel_size=2)
        first, last = (device_memory(two, stage).weights_bytes for stage in range(2))
        assert first == 2 * (LAYER + TABLE) + 4 * NORMS
        assert last == 2 * (LAYER + TABLE) + 4 * (NORMS + 64)
        assert _weights_bytes(two) == last
        assert _kv_bytes_per_token(two) == _kv_bytes_per_token(one) // 2

    def test_an_output_matrix_of_its_own_is_on_the_last_stage_alone(self) -> None:
        two = _request({"tie_word_embeddings": False}, pipeline_parallel_size=2)
        first, last = (device_memory(two, stage).weights_bytes for stage in range(2))
        assert last - first == 4 * 64
        alone = _request({"tie_word_embeddings": False})
        assert _weights_bytes(alone) == first + last

    def test_the_fullest_stage_counts_where_layers_do_not_divide(self) -> None:
        three = _request({"num_hidden_layers": 3}, pipeline_parallel_size=2)
        assert _kv_bytes_per_token(three) == 2 * 64 * 2

    def test_layers_that_differ_count_where_they_are(self) -> None:
        """Dense layers first, then wider ones, as DeepSeek has them."""
        shape = _shape({"num_hidden_layers": 4})
        (dense,) = shape.layer_weights
        wide = (WeightShare(num_elements=10**6), WeightShare(num_bytes=10**5))
        kinds = (LayerShares(layers=(0,), shares=dense.shares), LayerShares(layers=(1, 2, 3), shares=wide))
        shape = replace(shape, layer_weights=kinds)
        request = _request(shape=shape, pipeline_parallel_size=2)
        assert device_memory(request, 1).weights_bytes == 2 * 2 * 10**6 + 2 * 10**5 + 2 * TABLE + 4 * 64
        assert device_memory(request, 0).weights_bytes == 2 * (10**6 + LAYER + TABLE) + 10**5 + 4 * NORMS

    @given(st.integers(1, 200), st.integers(1, 20))
    def test_every_layer_is_on_one_stage(self, num_layers: int, num_stages: int) -> None:
        stages = stage_layers(num_layers, num_stages)
        assert [layer for stage in stages for layer in stage] == list(range(num_layers))
        assert len(stages) == num_stages
        assert max(map(len, stages)) - min(map(len, stages)) <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, not 0"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"pipeline_parallel_size": 3}, "pipeline_parallel_size 3 is more than the model's 2 layers"),
        ({"max_model_len": 0}, "max_model_len must be at least 1"),
        ({"max_model_len": 257}, "max_model_len 257 is more than the model's 256 positions"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        _request(**change)


ARCHITECTURES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "OPT", "GPTNeoX"]
SHAPES: st.SearchStrategy[ModelShape] = st.builds(
    lambda family, layers, heads, kv, window: _shape(
        {
            "architectures": [f"{family}ForCausalLM"],
            "num_hidden_layers": layers,
            "hidden_size": 16 * heads * kv,
            "num_attention_heads": heads * kv,
            "num_key_value_heads": kv,
            "sliding_window": window,
            "ffn_dim": 96,
            "intermediate_size": 96,
            "vocab_size": 120,
        }
    ),
    st.sampled_from(ARCHITECTURES),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([None, 8, 64]),
)


@given(SHAPES, st.integers(0, 8 * MIB), st.integers(1, 256), st.integers(1, 4), st.integers(1, 3))
def test_laws_of_any_model(shape: ModelShape, memory: int, length: int, tp: int, pp: int) -> None:
    request = FitRequest(
        shape=shape,
        memory_bytes=memory,
        max_model_len=length,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        tensor_parallel_size=tp,
        pipeline_parallel_size=min(pp, shape.num_layers),
    )
    try:
        shape.check_divides(tp)
    except FitError:
        with pytest.raises(FitError, match=f"{tp} devices cannot share"):
            check_fit(request)
        request = replace(request, tensor_parallel_size=1)
    report = check_fit(request)
    assert report.fits == (report.need_bytes <= report.have_bytes) == (length <= report.kv_capacity_tokens)
    assert report.fits == (report.max_concurrent_sequences >= 1)
    assert report.fits == (length <= report.max_model_len)
    if report.max_model_len:
        assert check_fit(replace(request, max_model_len=report.max_model_len)).fits
    more = check_fit(replace(request, memory_bytes=memory + MIB))
    assert more.kv_capacity_tokens >= report.kv_capacity_tokens
    alone = check_fit(replace(request, tensor_parallel_size=1, pipeline_parallel_size=1))
    assert report.weights_bytes <= alone.weights_bytes
    assert report.kv_bytes_per_token <= alone.kv_bytes_per_token


@pytest.mark.parametrize(
    ("devices", "is_possible"),
    [(1, True), (2, True), (4, True), (8, True), (3, False), (5, False), (16, False), (32, False)],
)
def test_weights_that_devices_cannot_share_are_refused(devices: int, is_possible: bool) -> None:
    """8 heads, 512 and 1,024 rows; 2 KV heads, of which more devices hold copies."""
    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1024}
    request = _request(config, tensor_parallel_size=devices)
    if is_possible:
        assert check_fit(request).fits
    else:
        with pytest.raises(FitError, match=rf"(8|512|1024) equal pieces .* {devices} devices cannot share"):
            check_fit(request)


def test_a_single_kv_head_is_copied_and_a_single_head_is_not() -> None:
    multi_query = {"num_attention_heads": 4, "num_key_value_heads": 1}
    assert check_fit(_request(multi_query, tensor_parallel_size=4)).fits
    with pytest.raises(FitError, match="1 equal pieces"):
        check_fit(_request({"num_attention_heads": 1, "num_key_value_heads": 1}, tensor_parallel_size=2))

"""The memory-fit arithmetic, by hand on a small model, and by its own laws on any."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_contract.fit import (
    FitError,
    FitRequest,
    ModelShape,
    check_fit,
    dtype_bytes,
    kv_bytes_per_token,
    shape_from_gguf,
    shape_from_hf_config,
    weights_bytes,
    workspace_bytes,
)

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
MIB = 1 << 20


def _request(config: dict[str, Any] | None = None, **changes: Any) -> FitRequest:
    shape = shape_from_hf_config({**TINY, **(config or {})})
    given_fields = {"memory_bytes": 1000 * MIB, "max_num_seqs": 8, "max_num_batched_tokens": 128, **changes}
    return FitRequest(shape=shape, **given_fields)


def test_a_small_model_by_hand() -> None:
    request = _request(gpu_memory_utilization=1.0)
    # A layer: query and output 64 × 64 each, key and value 64 × 32 each, three of 64 × 128 in the MLP, two norms.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert request.shape.num_parameters == 2 * layer + 100 * 64 + 64
    assert weights_bytes(request) == 2 * request.shape.num_parameters
    assert kv_bytes_per_token(request) == 2 * (2 * 2 * 16) * 2
    # 4 × hidden, and the MLP (3 × 128) is wider than two of query, key and value (2 × 128); logits for 128 rows.
    assert workspace_bytes(request) == 128 * (4 * 64 + 3 * 128) * 2 + 128 * 100 * 4 * 3
    report = check_fit(request)
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
    request = _request({"torch_dtype": checkpoint}, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    assert weights_bytes(request) == weight * request.shape.num_parameters
    assert kv_bytes_per_token(request) == 128 * kv


def test_dtype_of_newer_configs_is_read() -> None:
    assert shape_from_hf_config({**TINY, "torch_dtype": None, "dtype": "float32"}).checkpoint_dtype == "float32"
    assert shape_from_hf_config({**TINY, "torch_dtype": "torch.float16"}).checkpoint_dtype == "float16"


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(FitError, match="dtype 'int3' is not known; known are"):
        dtype_bytes("int3")


class TestSlidingWindows:
    def test_layers_are_grouped_by_what_they_see(self) -> None:
        shape = shape_from_hf_config({**TINY, "model_type": "gemma2", "num_hidden_layers": 5, "sliding_window": 32})
        assert [(layers.num_layers, layers.sliding_window) for layers in shape.kv_layers] == [(2, None), (3, 32)]
        assert shape.uniform_sliding_window is None

    def test_a_window_of_all_layers_bounds_what_a_sequence_holds(self) -> None:
        config = {"model_type": "mistral", "sliding_window": 32}
        changes = {"max_num_seqs": 1000, "max_num_batched_tokens": 16, "memory_bytes": 2 * MIB}
        windowed, full = (check_fit(_request({**config, **c}, **changes)) for c in ({}, {"sliding_window": None}))
        assert windowed.kv_capacity_tokens == full.kv_capacity_tokens
        num_blocks = full.kv_capacity_tokens // 16
        assert full.max_concurrent_sequences == num_blocks // 16
        assert windowed.max_concurrent_sequences == num_blocks // 4  # 31 + 16 tokens are three blocks, or four

    @pytest.mark.parametrize(
        ("config", "windows"),
        [
            ({"model_type": "qwen2"}, [(4, None)]),
            ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, [(1, None), (3, 4096)]),
            (
                {
                    "model_type": "qwen2",
                    "use_sliding_window": True,
                    "sliding_window": 8,
                    "layer_types": ["sliding_attention", "full_attention"] * 2,
                },
                [(2, None), (2, 8)],
            ),
            ({"model_type": "mistral"}, [(4, 4096)]),
            ({"model_type": "mistral", "sliding_window": None}, [(4, None)]),
            ({"model_type": "gemma2", "layer_types": ["sliding_attention"] * 4}, [(4, 4096)]),
        ],
    )
    def test_each_family_says_it_its_own_way(
        self, config: dict[str, Any], windows: list[tuple[int, int | None]]
    ) -> None:
        shape = shape_from_hf_config({**TINY, "num_hidden_layers": 4, **config})
        assert [(layers.num_layers, layers.sliding_window) for layers in shape.kv_layers] == windows


class TestParallel:
    def test_devices_share_what_can_be_split(self) -> None:
        one, two = _request(), _request(tensor_parallel_size=2)
        norms = 2 * 2 * 64 + 64
        assert weights_bytes(two) == 2 * ((one.shape.num_parameters - norms) // 2 + norms)
        assert kv_bytes_per_token(two) == kv_bytes_per_token(one) // 2

    def test_more_devices_than_heads_copy_them(self) -> None:
        assert kv_bytes_per_token(_request(tensor_parallel_size=4)) == kv_bytes_per_token(_request()) // 2

    def test_stages_share_the_layers_and_one_holds_the_table(self) -> None:
        one, two = _request(), _request(pipeline_parallel_size=2)
        layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
        assert weights_bytes(two) == 2 * (layer + 100 * 64)
        assert kv_bytes_per_token(two) == kv_bytes_per_token(one) // 2

    def test_the_fullest_stage_counts_where_layers_do_not_divide(self) -> None:
        three = _request({"num_hidden_layers": 3}, pipeline_parallel_size=2)
        assert kv_bytes_per_token(three) == 2 * 64 * 2


GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 256,
    "tokenizer.ggml.tokens": ["x"] * 100,
}


class TestGguf:
    def test_it_says_what_a_config_says(self) -> None:
        tied = shape_from_gguf(GGUF, {"token_embd.weight": 10})
        expected = shape_from_hf_config(TINY)
        assert replace(tied, stored_weights_bytes=None) == replace(expected, checkpoint_dtype=None)

    def test_an_output_matrix_of_its_own_counts(self) -> None:
        tied = shape_from_gguf(GGUF, {"token_embd.weight": 10})
        untied = shape_from_gguf(GGUF, {"token_embd.weight": 10, "output.weight": 10})
        assert untied.num_parameters == tied.num_parameters + 100 * 64
        assert shape_from_gguf(GGUF).num_parameters == untied.num_parameters

    def test_weights_kept_as_stored_take_what_they_take_on_disk(self) -> None:
        shape = shape_from_gguf(GGUF, {"token_embd.weight": 5000, "blk.0.attn_q.weight": 1234})
        request = replace(_request(), shape=shape, is_stored_form_kept=True)
        assert weights_bytes(request) == 6234
        assert weights_bytes(replace(request, is_stored_form_kept=False)) == 2 * shape.num_parameters

    def test_sizes_are_needed_for_that(self) -> None:
        with pytest.raises(FitError, match="needs the sizes of the stored tensors"):
            replace(_request(), shape=shape_from_gguf(GGUF), is_stored_form_kept=True)

    def test_one_number_for_all_layers_may_be_a_list(self) -> None:
        metadata = {**GGUF, "llama.attention.head_count_kv": [2, 2]}
        assert shape_from_gguf(metadata) == shape_from_gguf(GGUF)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"general.architecture": "mamba"}, "architecture 'mamba' is not known; known are gemma, gemma2"),
            ({"llama.attention.head_count_kv": [1, 2]}, "llama.attention.head_count_kv differs from layer to layer"),
            ({"llama.block_count": None}, "no usable 'num_hidden_layers'"),
            ({"tokenizer.ggml.tokens": []}, "no usable 'vocab_size'"),
        ],
    )
    def test_what_cannot_be_told_is_named(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(FitError, match=message):
            shape_from_gguf({**GGUF, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not known; known are gemma"),
        ({"hidden_size": None}, "no usable 'hidden_size'"),
        ({"vocab_size": "many"}, "no usable 'vocab_size'"),
        ({"num_hidden_layers": True}, "no usable 'num_hidden_layers'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised weights \(quant_method gptq\)"),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        shape_from_hf_config({**TINY, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, not 0"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"max_model_len": 0}, "max_model_len must be at least 1"),
        ({"max_model_len": 257}, "max_model_len 257 is more than the model's 256 positions"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        _request(**change)


SHAPES: st.SearchStrategy[ModelShape] = st.builds(
    lambda family, layers, heads, kv, window: shape_from_hf_config(
        {
            **TINY,
            "model_type": family,
            "num_hidden_layers": layers,
            "hidden_size": 16 * heads * kv,
            "num_attention_heads": heads * kv,
            "num_key_value_heads": kv,
            "sliding_window": window,
            "ffn_dim": 96,
        }
    ),
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "opt", "gpt_neox"]),
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
        pipeline_parallel_size=pp,
    )
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

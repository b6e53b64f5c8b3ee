"""Memory of models whose layers, or whose storage, differ: summed from plans, expected by hand."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from quire_contract.memory.fit import FitRequest, device_memory
from quire_contract.memory.kv_cache import KVCacheGroup
from quire_server.models.families import llama
from quire_server.models.footprint import build_model_shape, shape_of_config
from quire_server.models.kinds.attention import AttentionSpec
from quire_server.models.kinds.mlp import MlpSpec
from quire_server.models.planning.kv_cache_spec import build_kv_cache_groups
from quire_server.models.planning.linear_method import UnquantizedMethod
from quire_server.models.planning.parts import (
    LinearMethod,
    LinearPlan,
    MethodFor,
    ModulePlan,
    StoredLookup,
    TensorPlan,
)
from quire_server.models.planning.plan import build_plan
from quire_server.models.planning.spec import DecoderSpec, KVShape, LayerSpec

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
SETTINGS = {"memory_bytes": 0, "max_num_seqs": 1, "max_num_batched_tokens": 8}
SPEC = llama.FAMILY.build_spec(CONFIG)
ENDS = 2 * 2 * 100 * 64 + 4 * 64  # bfloat16 table and output matrix; the final norm in float32
NORMS = 4 * 2 * 64


def attention_of(layer: LayerSpec) -> AttentionSpec:
    assert isinstance(layer.attention, AttentionSpec)
    return layer.attention


def mlp_of(layer: LayerSpec) -> MlpSpec:
    assert isinstance(layer.feed_forward, MlpSpec)
    return layer.feed_forward


def with_heads(num_kv_heads: tuple[int, ...]) -> DecoderSpec:
    """DeciLM's way: each layer has heads of key and value of its own number."""
    return SPEC.map_layers(
        lambda index, layer: replace(layer, attention=replace(attention_of(layer), num_kv_heads=num_kv_heads[index]))
    )


def weights_of(spec: DecoderSpec, method_for: MethodFor | None = None, *, dtype: str = "bfloat16") -> int:
    plan = build_plan(spec, llama.FAMILY.build_weights(CONFIG), method_for or (lambda *_: UnquantizedMethod()))
    return device_memory(FitRequest(shape=build_model_shape(plan), dtype=dtype, **SETTINGS)).weights_bytes


def groups_of(spec: DecoderSpec) -> dict[tuple[int, ...], tuple[str, int, int | None]]:
    return {group.layers: (group.kind, group.num_kv_heads, group.window) for group in build_kv_cache_groups(spec)}


def test_layers_that_keep_the_same_are_one_group() -> None:
    assert groups_of(SPEC) == {(0, 1, 2, 3): ("full", 4, None)}
    assert groups_of(with_heads((4, 1, 4, 2))) == {
        (0, 2): ("full", 4, None),
        (1,): ("full", 1, None),
        (3,): ("full", 2, None),
    }
    windows = SPEC.map_layers(
        lambda index, layer: replace(
            layer, attention=replace(attention_of(layer), sliding_window=None if index % 2 else 32)
        )
    )
    assert groups_of(windows) == {(0, 2): ("window", 4, 32), (1, 3): ("full", 4, None)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """As much of a kind as says what is kept."""

    kv_shape: KVShape


def test_a_latent_is_one_tensor() -> None:
    latent = LatentAttention(kv_shape=KVShape(num_kv_heads=1, key_dim=576, value_dim=0))
    spec = SPEC.map_layers(lambda _, layer: replace(layer, attention=latent))
    assert build_kv_cache_groups(spec) == (
        KVCacheGroup(kind="latent", layers=(0, 1, 2, 3), num_kv_heads=1, key_dim=576, value_dim=0),
    )


def test_heads_that_vary() -> None:
    heads = (4, 1, 4, 2)
    expected = sum(2 * (64 * 64 + 2 * 64 * 16 * each + 64 * 64 + 3 * 64 * 96) + NORMS for each in heads)
    assert weights_of(with_heads(heads)) == ENDS + expected


def test_dense_layers_before_wide_ones() -> None:
    """On each of two stages are its own layers."""
    sizes = (96, 256, 256, 256)
    spec = SPEC.map_layers(
        lambda index, layer: replace(layer, feed_forward=replace(mlp_of(layer), intermediate_size=sizes[index]))
    )
    shape = build_model_shape(build_plan(spec, llama.FAMILY.build_weights(CONFIG), lambda *_: UnquantizedMethod()))
    assert [kind.layers for kind in shape.layer_weights] == [(0,), (1, 2, 3)]
    assert shape.activation_width == 3 * 256
    request = FitRequest(shape=shape, dtype="float32", pipeline_parallel_size=2, **SETTINGS)
    first, last = (device_memory(request, stage).weights_bytes for stage in range(2))
    attention = 4 * 64 * 64
    assert first == 4 * (2 * attention + 3 * 64 * (96 + 256) + 4 * 64 + 100 * 64)
    assert last == 4 * (2 * attention + 3 * 64 * 2 * 256 + 4 * 64 + 100 * 64 + 64)


@dataclass(frozen=True, slots=True)
class FourBit:
    """GPTQ's storage: eight weights in an int32, a float16 scale for each group of 32 inputs."""

    can_look_up: ClassVar[bool] = False

    def tensors(self, plan: LinearPlan, module: ModulePlan) -> Iterator[TensorPlan]:
        outputs, inputs, segments = module.layout.out_features, plan.inputs.size, plan.segments(module)
        packed = (inputs // 8, outputs)
        yield TensorPlan(
            name=f"{module.name}.qweight",
            shape=packed,
            encoding="I32",
            fixed_bytes=4 * packed[0] * packed[1],
            segments=segments,
        )
        yield TensorPlan(
            name=f"{module.name}.scales",
            shape=(inputs // 32, outputs),
            encoding="F16",
            fixed_bytes=2 * (inputs // 32) * outputs,
            segments=segments,
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_quantised_modules_count_as_they_are_held(dtype: str) -> None:
    """Whatever the model's dtype; their neighbours in it."""

    def method_for(module: str, stored: StoredLookup) -> LinearMethod:
        return FourBit() if "mlp" in module else UnquantizedMethod()

    item = {"bfloat16": 2, "float32": 4}[dtype]
    mlp = 3 * (64 * 96 // 2 + 64 * 96 // 32 * 2)
    assert weights_of(SPEC, method_for, dtype=dtype) == (
        4 * (item * 4 * 64 * 64 + mlp + NORMS) + item * 2 * 100 * 64 + 4 * 64
    )


def test_rotary_scaling_stretches_what_the_model_reads() -> None:
    """As the server reads it: a longer `max_model_len` than the config's positions is served, and so is no misfit."""
    scaled = {**CONFIG, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}
    assert shape_of_config(scaled).max_position_embeddings == 1024

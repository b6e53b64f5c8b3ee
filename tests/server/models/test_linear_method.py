"""Linear layers that are stored in ways the package does not know: chosen per module, read raw, counted as they lie."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from quire_server.errors import CheckpointError, UnsupportedModelError
from quire_server.models.modules import linear
from quire_server.models.modules.linear import Linear, TensorReader
from quire_server.models.planning import linear_method
from quire_server.models.planning.linear_method import UnquantizedMethod
from quire_server.models.planning.parts import (
    LinearMethod,
    LinearPlan,
    MethodFor,
    ModulePlan,
    StoredLookup,
    TensorPlan,
    nothing_stored,
)
from quire_server.models.planning.sharding import ModelShare
from quire_server.models.registry import plan_model
from quire_server.weights.checkpoint import open_checkpoint

FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True, slots=True)
class PackedMethod:
    """`module.qweight` int32 [in / 4, out]: four signed bytes along the inputs. `module.scales` float32 [out]."""

    def tensors(self, plan: LinearPlan, module: ModulePlan) -> Iterator[TensorPlan]:
        out_features, in_features = module.layout.out_features, plan.inputs.size
        shape, segments = (in_features // 4, out_features), plan.segments(module)
        num_bytes = in_features * out_features
        yield TensorPlan(
            name=f"{module.name}.qweight", shape=shape, encoding="I32", fixed_bytes=num_bytes, segments=segments
        )
        yield TensorPlan(name=f"{module.name}.scales", shape=(out_features,), fixed_bytes=4 * out_features)


class PackedLinear:
    """Unpacks anew for each product."""

    def __init__(self, packed: list[Tensor], scales: list[Tensor]) -> None:
        self._packed = packed
        self._scales = torch.cat(scales)

    @property
    def size_bytes(self) -> int:
        return sum(part.nbytes for part in self._packed) + self._scales.nbytes

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        parts = [part.permute(1, 0, 2).flatten(1) for part in self._packed]  # [in / 4, out, 4] -> [out, in]
        return ((x.float() @ torch.cat(parts).float().t()) * self._scales).to(out_dtype or x.dtype)


def load_packed(plan: LinearPlan, share: ModelShare, reader: TensorReader) -> Linear:
    packed = []
    for module in plan.modules:
        raw = reader.raw(f"{module.name}.qweight")
        assert raw.encoding == "I32"
        packed.append(raw.data.view(torch.int8).view(*raw.shape, 4).clone())
    return PackedLinear(packed, [reader.read(f"{module.name}.scales", torch.float32) for module in plan.modules])


def packed_method_for(quantization: Mapping[str, Any]) -> MethodFor:
    """Some modules may be left as they are, as AWQ and compressed-tensors have it."""

    def method_for(module: str, stored: StoredLookup) -> LinearMethod:
        is_kept = any(name in module for name in quantization["modules_to_not_convert"])
        return UnquantizedMethod() if is_kept else PackedMethod()

    return method_for


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sys.byteorder == "little"
    monkeypatch.setitem(linear_method.QUANTIZATIONS, "toy", packed_method_for)
    monkeypatch.setitem(linear.LOADERS, PackedMethod, load_packed)


@pytest.fixture
def quantise(toy: None, rewrite_tensors: Callable[..., None]) -> Callable[..., None]:
    """Quantise a tiny model's file, and give `transformers` the weights that this leaves."""

    def run(tiny: Any, kept: list[str]) -> None:
        def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            changed: dict[str, Tensor] = {}
            for name, tensor in tensors.items():
                if "proj" not in name or any(each in name for each in kept):
                    changed[name] = tensor
                    continue
                scales = tensor.abs().amax(1) / 127
                rounded = (tensor / scales[:, None]).round().to(torch.int8)
                module = name.removesuffix(".weight")
                with torch.no_grad():
                    tiny.reference.get_submodule(module).weight.copy_(rounded * scales[:, None])
                groups = rounded.view(len(rounded), -1, 4).permute(1, 0, 2).contiguous()
                changed[f"{module}.qweight"] = groups.view(torch.int32).squeeze(-1)
                changed[f"{module}.scales"] = scales
            return changed

        rewrite_tensors(tiny, change)
        quantization = {"quant_method": "toy", "modules_to_not_convert": kept}
        tiny.edit_config(lambda config: config.update(quantization_config=quantization))

    return run


@pytest.mark.parametrize(
    "kept", [["lm_head"], ["lm_head", "down_proj"], ["lm_head", "v_proj", "gate_proj"]], ids=["all", "some", "mixed"]
)
def test_a_method_of_ones_own(
    kept: list[str],
    quantise: Callable[..., None],
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
) -> None:
    """The last case has differently stored modules in one layer of ours: v beside q and k, gate beside up."""
    tiny = build_tiny_model("llama", **FIELDS)
    quantise(tiny, kept)
    model = tiny.load()
    expected = tiny.reference_logits(prompt_of(20))
    torch.testing.assert_close(harness(model).prefill(prompt_of(20)), expected, atol=1e-4, rtol=1e-4)
    with (tiny.path / "model.safetensors").open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    on_disk = (tiny.path / "model.safetensors").stat().st_size - header_bytes - 8
    assert model.num_parameter_bytes == on_disk  # all of it is float32, or held as it lies
    foretold = [placed.tensor for placed in plan_model(open_checkpoint(tiny.path).config).tensors()]
    assert sum(tensor.loaded_bytes(4) for tensor in foretold) == on_disk


def test_bytes_are_the_methods(toy: None) -> None:
    """What holds its own bytes does not change with the model's dtype; what does not is split among ranks by heads."""
    quantization = {"quant_method": "toy", "modules_to_not_convert": ["down_proj", "lm_head"]}
    config = FIELDS | {"vocab_size": 97, "architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    tensors = {placed.tensor.name: placed.tensor for placed in plan_model(config).tensors()}
    assert len(tensors) == len(list(plan_model(config).tensors()))
    packed, plain = tensors["model.layers.1.self_attn.k_proj.qweight"], tensors["model.layers.1.mlp.down_proj.weight"]
    norm, head = tensors["model.layers.0.input_layernorm.weight"], tensors["lm_head.weight"]
    assert (packed.encoding, packed.shape) == ("I32", (16, 32))
    assert [packed.loaded_bytes(itemsize) for itemsize in (2, 4)] == [64 * 32] * 2
    assert [plain.loaded_bytes(itemsize) for itemsize in (2, 4)] == [64 * 96 * 2, 64 * 96 * 4]
    assert [norm.loaded_bytes(itemsize) for itemsize in (2, 4)] == [64 * 4] * 2
    assert list(packed.pieces(2)) == [(2, True, 64 * 32)]
    assert list(plain.pieces(2)) == [(96, False, 64 * 96 * 2)]
    assert list(norm.pieces(2)) == [(1, True, 256)]
    assert list(head.pieces(2)) == [(97, False, 97 * 64 * 2)]
    assert (packed.is_split, norm.is_split) == (True, False)


def test_a_tensor_of_another_type_is_named(
    quantise: Callable[..., None], build_tiny_model: Callable[..., Any], rewrite_tensors: Callable[..., None]
) -> None:
    tiny = build_tiny_model("llama", **FIELDS)
    quantise(tiny, ["lm_head"])
    name = "model.layers.1.mlp.up_proj.qweight"
    rewrite_tensors(tiny, lambda tensors: tensors | {name: tensors[name].float()})
    with pytest.raises(CheckpointError, match=rf"{name} is of type F32; the config makes it I32"):
        tiny.load()


def test_an_unknown_quantisation_is_refused_in_the_plan() -> None:
    config = FIELDS | {"vocab_size": 97, "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(UnsupportedModelError, match="'quip'"):
        plan_model(config | {"quantization_config": {"quant_method": "quip"}})


def test_nothing_is_known_of_files_that_are_not_there() -> None:
    assert nothing_stored("model.norm.weight") is None

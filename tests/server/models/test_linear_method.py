"""Linear layers that are stored in ways the package does not know: chosen per module, read raw, counted as they lie."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from quire_server.models.modules import embedding, linear
from quire_server.models.modules.embedding import Embedding
from quire_server.models.modules.linear import Linear, TensorReader
from quire_server.models.planning import linear_method
from quire_server.models.planning.linear_method import UnquantizedMethod
from quire_server.models.planning.parts import (
    LinearMethod,
    LinearPlan,
    MethodFor,
    ModulePlan,
    StoredLookup,
    TablePlan,
    TensorPlan,
)
from quire_server.models.planning.sharding import ModelShare
from quire_server.models.registry import plan_model
from quire_server.shared.errors import CheckpointError, UnsupportedModelError
from quire_server.weights.checkpoint import open_checkpoint
from quire_server.weights.stored import StoredTensor

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

    can_look_up: ClassVar[bool] = True

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

    def look_up(self, ids: Tensor) -> Tensor:
        return self._packed[0].permute(1, 0, 2).flatten(1)[ids].float() * self._scales[ids, None]


class PackedTable(PackedLinear):
    def __call__(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.look_up(ids)


def load_packed(plan: LinearPlan, share: ModelShare, reader: TensorReader) -> Linear:
    return PackedLinear(*read_packed(plan, reader))


def load_packed_table(plan: TablePlan, rows: range, reader: TensorReader) -> Embedding:
    return PackedTable(*read_packed(plan.as_linear(), reader))  # type: ignore[return-value]


def read_packed(plan: LinearPlan, reader: TensorReader) -> tuple[list[Tensor], list[Tensor]]:
    packed = []
    for module in plan.modules:
        raw = reader.raw(f"{module.name}.qweight")
        assert raw.encoding == "I32"
        packed.append(raw.data.view(torch.int8).view(*raw.shape, 4).clone())
    return packed, [reader.read(f"{module.name}.scales", torch.float32) for module in plan.modules]


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
    monkeypatch.setitem(embedding.TABLE_LOADERS, PackedMethod, load_packed_table)


@pytest.fixture
def quantise(toy: None, rewrite_tensors: Callable[..., None]) -> Callable[..., None]:
    """Quantise a tiny model's file, and give `transformers` the weights that this leaves."""

    def run(tiny: Any, kept: list[str]) -> None:
        def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            changed: dict[str, Tensor] = {}
            for name, tensor in tensors.items():
                if not any(part in name for part in ("proj", "embed", "lm_head")) or any(each in name for each in kept):
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
    "kept",
    [["lm_head", "embed"], ["lm_head", "embed", "down_proj"], ["lm_head", "embed", "v_proj", "gate_proj"], []],
    ids=["all", "some", "mixed", "ends-too"],
)
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_a_method_of_ones_own(
    kept: list[str],
    is_tied: bool,
    quantise: Callable[..., None],
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
) -> None:
    """The mixed case has differently stored modules in one layer of ours: v beside q and k, gate beside up."""
    tiny = build_tiny_model("llama", **FIELDS, tie_word_embeddings=is_tied)
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
    quantization = {"quant_method": "toy", "modules_to_not_convert": ["down_proj", "lm_head", "embed"]}
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
    assert (bool(packed.segments), bool(norm.segments)) == (True, False)


def test_a_tensor_of_another_type_is_named(
    quantise: Callable[..., None], build_tiny_model: Callable[..., Any], rewrite_tensors: Callable[..., None]
) -> None:
    tiny = build_tiny_model("llama", **FIELDS)
    quantise(tiny, ["lm_head", "embed"])
    name = "model.layers.1.mlp.up_proj.qweight"
    rewrite_tensors(tiny, lambda tensors: tensors | {name: tensors[name].float()})
    with pytest.raises(CheckpointError, match=rf"{name} is of type F32; the config makes it I32"):
        tiny.load()


def test_an_unknown_quantisation_is_refused_in_the_plan() -> None:
    config = FIELDS | {"vocab_size": 97, "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(UnsupportedModelError, match="'quip'"):
        plan_model(config | {"quantization_config": {"quant_method": "quip"}})


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_table_whose_rows_cannot_be_looked_up_is_named(is_tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_method.QUANTIZATIONS, "toy", packed_method_for)
    monkeypatch.setattr(PackedMethod, "can_look_up", False)
    config = FIELDS | {"vocab_size": 97, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": is_tied}
    config |= {"quantization_config": {"quant_method": "toy", "modules_to_not_convert": ["lm_head"]}}
    with pytest.raises(
        UnsupportedModelError, match=r"model\.embed_tokens: an embedding that is stored as PackedMethod"
    ):
        plan_model(config)


def test_nothing_is_known_of_files_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a config alone a method that follows what is stored still gives a plan."""
    found: list[StoredTensor | None] = []

    def method_for(module: str, stored: StoredLookup) -> LinearMethod:
        found.append(stored(f"{module}.weight"))
        return UnquantizedMethod() if found[-1] is None else PackedMethod()

    monkeypatch.setitem(linear_method.QUANTIZATIONS, "toy", lambda quantization: method_for)
    config = FIELDS | {"vocab_size": 97, "architectures": ["LlamaForCausalLM"]}
    plan = plan_model(config | {"quantization_config": {"quant_method": "toy"}})
    assert found == [None] * (2 * 7 + 2)
    assert list(plan.tensors()) == list(plan_model(config).tensors())

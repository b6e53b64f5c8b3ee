"""GGUF files, written as llama.cpp's converter writes them, give the logits of the checkpoint they came from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import write_gguf
from torch import Tensor

from quire_server.models.families.llama import FAMILY
from quire_server.models.modules import linear
from quire_server.models.modules.linear import Linear, TensorReader
from quire_server.models.planning.linear_method import QUANTIZATIONS, UnquantizedMethod
from quire_server.models.planning.parts import LinearMethod, LinearPlan, ModulePlan, StoredLookup, TensorPlan
from quire_server.models.planning.sharding import ModelShare
from quire_server.weights.checkpoint import open_checkpoint

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA2 = {"sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0}
CASES = [
    pytest.param("llama", "llama", GROUPED, id="llama"),
    pytest.param(
        "llama", "llama", GROUPED | {"tie_word_embeddings": True, "attention_bias": True}, id="llama-tied-biases"
    ),
    pytest.param("llama", "llama", GROUPED | {"rope_parameters": LLAMA3_ROPE}, id="llama3"),
    pytest.param("llama", "llama", GROUPED | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, id="linear"),
    pytest.param("qwen2", "qwen2", GROUPED, id="qwen2"),
    pytest.param("qwen3", "qwen3", GROUPED | {"head_dim": 24}, id="qwen3"),
    pytest.param("gemma", "gemma", GROUPED | {"head_dim": 24}, id="gemma"),
    pytest.param("gemma2", "gemma2", GROUPED | GEMMA2 | {"head_dim": 16, "query_pre_attn_scalar": 16}, id="gemma2"),
    pytest.param("gpt_neox", "gptneox", SIZES, id="gptneox"),
    pytest.param("gpt_neox", "gptneox", SIZES | {"use_parallel_residual": False}, id="gptneox-sequential"),
]


@pytest.mark.parametrize(("model_type", "architecture", "fields"), CASES)
def test_logits_are_those_of_the_original(
    model_type: str,
    architecture: str,
    fields: dict[str, Any],
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
    tmp_path: Path,
) -> None:
    tiny = build_tiny_model(model_type, **fields)
    write_gguf(tmp_path / "model.gguf", architecture, tiny.reference)
    expected = tiny.reference_logits(prompt_of(40))
    tiny.path = tmp_path / "model.gguf"
    torch.testing.assert_close(harness(tiny.load()).prefill(prompt_of(40)), expected, atol=1e-4, rtol=1e-4)
    assert open_checkpoint(tiny.path).config["tie_word_embeddings"] == tiny.reference.config.tie_word_embeddings


def round_weights(reference: Any, quantisation: gguf.GGMLQuantizationType, plain: tuple[str, ...] = ()) -> None:
    """Give the reference the weights that quantisation left."""
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.dim() == 2 and not any(part in name for part in plain):
                data = gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), quantisation), quantisation)
                parameter.copy_(torch.from_numpy(data.astype(np.float32)))


@pytest.mark.parametrize("encoding", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantised_rows_are_put_back_in_order(
    encoding: str,
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
    tmp_path: Path,
) -> None:
    """The reference has the weights that quantisation left; the GGUF file has them permuted and encoded."""
    tiny = build_tiny_model("llama", **GROUPED)
    quantisation = gguf.GGMLQuantizationType[encoding]
    write_gguf(tmp_path / "model.gguf", "llama", tiny.reference, quantisation)
    round_weights(tiny.reference, quantisation)
    tiny.path = tmp_path / "model.gguf"
    expected = tiny.reference_logits(prompt_of(20))
    torch.testing.assert_close(harness(tiny.load()).prefill(prompt_of(20)), expected, atol=1e-4, rtol=1e-4)


@dataclass(frozen=True, slots=True)
class BlocksMethod:
    """A GGUF tensor that stays Q8_0: how much it holds is what is stored."""

    num_bytes: int
    can_look_up: ClassVar[bool] = False

    def tensors(self, plan: LinearPlan, module: ModulePlan) -> Iterator[TensorPlan]:
        shape = module.layout.stored_shape(plan.inputs.size)
        yield TensorPlan(name=f"{module.name}.weight", shape=shape, encoding="Q8_0", fixed_bytes=self.num_bytes)


class BlocksLinear:
    def __init__(self, blocks: list[Tensor], in_features: int) -> None:
        self._blocks = torch.cat(blocks)
        self._in_features = in_features

    @property
    def size_bytes(self) -> int:
        return self._blocks.nbytes

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        values = gguf.quants.dequantize(self._blocks.numpy(), gguf.GGMLQuantizationType.Q8_0)
        weight = torch.from_numpy(np.array(values)).view(-1, self._in_features)
        return (x @ weight.t()).to(out_dtype or x.dtype)


def load_blocks(plan: LinearPlan, share: ModelShare, reader: TensorReader) -> Linear:
    raws = [reader.raw(f"{module.name}.weight") for module in plan.modules]
    return BlocksLinear([raw.data.view(raw.shape[0], -1) for raw in raws], plan.inputs.size)


def test_the_method_follows_what_is_stored(
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GGUF file has a type per tensor. Rows of query and key, permuted on disk, come in order, still encoded."""
    monkeypatch.setitem(linear.LOADERS, BlocksMethod, load_blocks)
    looked_at: dict[str, int] = {}

    def method_for(module: str, stored: StoredLookup) -> LinearMethod:
        tensor = stored(f"{module}.weight")
        assert tensor is not None
        if tensor.encoding != "Q8_0":
            return UnquantizedMethod()
        looked_at[module] = tensor.num_bytes
        return BlocksMethod(tensor.num_bytes)

    tiny = build_tiny_model("llama", **GROUPED)
    path = tiny.path.with_suffix(".gguf")
    quantisation, plain = gguf.GGMLQuantizationType.Q8_0, ("v_proj", "lm_head", "embed")
    write_gguf(path, "llama", tiny.reference, quantisation, plain)
    round_weights(tiny.reference, quantisation, plain)
    tiny.path = path
    expected = tiny.reference_logits(prompt_of(20))
    config = open_checkpoint(path).config
    model = tiny.load_as(FAMILY.build_spec(config), FAMILY.build_weights(config), method_for=method_for)
    torch.testing.assert_close(harness(model).prefill(prompt_of(20)), expected, atol=1e-4, rtol=1e-4)
    assert len(looked_at) == 3 * 6
    assert looked_at["model.layers.0.mlp.up_proj"] == 96 * 64 // 32 * 34
    looked_at.clear()
    monkeypatch.setitem(QUANTIZATIONS, "gguf", lambda quantization: method_for)
    torch.testing.assert_close(harness(tiny.load()).prefill(prompt_of(20)), expected, atol=1e-4, rtol=1e-4)
    assert len(looked_at) == 3 * 6

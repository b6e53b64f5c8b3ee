"""Loading: what is refused before anything is read, where tensors are looked for, and what the model then holds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from quire_server.models import free_memory
from quire_server.models.loader import load_model, resolve_dtype
from quire_server.models.modules.attention import build_alibi_slopes
from quire_server.models.registry import FAMILIES, find_family
from quire_server.shared.errors import CheckpointError, OutOfMemoryError, UnsupportedModelError
from quire_server.weights.checkpoint import open_checkpoint

CPU = torch.device("cpu")
FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def tiny(build_tiny_model: Callable[..., Any]) -> Any:
    return build_tiny_model("llama", **FIELDS)


@pytest.fixture
def logits_of(harness: Callable[..., Any], prompt_of: Callable[[int], list[int]]) -> Callable[[Any], torch.Tensor]:
    return lambda tiny: harness(tiny.load()).prefill(prompt_of(9))


def rewrite(tiny: Any, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = tiny.path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})


def test_a_missing_tensor_is_named_before_anything_is_read(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    rewrite(tiny, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    monkeypatch.setattr("quire_server.models.reader.read_tensor", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=f"{tiny.path}.*{name} is missing"):
        tiny.load()


def test_a_wrong_shape_is_named_with_both_shapes(tiny: Any) -> None:
    tiny.edit_config(lambda config: config.update(intermediate_size=64))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .*gate_proj.* \[48, 32\].* \[64, 32\]"):
        tiny.load()


def test_an_unknown_architecture_lists_the_known_ones(tiny: Any) -> None:
    tiny.edit_config(lambda config: config.update(architectures=["MambaForCausalLM"]))
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM.*GPTNeoXForCausalLM.*Qwen2ForCausalLM"):
        tiny.load()
    with pytest.raises(UnsupportedModelError, match=r"none.*'llama'"):
        find_family({"model_type": "llama"})


def test_yi_is_llama() -> None:
    assert FAMILIES["YiForCausalLM"] is FAMILIES["LlamaForCausalLM"]


def test_an_unknown_quantisation_is_refused(tiny: Any) -> None:
    tiny.edit_config(lambda config: config.update(quantization_config={"quant_method": "quip"}))
    with pytest.raises(UnsupportedModelError, match="'quip'"):
        tiny.load()


def test_an_unknown_activation_is_refused(tiny: Any) -> None:
    tiny.edit_config(lambda config: config.update(hidden_act="mish"))
    with pytest.raises(UnsupportedModelError, match=r"'mish'.*silu"):
        tiny.load()


def test_a_missing_config_field_is_named(tiny: Any) -> None:
    tiny.edit_config(lambda config: config.pop("num_hidden_layers"))
    with pytest.raises(CheckpointError, match="'num_hidden_layers'"):
        tiny.load()


def test_a_size_that_is_none_is_refused_before_a_tensor_is_looked_at(tiny: Any) -> None:
    tiny.edit_config(lambda config: config.update(intermediate_size=0))
    with pytest.raises(CheckpointError, match="'intermediate_size' is 0"):
        tiny.load()


def test_weights_that_do_not_fit_are_refused_with_the_arithmetic(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    need_bytes = 4 * sum(parameter.numel() for parameter in tiny.reference.parameters())
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: need_bytes - 1)
    with pytest.raises(OutOfMemoryError, match=r"need .* KiB; .* KiB are free on cpu") as caught:
        tiny.load()
    assert caught.value.termination.need_bytes == need_bytes
    assert caught.value.termination.have_bytes == need_bytes - 1
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: need_bytes)
    assert tiny.load().num_parameter_bytes == need_bytes


def test_free_memory_is_known() -> None:
    assert free_memory.free_bytes(CPU) > 0


def test_progress_rises_to_one_and_threads_are_given_back(tiny: Any) -> None:
    shares: list[float] = []
    torch.set_num_threads(2)
    load_model(open_checkpoint(tiny.path), dtype=torch.float32, device=CPU, on_progress=shares.append)
    assert len(shares) == 1 + FIELDS["num_hidden_layers"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert torch.get_num_threads() == 2


def test_an_error_while_reading_ends_the_load(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("quire_server.models.reader.read_tensor", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        tiny.load()


def test_tied_weights_are_stored_once(build_tiny_model: Callable[..., Any]) -> None:
    sizes = []
    for is_tied in (False, True):
        tiny = build_tiny_model("llama", tie_word_embeddings=is_tied, seed=int(is_tied), **FIELDS)
        sizes.append(tiny.load().num_parameter_bytes)
    assert sizes[0] - sizes[1] == 97 * 32 * 4


def test_a_base_model_is_found_without_its_prefix(tiny: Any, logits_of: Callable[[Any], torch.Tensor]) -> None:
    expected = logits_of(tiny)
    rewrite(tiny, lambda tensors: {key.removeprefix("model."): tensor for key, tensor in tensors.items()})
    assert torch.equal(logits_of(tiny), expected)


def test_shards_are_one_checkpoint(tiny: Any, logits_of: Callable[[Any], torch.Tensor]) -> None:
    expected = logits_of(tiny)
    (tiny.path / "model.safetensors").unlink()
    tiny.reference.save_pretrained(tiny.path, max_shard_size="20KB")
    assert len(json.loads((tiny.path / "model.safetensors.index.json").read_text())["weight_map"]) > 1
    assert len(list(tiny.path.glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(tiny), expected)


def test_a_model_outlives_its_files(
    tiny: Any, harness: Callable[..., Any], prompt_of: Callable[[int], list[int]]
) -> None:
    model = tiny.load()
    expected = harness(model).prefill(prompt_of(9))
    shutil.rmtree(tiny.path)
    assert torch.equal(harness(model).prefill(prompt_of(9)), expected)


@pytest.mark.parametrize(
    ("requested", "published", "device", "expected"),
    [
        ("auto", "bfloat16", "cpu", torch.bfloat16),
        ("auto", "float32", "cpu", torch.float32),
        ("auto", "float16", "cpu", torch.bfloat16),
        ("auto", "float16", "cuda", torch.float16),
        ("auto", "float8_e4m3fn", "cuda", torch.bfloat16),
        ("float16", "bfloat16", "cpu", torch.float16),
        ("float32", "bfloat16", "cuda", torch.float32),
    ],
)
def test_dtype(tiny: Any, requested: Any, published: str, device: str, expected: torch.dtype) -> None:
    tiny.edit_config(lambda config: config.update(dtype=published))
    assert resolve_dtype(requested, open_checkpoint(tiny.path), torch.device(device)) == expected


@pytest.mark.parametrize("num_heads", [1, 8, 12])
def test_alibi_slopes_are_those_of_bloom(num_heads: int) -> None:
    mask = torch.ones(1, 2)
    expected = build_alibi_tensor(mask, num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(build_alibi_slopes(num_heads)), expected)


def test_a_directory_without_weights_says_so(tiny: Any, tmp_path: Path) -> None:
    (tiny.path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors files"):
        tiny.load()

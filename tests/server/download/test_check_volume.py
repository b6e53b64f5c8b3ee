"""pvc:// and the facts of what lies in a volume."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from small_gguf import LLAMA, write_gguf

from quire_contract.memory.model_shape import LayerShares
from quire_contract.model_facts import encode_facts
from quire_contract.model_uri import parse_model_uri
from quire_server.download import facts as facts_module
from quire_server.download.errors import DownloadError
from quire_server.download.job import DownloadRequest, download
from quire_server.download.progress import Meter


def check(volume: Path, path: str, check_path: str | None = None):
    uri = parse_model_uri(f"pvc://claim/{path}")
    return download(DownloadRequest(uri=uri, directory=volume, check_path=check_path), Meter())


def snapshot(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def test_a_directory_a_file_and_the_root(tmp_path: Path, support) -> None:
    model = support.write_model(tmp_path / "models" / "tiny")
    write_gguf(tmp_path / "models" / "m.gguf", LLAMA)
    before = snapshot(tmp_path)
    facts = check(tmp_path, "models/tiny")
    assert facts.path == "models/tiny"
    assert facts.bytes == sum(file.stat().st_size for file in model.iterdir())
    assert facts.shape is not None
    assert facts.revision is None
    assert check(tmp_path, "models/m.gguf").path == "models/m.gguf"
    assert check(model, "").path == "."
    assert check(tmp_path, "elsewhere", check_path="models/tiny").path == "models/tiny"
    assert snapshot(tmp_path) == before


def test_a_gguf_file_in_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_gguf(tmp_path / "a" / "m.gguf", LLAMA)
    facts = check(tmp_path, "a")
    assert facts.path == "a/m.gguf"
    assert facts.shape is not None
    assert (facts.shape.architecture, facts.shape.checkpoint_dtype) == ("LlamaForCausalLM", "bfloat16")
    assert check(tmp_path / "a", "").path == "m.gguf"


def test_parts_of_a_gguf_model(tmp_path: Path) -> None:
    for i in (1, 2):
        write_gguf(tmp_path / f"m-0000{i}-of-00002.gguf", {**LLAMA, "split.count": 2})
    assert check(tmp_path, "").path == "m-00001-of-00002.gguf"
    size = (tmp_path / "m-00001-of-00002.gguf").stat().st_size
    assert check(tmp_path, "m-00001-of-00002.gguf").bytes == 2 * size
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(DownloadError, match="1 of its 2 parts"):
        check(tmp_path, "")


@pytest.mark.parametrize(
    ("path", "code", "says"),
    [
        ("none", "ModelNotFound", "there is no none"),
        ("empty", "ModelInvalid", "neither a config.json nor one .gguf"),
        ("notes.txt", "ModelInvalid", "neither a model's directory nor a .gguf"),
        ("away", "ModelInvalid", "leads out of the volume"),
        ("noweights", "ModelInvalid", "holds no .safetensors"),
        ("pickled", "ModelInvalid", "pickled weights are not loaded"),
        ("missing", "ModelInvalid", "model-1.safetensors: is missing"),
        ("cut", "ModelInvalid", "it is cut short"),
        ("cut.gguf", "ModelInvalid", "it is cut short"),
    ],
)
def test_what_cannot_be_served(tmp_path: Path, support, path: str, code: str, says: str) -> None:
    volume = tmp_path / "volume"
    support.write_model(volume / "missing")
    (volume / "missing" / "model-1.safetensors").unlink()
    (support.write_model(volume / "cut") / "model-1.safetensors").write_bytes(support.safetensors_bytes(500)[:-1])
    for name in ("empty", "noweights", "pickled"):
        (volume / name).mkdir()
    for name in ("noweights", "pickled"):
        (volume / name / "config.json").write_text(json.dumps(support.CONFIG))
    (volume / "pickled" / "pytorch_model.bin").touch()
    (volume / "notes.txt").touch()
    write_gguf(volume / "cut.gguf", LLAMA)
    os.truncate(volume / "cut.gguf", (volume / "cut.gguf").stat().st_size - 1)
    (volume / "away").symlink_to("/")
    with pytest.raises(DownloadError, match=says) as told:
        check(volume, path)
    assert told.value.termination.code == code


def test_files_that_may_not_be_read(tmp_path: Path, support, monkeypatch: pytest.MonkeyPatch) -> None:
    support.write_model(tmp_path / "m")

    def refuse(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rglob", refuse)
    with pytest.raises(DownloadError, match="cannot be read: Permission denied") as told:
        check(tmp_path, "m")
    assert "fsGroup" in told.value.termination.hint


@pytest.mark.parametrize(
    "change", [{}, {"architectures": ["x" * 5000]}, {"quantization_config": {"quant_method": "gptq"}}]
)
def test_facts_fit_into_a_termination_message(tmp_path: Path, support, change: dict[str, object]) -> None:
    model = support.write_model(tmp_path / ("m" * 200))
    config = {
        **support.CONFIG, "architectures": ["Gemma2ForCausalLM"], "head_dim": 128, "num_hidden_layers": 62,
        "sliding_window": 4096, **change,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    facts = check(tmp_path, model.name)
    assert (facts.shape is None) == bool(change)
    assert len(encode_facts(facts)) < 2500


def test_a_model_of_too_many_kinds_says_so(tmp_path: Path, support, monkeypatch: pytest.MonkeyPatch) -> None:
    support.write_model(tmp_path / "m")
    shape = check(tmp_path, "m").shape
    assert shape is not None
    shares = shape.layer_weights[0].shares
    kinds = tuple(LayerShares(layers=(layer,), shares=shares) for layer in range(200))
    group = replace(shape.kv_groups[0], layers=tuple(range(200)))
    monkeypatch.setattr(
        facts_module, "read_model_shape", lambda _: replace(shape, layer_weights=kinds, kv_groups=(group,))
    )
    facts = check(tmp_path, "m")
    assert (facts.shape, "too many kinds" in facts.shape_error) == (None, True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"vocab_size": "many"}, "config is not usable"),
        ({"num_attention_heads": 0}, "not usable|has no"),
        ({"hidden_size": [64]}, "config is not usable"),
        ({"architectures": None}, "model_type 'llama'"),
        ({"num_hidden_layers": 0}, "not usable"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' is True"),
        ({"intermediate_size": 0}, "'intermediate_size' is 0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "window of at least 1"),
    ],
)
def test_a_config_that_cannot_be_counted_is_no_failure(
    tmp_path: Path, support, change: dict[str, object], says: str
) -> None:
    model = support.write_model(tmp_path / "m")
    (model / "config.json").write_text(json.dumps({**support.CONFIG, **change}))
    facts = check(tmp_path, "m")
    assert facts.shape is None
    assert re.search(says, facts.shape_error)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"general.architecture": "mamba"}, "'mamba' is not supported"),
        ({"llama.block_count": 0}, "llama.block_count is missing or zero"),
        ({"llama.expert_count": 8}, "mixture of experts"),
    ],
)
def test_metadata_that_cannot_be_counted_is_no_failure(tmp_path: Path, change: dict[str, int | str], says: str) -> None:
    write_gguf(tmp_path / "m.gguf", {**LLAMA, **change})
    facts = check(tmp_path, "")
    assert facts.shape is None
    assert says in facts.shape_error
    assert str(tmp_path) not in facts.shape_error


def test_gguf_says_what_a_config_says(tmp_path: Path, support) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA)
    model = support.write_model(tmp_path / "m")
    (model / "config.json").write_text(json.dumps({**support.CONFIG, "vocab_size": 100}))
    assert check(tmp_path, "m.gguf").shape == check(tmp_path, "m").shape


def test_the_dtype_is_that_of_the_weights_where_the_config_is_silent(tmp_path: Path, support) -> None:
    model = support.write_model(tmp_path / "m", num_files=1)
    config = {key: value for key, value in support.CONFIG.items() if key != "torch_dtype"}
    (model / "config.json").write_text(json.dumps(config))
    header = json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (model / "model-0.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    shape = check(tmp_path, "m").shape
    assert shape is not None
    assert shape.checkpoint_dtype == "float32"


def test_a_process_checks_a_volume_that_is_read_only(start_job, volume, support) -> None:
    support.write_model(volume / "m")
    for path in [volume, volume / "m", *(volume / "m").iterdir()]:
        path.chmod(path.stat().st_mode & 0o555)
    assert start_job("pvc://claim/m").facts().path == "m"
    failure = start_job("pvc://claim/m", "--check-path", "../m").failure()
    assert failure.code == "ModelInvalid"
    (volume).chmod(0o755)
    (volume / "m").chmod(0o755)
    assert start_job("hf://a/b", "--check-path", "m").wait() == 2

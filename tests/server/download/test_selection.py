from functools import partial
from pathlib import Path

import pytest

from quire_server.download.errors import ModelInvalidError
from quire_server.download.selection import address_on_hub, choose_files, gguf_parts, is_part, model_path
from quire_server.download.source import RemoteFile

PARTS = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["config.json", "m.safetensors", "m.bin", "a.png", "README.md"], ["config.json", "m.safetensors"]),
        (["config.json", "m.safetensors", "m.gguf"], ["config.json", "m.safetensors"]),
        (["config.json", "m.safetensors", "original/m.safetensors", "onnx/a.json"], ["config.json", "m.safetensors"]),
        (["m.gguf", "README.md", "config.json"], ["m.gguf"]),
        (["m.gguf", "mmproj-m.gguf"], ["m.gguf"]),
        ([PARTS[2], PARTS[0], "README.md", PARTS[1]], PARTS),
        ([f"Q4/{name}" for name in PARTS], [f"Q4/{name}" for name in PARTS]),
    ],
)
def test_what_makes_a_model(names: list[str], chosen: list[str]) -> None:
    assert choose_files("m", names) == chosen


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "no safetensors and no GGUF"),
        (["mmproj-m.gguf"], "no safetensors and no GGUF"),
        (["m.safetensors"], "no config.json"),
        ([*PARTS, "other.gguf"], f"several GGUF models .{PARTS[0]}, other.gguf"),
        (["m-00001-of-00002.gguf", "m-00001-of-00003.gguf"], "several"),
    ],
)
def test_what_makes_none(names: list[str], says: str) -> None:
    with pytest.raises(ModelInvalidError, match=says):
        choose_files("m", names)


@pytest.mark.parametrize(
    ("names", "cure"),
    [
        (["a.gguf", "b.gguf"], "spec.model.uri, such as s3://m/a.gguf."),
        ([*PARTS, "other.gguf"], "spec.model.uri, such as s3://m/other.gguf."),
        (["m-00001-of-00002.gguf", "m-00001-of-00003.gguf"], "into a prefix of a bucket"),
    ],
)
def test_of_several_models_one_can_be_named(names: list[str], cure: str) -> None:
    with pytest.raises(ModelInvalidError) as caught:
        choose_files("m", names, lambda parts: None if is_part(parts[0]) else f"s3://m/{parts[0]}")
    assert cure in caught.value.termination.hint
    with pytest.raises(ModelInvalidError) as caught:
        choose_files("m", names)
    assert "give its path" in caught.value.termination.hint


def test_a_repository_names_a_model_in_parts_by_the_first() -> None:
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "n.gguf"]
    with pytest.raises(ModelInvalidError) as caught:
        choose_files("a/b", names, partial(address_on_hub, "a/b"))
    assert "spec.model.uri, such as hf://a/b/m-00001-of-00002.gguf." in caught.value.termination.hint


@pytest.mark.parametrize(
    ("only", "chosen"),
    [
        ("a-Q4_K_M.gguf", ["a-Q4_K_M.gguf"]),
        ("Q8/m-00001-of-00003.gguf", [f"Q8/{name}" for name in PARTS]),
        ("original/a.gguf", ["original/a.gguf"]),
    ],
)
def test_a_file_that_was_chosen_is_the_model_whatever_lies_beside_it(only: str, chosen: list[str]) -> None:
    beside = ["config.json", "m.safetensors", "a-Q4_K_M.gguf", "a-Q8_0.gguf", "original/a.gguf", "mmproj-a.gguf"]
    assert choose_files("m", [*beside, *(f"Q8/{name}" for name in PARTS)], only=only) == chosen


@pytest.mark.parametrize("only", ["a.gguf", f"Q8/{PARTS[1]}", "mmproj-a.gguf"])
def test_a_file_that_is_not_there_is_answered_with_those_that_are(only: str) -> None:
    with pytest.raises(ModelInvalidError, match=f"m has no GGUF model {only}") as caught:
        choose_files("m", ["a-Q8_0.gguf", "mmproj-a.gguf", *(f"Q8/{name}" for name in PARTS)], only=only)
    assert caught.value.termination.hint == f"Name one that it has: Q8/{PARTS[0]}, a-Q8_0.gguf."


@pytest.mark.parametrize(
    "name", ["/abs.json", "sub/../../../other/config.json", "..", "a//b.json", "a/./b.json", "dir/", "", "a\0.json"]
)
def test_no_source_can_name_a_file_outside_of_its_model(name: str) -> None:
    with pytest.raises(ModelInvalidError, match="no name for a file") as caught:
        RemoteFile(name=name, size_bytes=1)
    assert repr(name) in str(caught.value)
    others = ["config.json", "m.safetensors"]
    if name.endswith(".json"):
        with pytest.raises(ModelInvalidError, match="no name for a file"):
            choose_files("m", [*others, name])
    assert choose_files("m", [*others, "logs//x.txt"]) == others


def test_what_is_served_of_a_directory(tmp_path: Path) -> None:
    assert model_path(tmp_path) == tmp_path
    (tmp_path / "Q4").mkdir()
    for name in PARTS:
        (tmp_path / "Q4" / name).touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "other.gguf").touch()
    assert model_path(tmp_path) == tmp_path / "Q4" / PARTS[0]
    assert gguf_parts(tmp_path / "Q4" / PARTS[0]) == [tmp_path / "Q4" / name for name in PARTS]
    (tmp_path / "config.json").touch()
    assert model_path(tmp_path) == tmp_path

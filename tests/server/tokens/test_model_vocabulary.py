"""A model's own faults are found when it is loaded: end tokens that are none, defaults that no request could use."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import GenerationConfig

from quire_server.engine.border.validation import check_token_ids
from quire_server.shared.errors import CheckpointError
from quire_server.shared.sampling_params import SamplingParams
from quire_server.tokens.generation_defaults import read_generation_defaults
from quire_server.tokens.tokenizer import load_tokenizer

OWN_EOS = 3


@pytest.fixture
def model_dir(byte_level_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a copy of a model directory with these words in its files; the tokenizer's own end is `OWN_EOS`."""

    def build(generation: dict[str, Any], **config: Any) -> Path:
        shutil.copytree(byte_level_dir, tmp_path, dirs_exist_ok=True)
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return build


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (1000, ()),
        (999, (999,)),
        ([5, 1000, 999], (5, 999)),
        (-1, ()),
        ([-1, 5], (5,)),
        ("5", ()),
        (5.0, ()),
        (True, ()),
        ([5, None, [6]], (5,)),
    ],
)
def test_an_end_that_is_no_token_is_dropped_once(
    model_dir: Callable[..., Path], caplog: pytest.LogCaptureFixture, declared: Any, expected: tuple[int, ...]
) -> None:
    tokenizer = load_tokenizer(model_dir({"eos_token_id": declared}, vocab_size=1000))
    assert tokenizer.eos_token_ids == (OWN_EOS, *expected)
    check_token_ids("eos_token_ids", tokenizer.eos_token_ids, 1000)  # as the engine does of every request
    num_dropped = len(declared if isinstance(declared, list) else [declared]) - len(expected)
    assert sum("no answer ends by it" in record.message for record in caplog.records) == num_dropped


def test_the_end_of_config_json_is_judged_too(model_dir: Callable[..., Path]) -> None:
    assert load_tokenizer(model_dir({}, vocab_size=1000, eos_token_id=[1000, 7])).eos_token_ids == (OWN_EOS, 7)


def test_tokens_that_the_model_lacks_are_told(model_dir: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    path = model_dir({})
    num_tokens = load_tokenizer(path).vocab_size
    model_dir({}, vocab_size=num_tokens)
    load_tokenizer(path)
    assert caplog.records == []
    model_dir({}, vocab_size=num_tokens - 1)
    load_tokenizer(path)
    assert f"{num_tokens} tokens, the model {num_tokens - 1}" in caplog.records[0].message


def test_a_tokenizer_by_which_no_prompt_can_be_served_is_refused(model_dir: Callable[..., Path]) -> None:
    path = model_dir({})
    (bos, *_) = load_tokenizer(path).encode("")
    model_dir({}, vocab_size=bos)
    with pytest.raises(CheckpointError, match=f"puts token {bos} around every prompt, but the model has {bos} tokens"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "declared",
    [
        {"temperature": "x"},
        {"temperature": -1.0},
        {"temperature": True},
        {"top_p": 2},
        {"top_p": 0.0},
        {"top_p": [0.9]},
        {"top_k": 5.5},
        {"top_k": -2},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": {}},
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": "many"},
    ],
)
def test_a_default_that_no_request_could_use_is_left_out(
    model_dir: Callable[..., Path], caplog: pytest.LogCaptureFixture, declared: dict[str, Any]
) -> None:
    defaults = read_generation_defaults(model_dir(declared | {"min_p" if "top_k" in declared else "top_k": 0}))
    assert set(defaults) == {"min_p" if "top_k" in declared else "top_k"}
    SamplingParams(**defaults)
    assert ["is left out" in record.message for record in caplog.records] == [True]


def test_what_transformers_saves_is_taken(tmp_path: Path) -> None:
    values = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2}
    GenerationConfig(do_sample=True, max_new_tokens=9, **values).save_pretrained(tmp_path)
    assert read_generation_defaults(tmp_path) == values | {"max_tokens": 9}


def write_gguf(path: Path, eos_token_id: int, bos_token_id: int = 1) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
    writer.add_token_scores([0.0] * 4)
    writer.add_token_types([2, 3, 3, 1])
    writer.add_bos_token_id(bos_token_id)
    writer.add_eos_token_id(eos_token_id)
    writer.add_eot_token_id(3)
    for key, value in {"temp": 0.5, "top_p": 7.0, "penalty_repeat": 1.5}.items():
        writer.add_float32(f"general.sampling.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("eos_token_id", "expected"), [(2, (2, 3)), (4, (3,))])
def test_a_gguf_file_is_judged_alike(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, eos_token_id: int, expected: tuple[int, ...]
) -> None:
    path = write_gguf(tmp_path / "model.gguf", eos_token_id)
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(path).eos_token_ids == expected
        assert read_generation_defaults(path) == {"temperature": 0.5, "repetition_penalty": 1.5}
    assert read_generation_defaults(tmp_path) == {"temperature": 0.5, "repetition_penalty": 1.5}


def test_a_beginning_that_is_no_token_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp warns, too ("bad special token")."""
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(write_gguf(tmp_path / "model.gguf", eos_token_id=2, bos_token_id=4))
    assert tokenizer.bos_token is None
    (record,) = (record for record in caplog.records if "bos_token_id is 4" in record.message)
    assert "none of its token ids, 0 to 3" in record.message

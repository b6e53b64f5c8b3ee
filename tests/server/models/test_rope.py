"""Rotary frequencies against `transformers`, both spellings of the config, and the table that the kernel reads."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quire_server.models.modules.rope_table import RopeTable
from quire_server.models.rope import build_rope_spec, scaled_context_len
from quire_server.shared.errors import CheckpointError, UnsupportedModelError

HEAD_DIM = 32
MAX_POSITION = 512
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 16 for i in range(16)],
    "long_factor": [2.0 + i / 4 for i in range(16)],
    "original_max_position_embeddings": 128,
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "beta_fast": 16, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.5},
    LONGROPE,
]


def build_config(scaling: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITION,
        rope_parameters={"rope_theta": 5000.0} | scaling,
    )


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: str(scaling["rope_type"]))
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    config = build_config(scaling)
    spec = build_rope_spec(config.to_dict(), HEAD_DIM)
    compute = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    expected, attention_factor = compute(config, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor(spec.inv_freq), expected, atol=0, rtol=1e-5)
    assert spec.attention_factor == pytest.approx(attention_factor)
    if spec.long_inv_freq is not None:
        longest = int(MAX_POSITION * scaling.get("factor", 1))
        expected, _ = compute(config, torch.device("cpu"), seq_len=longest)
        torch.testing.assert_close(torch.tensor(spec.long_inv_freq), expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: str(scaling["rope_type"]))
def test_the_old_spelling_means_the_same(scaling: dict[str, Any]) -> None:
    new = {"max_position_embeddings": MAX_POSITION, "rope_parameters": {"rope_theta": 5000.0} | scaling}
    renamed = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    old = {"max_position_embeddings": MAX_POSITION, "rope_theta": 5000.0, "rope_scaling": renamed}
    assert build_rope_spec(old, HEAD_DIM) == build_rope_spec(new, HEAD_DIM)
    assert scaled_context_len(old) == scaled_context_len(new)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "dynamic", "factor": 2.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (SCALINGS[2], 512),
        (LONGROPE, 512),
    ],
)
def test_context_length(scaling: dict[str, Any], expected: int) -> None:
    assert scaled_context_len({"max_position_embeddings": 512, "rope_parameters": scaling}) == expected


def test_an_unknown_scaling_is_refused() -> None:
    config = {"max_position_embeddings": 512, "rope_scaling": {"type": "spiral"}}
    with pytest.raises(UnsupportedModelError, match=r"'spiral'.*llama3"):
        build_rope_spec(config, HEAD_DIM)


def test_parameters_by_layer_type_are_refused() -> None:
    config = {"max_position_embeddings": 512, "rope_parameters": {"full_attention": {"rope_theta": 5000.0}}}
    with pytest.raises(UnsupportedModelError, match="differ by layer type"):
        build_rope_spec(config, HEAD_DIM)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(CheckpointError, match="'factor'"):
        build_rope_spec({"max_position_embeddings": 512, "rope_scaling": {"type": "linear"}}, HEAD_DIM)


def test_only_a_longer_context_is_scaled_dynamically() -> None:
    config = {"max_position_embeddings": 512, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    spec = build_rope_spec(config, HEAD_DIM)
    plain = build_rope_spec({"max_position_embeddings": 512}, HEAD_DIM)
    cpu = torch.device("cpu")
    unscaled = RopeTable(plain, 512, cpu).rows
    torch.testing.assert_close(RopeTable(spec, 512, cpu).rows, unscaled)
    assert not torch.allclose(RopeTable(spec, 513, cpu).rows[:512], unscaled)


def test_the_table_grows_and_keeps_its_rows() -> None:
    spec = build_rope_spec({"max_position_embeddings": 1 << 17, "rope_parameters": SCALINGS[3]}, HEAD_DIM)
    table = RopeTable(spec, 1 << 17, torch.device("cpu"))
    first = table.rows
    assert first.shape[0] < 1 << 17
    assert table.grow(10) is first
    grown = table.grow(first.shape[0] + 1)
    assert grown.shape[0] >= 2 * first.shape[0]
    assert torch.equal(grown[: first.shape[0]], first)


def test_a_row_is_cosines_then_sines_of_the_position() -> None:
    spec = build_rope_spec({"max_position_embeddings": 512, "partial_rotary_factor": 0.5}, HEAD_DIM)
    assert spec.rotary_dim == 16
    row = RopeTable(spec, 512, torch.device("cpu")).rows[7]
    angles = 7 * torch.tensor([10000.0 ** (-i / 8) for i in range(8)])
    torch.testing.assert_close(row, torch.cat((angles.cos(), angles.sin())))

"""Blocks against gguf-py's reference, bit for bit, over every byte that a block can hold."""

import gguf
import numpy as np
import pytest
import torch

from quire_server.weights import gguf_blocks
from quire_server.weights.gguf_blocks import dequantize, is_quantized
from quire_server.weights.gguf_reader import BLOCK_TYPES

QUANTISED = sorted(block.name for block in BLOCK_TYPES.values() if block.num_elements > 1)


def random_blocks(encoding: str, num_blocks: int) -> np.ndarray:
    """Random bytes, but for the float16 scales, which are made finite."""
    block = next(block for block in BLOCK_TYPES.values() if block.name == encoding)
    rng = np.random.default_rng(7)
    blocks = rng.integers(0, 256, (num_blocks, block.num_bytes), dtype=np.uint8)
    scales = rng.normal(0, 0.1, (num_blocks, 2)).astype(np.float16).view(np.uint8)
    first, num_bytes = (208, 2) if encoding == "Q6_K" else (0, 4 if encoding[-1] in "1K" else 2)
    blocks[:, first : first + num_bytes] = scales[:, :num_bytes]
    return blocks


@pytest.mark.parametrize("encoding", QUANTISED)
def test_values_are_bit_for_bit_those_of_the_reference(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_blocks, "_CHUNK_ELEMENTS", 1000)  # several pieces, the last one short
    blocks = random_blocks(encoding, 37)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[encoding]).reshape(-1)
    values = dequantize(torch.from_numpy(blocks), encoding, torch.float32)
    assert np.array_equal(values.numpy().view(np.uint32), expected.view(np.uint32))
    rounded = dequantize(torch.from_numpy(blocks), encoding, torch.bfloat16)
    assert torch.equal(rounded, values.to(torch.bfloat16))


def test_every_block_type_has_the_size_that_ggml_gives_it() -> None:
    for type_id, block in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType(type_id)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (block.name, (block.num_elements, block.num_bytes))


def test_plain_types_are_not_quantised() -> None:
    assert not any(is_quantized(encoding) for encoding in ("F32", "F16", "BF16"))
    assert all(is_quantized(encoding) for encoding in QUANTISED)

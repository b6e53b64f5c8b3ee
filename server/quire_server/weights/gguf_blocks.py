"""ggml's quantised blocks to floating point, exactly as ggml's own reference computes them.

A block is a run of bytes: small integers, and the scales (and minima) that turn them back into numbers. Every function
takes blocks[n, block_bytes] uint8 and returns float32 values in the order of the elements. Products of a scale and an
integer are exact in float32, so no order of operations changes a result. Layouts: ggml-common.h and gguf-py's
quants.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 17
"""Work in pieces whose float32 values stay in the second-level cache."""


def dequantize(blocks: Tensor, encoding: str, dtype: torch.dtype) -> Tensor:
    """Return the values of blocks[num_blocks, block_bytes] uint8 as one flat tensor of `dtype`."""
    decode, block_elements = _DECODERS[encoding]
    num_blocks = blocks.shape[0]
    values = torch.empty((num_blocks, block_elements), dtype=dtype)
    chunk = max(1, _CHUNK_ELEMENTS // block_elements)
    for start in range(0, num_blocks, chunk):
        piece = blocks[start : start + chunk]
        values[start : start + chunk].copy_(decode(piece).view(-1, block_elements))
    return values.view(-1)


def is_quantized(encoding: str) -> bool:
    return encoding in _DECODERS


def _half(blocks: Tensor, start: int) -> Tensor:  # [n, 1] float32
    return blocks[:, start : start + 2].view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:  # [n, ..., k] uint8 -> [n, ..., 2, k] float32: low nibbles, then high
    values = torch.empty((*packed.shape[:-1], 2, packed.shape[-1]), dtype=torch.float32)
    values.select(-2, 0).copy_(packed & 15)
    values.select(-2, 1).copy_(packed >> 4)
    return values


def _bits(packed: Tensor) -> Tensor:  # [n, k] uint8 -> [n, k, 8] uint8: bit 0 first
    return (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).view(-1, 32).sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 4:]).view(-1, 32)
    return torch.addcmul(_half(blocks, 2), values, _half(blocks, 0))


def _q5_values(high_bits: Tensor, packed: Tensor) -> Tensor:
    """Join 4 low bits with a fifth: high_bits[n, 4], packed[n, 16] -> [n, 32]."""
    return _nibbles(packed).view(-1, 32).add_(_bits(high_bits).view(-1, 32), alpha=16)


def _q5_0(blocks: Tensor) -> Tensor:
    return _q5_values(blocks[:, 2:6], blocks[:, 6:]).sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    return torch.addcmul(_half(blocks, 2), _q5_values(blocks[:, 4:8], blocks[:, 8:]), _half(blocks, 0))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8) * _half(blocks, 0)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the eight 6-bit scales and minima of Q4_K and Q5_K, times d and dmin: two of [n, 8, 1] float32."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), dim=1)
    return (scales * _half(blocks, 0)).unsqueeze(2), (minima * -_half(blocks, 2)).unsqueeze(2)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _k_scales(blocks)
    values = _nibbles(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32)
    return torch.addcmul(minima, values, scales)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _k_scales(blocks)
    values = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    values.add_(_bits(blocks[:, 16:48]).transpose(1, 2), alpha=16)
    return torch.addcmul(minima, values, scales)


def _q6_k(blocks: Tensor) -> Tensor:
    scales = (blocks[:, 192:208].view(torch.int8) * _half(blocks, 208)).unsqueeze(2)  # [n, 16, 1]
    values = _nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32)
    high_bits = blocks[:, 128:192].view(-1, 2, 1, 32) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    values.add_(high_bits & 3, alpha=16).sub_(32)
    return values.view(-1, 16, 16).mul_(scales)


_DECODERS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "Q4_0": (_q4_0, 32),
    "Q4_1": (_q4_1, 32),
    "Q5_0": (_q5_0, 32),
    "Q5_1": (_q5_1, 32),
    "Q8_0": (_q8_0, 32),
    "Q4_K": (_q4_k, 256),
    "Q5_K": (_q5_k, 256),
    "Q6_K": (_q6_k, 256),
}

"""What tests and benchmarks of kernels share: one table of tolerances, and paged batches that punish a stray read.

In a batch built here blocks are shuffled, and whatever no sequence owns (the null block, the rest of a last block,
spare blocks, the block table past a sequence's end) holds NaN or an id out of range.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """As in torch.testing.assert_close."""

    rtol: float
    atol: float


TOLERANCES = {
    torch.float32: Tolerance(rtol=1e-5, atol=1e-5),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1.6e-2),
    torch.float16: Tolerance(rtol=2e-3, atol=2e-3),
}
"""By the dtype of a kernel's result, against its reference in float32 on the same inputs."""


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Assert that a kernel's result equals the reference's within the tolerance of the result's dtype."""
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance.rtol, atol=tolerance.atol)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """The arguments of `paged_attention`, and what each sequence's keys and values are when laid out contiguously."""

    query: Tensor  # [num_tokens, num_heads, head_dim]
    key_cache: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    block_table: Tensor  # [num_seqs, max_blocks_per_seq] int32
    query_start_loc: Tensor  # [num_seqs + 1] int32
    seq_lens: Tensor  # [num_seqs] int32
    keys: list[Tensor]  # each [seq_len, num_kv_heads, head_dim]
    values: list[Tensor]  # each [seq_len, num_kv_heads, head_dim]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the positional arguments of `paged_attention`."""
        return (
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_table,
            self.query_start_loc,
            self.seq_lens,
        )

    def in_float32(self) -> "PagedBatch":
        """Return the same batch with the same numbers in float32, for the reference."""
        return PagedBatch(
            query=self.query.float(),
            key_cache=self.key_cache.float(),
            value_cache=self.value_cache.float(),
            block_table=self.block_table,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            keys=[key.float() for key in self.keys],
            values=[value.float() for value in self.values],
        )


def build_paged_batch(
    lens: Sequence[tuple[int, int]],  # (query_len, seq_len) of each sequence
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    num_spare_blocks: int = 3,
    seed: int = 0,
) -> PagedBatch:
    """Build a random batch in a poisoned, shuffled cache."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    num_blocks_of = [-(-seq_len // block_size) for _, seq_len in lens]
    num_blocks = 1 + sum(num_blocks_of) + num_spare_blocks
    key_cache, value_cache = build_poisoned_caches(num_blocks, block_size, num_kv_heads, head_dim, dtype)
    block_table = torch.full((len(lens), max(num_blocks_of, default=1)), num_blocks, dtype=torch.int32)
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    keys, values = [], []
    for row, (_, seq_len) in enumerate(lens):
        blocks = torch.tensor([free.pop() for _ in range(num_blocks_of[row])], dtype=torch.int64)
        block_table[row, : len(blocks)] = blocks
        positions = torch.arange(seq_len)
        keys.append(random(seq_len, num_kv_heads, head_dim))
        values.append(random(seq_len, num_kv_heads, head_dim))
        key_cache[blocks[positions // block_size], positions % block_size] = keys[-1]
        value_cache[blocks[positions // block_size], positions % block_size] = values[-1]
    query_lens = [query_len for query_len, _ in lens]
    return PagedBatch(
        query=random(sum(query_lens), num_heads, head_dim),
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=block_table,
        query_start_loc=torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32),
        seq_lens=torch.tensor([seq_len for _, seq_len in lens], dtype=torch.int32),
        keys=keys,
        values=values,
    )


def build_poisoned_caches(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a key and a value cache full of NaN."""
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    return torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)


def build_cos_sin_cache(max_position: int, rotary_dim: int, theta: float = 10000.0) -> Tensor:
    """Return [max_position, rotary_dim] float32 in the layout that `rope_and_cache` reads."""
    inv_freq = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(max_position, dtype=torch.float64)[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def replace_arguments(arguments: tuple[Any, ...], index: int, value: object) -> tuple[Any, ...]:
    """Return the arguments with one of them replaced, for tests of what is refused."""
    return (*arguments[:index], value, *arguments[index + 1 :])

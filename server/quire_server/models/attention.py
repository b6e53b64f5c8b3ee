"""What attention is called with: where tokens sit, and where their keys and values live.

The seam between whoever makes a step (the runner) and whatever attends (`modules/`). Knows neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class KVCache(NamedTuple):
    """The cached keys and values of one layer. The runner owns the memory; a forward pass writes to it."""

    key: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    value: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """Where the tokens of one step sit. Sequences follow one another; prefills and decodes mix freely."""

    query_start_loc: Tensor  # [num_seqs + 1] int32
    seq_lens: Tensor  # [num_seqs] int32, all tokens with keys and values after this step
    block_table: Tensor  # [num_seqs, max_blocks_per_seq] int32
    slot_mapping: Tensor  # [num_tokens] int64, block * block_size + offset; -1: not written
    max_seq_len: int | None = None
    """At least the largest of `seq_lens`, where the host knows it without asking the device."""


class StepContext(NamedTuple):
    """What every layer of one step shares."""

    positions: Tensor  # [num_tokens] int64
    cos_sin_caches: Sequence[Tensor | None]  # each [max_position, rotary_dim] float32; the first is None: no rotation
    metadata: AttentionMetadata

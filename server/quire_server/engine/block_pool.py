"""The KV cache's blocks: who may use which, and what a block that nobody uses still remembers.

Owns every `KVCacheBlock`, the free list and the prefix-cache index (block hash → block). Does not know requests, block
tables, or where a block's bytes are; "block" here is a number and its bookkeeping. Every operation is O(1) per block.

Invariants (checked by `check_integrity`):
* free + held = total: each block but the null block is in the free list exactly when its `ref_count` is 0.
* `ref_count` counts holders: one per block table that contains the block, one per pin of whoever uses it from outside.
* The null block (0) stands for "nothing to read here". It is never allocated, freed, hashed or counted.
* The index holds a block under its `block_hash` and nothing else; a hash names at most one block. A second block with
  the same contents stays without a hash, and so is reused first.
* The free list is the eviction order. Blocks without a hash are reused before any block that could still be hit, and
  of those the least recently freed first. A holder frees its blocks from the tail: a sequence loses its end first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NewType

import msgspec

BlockHash = NewType("BlockHash", bytes)
ExtraKeys = tuple[str | bytes | int, ...]

NULL_BLOCK_ID = 0

# Fixed, so that a block has the same name in every replica and after a restart.
ROOT_HASH = BlockHash(sha256(b"quire.block.v1").digest())

_encode = msgspec.msgpack.Encoder().encode


def hash_block(parent: BlockHash, token_ids: Sequence[int], extra_keys: ExtraKeys = ()) -> BlockHash:
    """Name a full block by all that its KV depends on: every token up to its end, and whatever else shapes it.

    Args:
        parent: hash of the block before it, `ROOT_HASH` for the first one.
        extra_keys: what makes equal tokens differ, such as an adapter, an image or a cache salt.
    """
    return BlockHash(sha256(_encode((parent, token_ids, extra_keys))).digest())


@dataclass(slots=True, eq=False)
class KVCacheBlock:
    """One block's bookkeeping. Only the pool writes to it."""

    block_id: int
    ref_count: int = 0
    num_pins: int = 0
    """The part of `ref_count` that is due to somebody outside, such as a block copy in flight."""
    block_hash: BlockHash | None = None
    prev_free: "KVCacheBlock | None" = None
    next_free: "KVCacheBlock | None" = None


class FreeBlockList:
    """A doubly linked list threaded through the blocks themselves: O(1) at both ends and in the middle."""

    def __init__(self) -> None:
        self.num_blocks = 0
        self._head = KVCacheBlock(-1)
        self._tail = KVCacheBlock(-1)
        self._head.next_free = self._tail
        self._tail.prev_free = self._head

    def pop_first(self) -> KVCacheBlock:
        block = self._head.next_free
        assert block is not None
        assert block is not self._tail, "no free block"
        self.remove(block)
        return block

    def prepend(self, block: KVCacheBlock) -> None:
        first = self._head.next_free
        assert first is not None
        self._insert(self._head, block, first)

    def append(self, block: KVCacheBlock) -> None:
        last = self._tail.prev_free
        assert last is not None
        self._insert(last, block, self._tail)

    def remove(self, block: KVCacheBlock) -> None:
        before, after = block.prev_free, block.next_free
        assert before is not None, f"block {block.block_id} is not free"
        assert after is not None
        before.next_free = after
        after.prev_free = before
        block.prev_free = block.next_free = None
        self.num_blocks -= 1

    def to_list(self) -> list[KVCacheBlock]:
        """Return the free blocks in the order in which they will be reused. O(num_blocks): for checks."""
        blocks = []
        block = self._head.next_free
        while block is not None and block is not self._tail:
            blocks.append(block)
            block = block.next_free
        return blocks

    def _insert(self, before: KVCacheBlock, block: KVCacheBlock, after: KVCacheBlock) -> None:
        assert block.next_free is None, f"block {block.block_id} is already free"
        block.prev_free = before
        block.next_free = after
        before.next_free = block
        after.prev_free = block
        self.num_blocks += 1


class BlockPool:
    """Hands out blocks and takes them back. See the module for the invariants."""

    def __init__(self, num_blocks: int) -> None:
        """Make `num_blocks` blocks, the null block among them."""
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (block 0 is reserved), got {num_blocks}")
        self._blocks = [KVCacheBlock(block_id) for block_id in range(num_blocks)]
        self.null_block = self._blocks[NULL_BLOCK_ID]
        self._hash_to_block: dict[BlockHash, KVCacheBlock] = {}
        self.num_pins = 0
        """Of all blocks together."""
        self._free = FreeBlockList()
        for block in self._blocks[1:]:
            self._free.append(block)

    @property
    def num_total(self) -> int:
        """Blocks that can be allocated: all but the null block."""
        return len(self._blocks) - 1

    @property
    def num_free(self) -> int:
        return self._free.num_blocks

    @property
    def usage(self) -> float:
        """Share of blocks that are held, 0 to 1."""
        return 1.0 - self.num_free / self.num_total

    def allocate(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take free blocks for one new holder each, evicting what they remember. The caller has checked `num_free`."""
        blocks = [self._free.pop_first() for _ in range(num_blocks)]
        for block in blocks:
            self._forget(block)
            block.ref_count = 1
        return blocks

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Add one holder to each block, held or free."""
        for block in blocks:
            assert block is not self.null_block
            if block.ref_count == 0:
                self._free.remove(block)
            block.ref_count += 1

    def free(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Take one holder off each block, in the order given: tail of the sequence first."""
        for block in blocks:
            assert block.ref_count > 0, f"block {block.block_id} is freed more often than held"
            block.ref_count -= 1
            if block.ref_count > 0:
                continue
            if block.block_hash is None:
                self._free.prepend(block)
            else:
                self._free.append(block)

    def pin(self, block: KVCacheBlock) -> None:
        """Keep a block, whoever lets go of it, until `unpin`: an end of a block copy that has not run yet, say."""
        self.touch((block,))
        block.num_pins += 1
        self.num_pins += 1

    def unpin(self, block_id: int) -> None:
        block = self._blocks[block_id]
        assert block.num_pins > 0, f"block {block_id} is not pinned"
        block.num_pins -= 1
        self.num_pins -= 1
        self.free((block,))

    def find(self, block_hash: BlockHash) -> KVCacheBlock | None:
        """Return the block that holds these contents, held or free. To be touched before anything is allocated."""
        return self._hash_to_block.get(block_hash)

    def cache(self, block: KVCacheBlock, block_hash: BlockHash) -> None:
        """Make a held, full block findable. It must not be written again while it has its hash."""
        assert block.ref_count > 0
        if self._hash_to_block.setdefault(block_hash, block) is block:
            assert block.block_hash in (None, block_hash)
            block.block_hash = block_hash

    def reset_prefix_cache(self) -> None:
        """Forget all contents. Held blocks stay held."""
        for block in self._hash_to_block.values():
            block.block_hash = None
        self._hash_to_block.clear()

    def check_integrity(self) -> None:
        """Assert the invariants that the pool can see alone. O(num_blocks)."""
        free_blocks = self._free.to_list()
        free_ids = {block.block_id for block in free_blocks}
        assert len(free_blocks) == len(free_ids) == self.num_free
        assert NULL_BLOCK_ID not in free_ids
        assert self.null_block.ref_count == 0
        assert self.null_block.block_hash is None
        for block in self._blocks[1:]:
            assert (block.ref_count == 0) == (block.block_id in free_ids), f"block {block.block_id}"
            assert block.ref_count >= block.num_pins >= 0
        assert self.num_pins == sum(block.num_pins for block in self._blocks)
        hashed = {block.block_hash: block for block in self._blocks if block.block_hash is not None}
        assert hashed == self._hash_to_block

    def held_blocks(self) -> list[KVCacheBlock]:
        """Return every block that has a holder. O(num_blocks): for checks."""
        return [block for block in self._blocks if block.ref_count > 0]

    def _forget(self, block: KVCacheBlock) -> None:
        if block.block_hash is not None:
            del self._hash_to_block[block.block_hash]
            block.block_hash = None

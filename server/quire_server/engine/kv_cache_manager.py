"""Which blocks each request holds, and what of its tokens is already in the cache.

Owns one block table per admitted request, the naming of full blocks for the prefix cache, the freeing of blocks that a
sliding window has left behind, and copy-on-write after a fork. Does not know budgets, queues, priorities or the runner;
it never decides who gives way when blocks are short, it only says that they are (None).

Invariants (checked by `check_integrity`):
* A block's `ref_count` is the number of tables that contain it plus its pins.
* A table has at least ceil(computed tokens / block_size) entries and only grows: the runner is told what is appended.
  Entries that the sliding window has passed become the null block here; the runner keeps the ids and never reads them.
* A block is written by one table. Tables share a block when it is full with the same tokens; or when it is the partial
  last block of a fork, which the child only borrows: it has never been written to, and its first write copies it
  (unless nobody else is left to be disturbed, and the block is then the child's own).
* Both ends of a block copy are pinned from the moment it is planned until `finish_block_copies`, and blocks whose free
  was deferred until `finish_free`: somebody outside still reads or writes them (a swap, a transfer to another replica).
* Only tokens that are known name a block: neither drafts, which may be rejected, nor what a step in flight samples.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from quire_contract.memory.kv_cache import KVCacheSpec
from quire_server.engine.block_pool import ROOT_HASH, BlockPool, ExtraKeys, KVCacheBlock, hash_block
from quire_server.engine.request import Request
from quire_server.engine.step import BlockCopy


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheParams:
    """The numbers that shape the cache."""

    num_blocks: int
    """Blocks of the KV tensors, the reserved block 0 among them."""
    block_size: int
    max_num_batched_tokens: int
    """Most tokens that one request can be given in one step."""
    kv_cache: KVCacheSpec
    """What is kept of the whole model: it says behind which window blocks are let go, and how many a request holds."""
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """The part of a request that the cache already holds. Valid until the next call that changes the manager."""

    num_tokens: int = 0
    _blocks: Sequence[KVCacheBlock] = ()
    _num_null_blocks: int = 0


NO_PREFIX = CachedPrefix()


class DeferredFree(NamedTuple):
    """Blocks of a request that has gone, and that somebody outside has not done with yet."""

    blocks: Sequence[KVCacheBlock]


@dataclass(slots=True)
class _BlockTable:
    blocks: list[KVCacheBlock] = field(default_factory=list)
    num_null_blocks: int = 0
    """Leading entries that are the null block."""
    num_cached_blocks: int = 0
    """Leading full blocks that have been offered to the prefix cache."""
    is_cacheable: bool = True
    has_borrowed_tail: bool = False
    """The last block belongs to the request that this one was forked from."""

    @property
    def live_blocks(self) -> list[KVCacheBlock]:
        return self.blocks[self.num_null_blocks :]


class KVCacheManager:
    """Gives requests their blocks. See the module for the invariants."""

    def __init__(self, params: KVCacheParams) -> None:
        self._block_size = params.block_size
        self._params = params
        self._sliding_window = params.kv_cache.uniform_window
        self._enable_prefix_caching = params.enable_prefix_caching
        self._pool = BlockPool(params.num_blocks)
        self._tables: dict[str, _BlockTable] = {}
        self._block_copies: list[BlockCopy] = []

    # Room

    @property
    def usage(self) -> float:
        """Share of blocks that are held, 0 to 1."""
        return self._pool.usage

    @property
    def num_total_blocks(self) -> int:
        return self._pool.num_total

    @property
    def capacity_tokens(self) -> int:
        """Tokens whose KV fits into the whole cache."""
        return self._pool.num_total * self._block_size

    def fits_alone(self, num_tokens: int) -> bool:
        """Say whether a request of `num_tokens` could run if it had the cache for itself."""
        return self._max_held_blocks(num_tokens) <= self._pool.num_total

    def num_missing_blocks(self, request: Request) -> int:
        """Return how many more blocks an admitted request needs for the tokens that it has now."""
        table = self._tables[request.request_id]
        return max(0, self._max_held_blocks(request.num_tokens) - len(table.blocks) + table.num_null_blocks)

    def can_admit(self, request: Request, prefix: CachedPrefix, num_reserved_blocks: int) -> bool:
        """Say whether all of a waiting request's tokens fit, with `num_reserved_blocks` left free for others."""
        num_held = len(prefix._blocks) - prefix._num_null_blocks
        num_needed = max(0, self._max_held_blocks(request.num_tokens) - num_held) + self._num_revived(prefix)
        return num_needed + num_reserved_blocks <= self._pool.num_free

    def fits_beside(
        self, request: Request, prefix: CachedPrefix, others: Iterable[Request], num_reserved_blocks: int
    ) -> bool:
        """Say whether all of a waiting request's tokens would fit if nobody but `others` held blocks."""
        held = {block.block_id for other in others for block in self._tables[other.request_id].live_blocks}
        num_shared = sum(block.block_id in held for block in prefix._blocks[prefix._num_null_blocks :])
        num_unavailable = len(held) + num_reserved_blocks + self._pool.num_pins
        return self._max_held_blocks(request.num_tokens) - num_shared + num_unavailable <= self._pool.num_total

    # Allocation

    def find_cached_prefix(self, request: Request) -> CachedPrefix:
        """Find the longest run of full blocks, from the first token on, whose KV the cache can still serve.

        At least the last token is left to compute, because its logits are wanted. With a sliding window only the blocks
        that the next token sees have to be there; the ones before are null.
        """
        if not self._enable_prefix_caching:
            return NO_PREFIX
        max_blocks = (request.num_tokens - 1) // self._block_size
        self._extend_hashes(request, max_blocks)
        if self._sliding_window is None:
            return self._find_from_start(request, max_blocks)
        return self._find_window(request, max_blocks, self._sliding_window)

    def allocate(self, request: Request, num_new_tokens: int, prefix: CachedPrefix = NO_PREFIX) -> Sequence[int] | None:
        """Make room for a request's next tokens.

        Args:
            num_new_tokens: tokens to compute after `num_computed_tokens` (or, without a table yet, after `prefix`).

        Returns:
            The block ids appended to its table, the prefix's among them, or None if there are too few free blocks; the
            request then holds what it held before. The caller owns them until `free`.
        """
        table = self._tables.get(request.request_id)
        if table is None:
            return self._allocate_first(request, prefix.num_tokens + num_new_tokens, prefix)
        if self._sliding_window is not None:
            self._free_out_of_window(table, request.num_computed_tokens, self._sliding_window)
        num_new_blocks = self._num_blocks(request.num_computed_tokens + num_new_tokens) - len(table.blocks)
        if table.has_borrowed_tail:
            if num_new_blocks + self._needs_copy(table) > self._pool.num_free:
                return None
            self._take_over_tail(table)
        if num_new_blocks <= 0:
            return ()
        if num_new_blocks > self._pool.num_free:
            return None
        new_blocks = self._pool.allocate(num_new_blocks)
        table.blocks += new_blocks
        return [block.block_id for block in new_blocks]

    def cache_full_blocks(self, request: Request) -> None:
        """Offer the blocks that computed and known tokens fill to the prefix cache.

        To be called only when nothing can stop the step that computes them any more.
        """
        table = self._tables[request.request_id]
        num_full_blocks = min(request.num_computed_tokens, request.num_tokens) // self._block_size
        if num_full_blocks <= table.num_cached_blocks or not (self._enable_prefix_caching and table.is_cacheable):
            return
        self._extend_hashes(request, num_full_blocks)
        # A block may leave the window before the last of its tokens is known.
        for index in range(max(table.num_cached_blocks, table.num_null_blocks), num_full_blocks):
            self._pool.cache(table.blocks[index], request.block_hashes[index])
        table.num_cached_blocks = num_full_blocks

    def block_ids(self, request: Request) -> list[int]:
        """Return a request's whole block table."""
        return [block.block_id for block in self._tables[request.request_id].blocks]

    def free(self, request: Request) -> None:
        """Take back all blocks of a request; one that holds none is fine. What they hold can still be hit."""
        table = self._tables.pop(request.request_id, None)
        if table is not None:
            self._pool.free(reversed(table.live_blocks))

    def defer_free(self, request: Request) -> DeferredFree:
        """Take a request's table away, but keep its blocks until `finish_free`. What they hold can still be hit."""
        table = self._tables.pop(request.request_id, None)
        blocks = [] if table is None else table.live_blocks
        for block in blocks:
            self._pool.pin(block)
        self._pool.free(blocks)
        return DeferredFree(blocks)

    def finish_free(self, deferred: DeferredFree) -> None:
        """Take back blocks that nobody outside uses any more."""
        for block in reversed(deferred.blocks):
            self._pool.unpin(block.block_id)

    def reset_prefix_cache(self) -> None:
        """Let no request find what was computed before now.

        Requests that are running go on, but name no more blocks: theirs rest on the KV that is to be forgotten.
        """
        self._pool.reset_prefix_cache()
        for table in self._tables.values():
            table.is_cacheable = False

    # Copy-on-write

    def fork(self, parent: Request, child: Request) -> None:
        """Give `child` the KV of `parent`, of which it is a copy so far, without copying any.

        A partial last block stays the parent's to write to; the child copies it when it is about to write.
        """
        assert child.request_id not in self._tables
        assert child.num_computed_tokens == parent.num_computed_tokens
        source = self._tables[parent.request_id]
        num_tokens = parent.num_computed_tokens
        num_full_blocks = num_tokens // self._block_size
        table = _BlockTable(
            blocks=source.blocks[: self._num_blocks(num_tokens)],
            num_null_blocks=source.num_null_blocks,
            num_cached_blocks=min(source.num_cached_blocks, num_full_blocks),
            is_cacheable=source.is_cacheable,
            has_borrowed_tail=num_tokens % self._block_size != 0,
        )
        child.block_hashes[:] = parent.block_hashes[:num_full_blocks]
        self._pool.touch(table.live_blocks)
        self._tables[child.request_id] = table

    def take_block_copies(self) -> list[BlockCopy]:
        """Return the copies to run before this step's model. The step's end is told by `finish_block_copies`."""
        block_copies, self._block_copies = self._block_copies, []
        return block_copies

    def finish_block_copies(self, block_copies: Iterable[BlockCopy]) -> None:
        """Let go of both ends of copies that have run."""
        for block_copy in block_copies:
            self._pool.unpin(block_copy.src)
            self._pool.unpin(block_copy.dst)

    # Checks

    def check_integrity(self) -> None:
        """Assert the invariants. O(blocks and table entries)."""
        self._pool.check_integrity()
        holders: Counter[int] = Counter()
        for table in self._tables.values():
            live_ids = [block.block_id for block in table.live_blocks]
            assert len(set(live_ids)) == len(live_ids)
            holders.update(live_ids)
            assert all(block is self._pool.null_block for block in table.blocks[: table.num_null_blocks])
        num_held_by_tables = {b.block_id: n for b in self._pool.held_blocks() if (n := b.ref_count - b.num_pins) > 0}
        assert dict(holders) == num_held_by_tables

    # Inside

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _max_held_blocks(self, num_tokens: int) -> int:
        """Return the most blocks that a request of `num_tokens` holds at any one time."""
        return self._params.kv_cache.max_held_blocks(
            num_tokens,
            block_size=self._block_size,
            max_num_batched_tokens=self._params.max_num_batched_tokens,
        )

    def _num_revived(self, prefix: CachedPrefix) -> int:
        """Return how many of a prefix's blocks are in the free list and will leave it."""
        return sum(block.ref_count == 0 for block in prefix._blocks[prefix._num_null_blocks :])

    def _allocate_first(self, request: Request, num_tokens: int, prefix: CachedPrefix) -> Sequence[int] | None:
        num_new_blocks = self._num_blocks(num_tokens) - len(prefix._blocks)
        if num_new_blocks + self._num_revived(prefix) > self._pool.num_free:
            return None
        self._pool.touch(prefix._blocks[prefix._num_null_blocks :])
        table = _BlockTable(
            blocks=[*prefix._blocks, *self._pool.allocate(num_new_blocks)],
            num_null_blocks=prefix._num_null_blocks,
            num_cached_blocks=len(prefix._blocks),
        )
        self._tables[request.request_id] = table
        return [block.block_id for block in table.blocks]

    def _first_visible_block(self, num_computed_tokens: int, sliding_window: int) -> int:
        """Return the index of the first block that the token at position `num_computed_tokens` sees."""
        return max(0, num_computed_tokens - sliding_window + 1) // self._block_size

    def _free_out_of_window(self, table: _BlockTable, num_computed_tokens: int, sliding_window: int) -> None:
        first = self._first_visible_block(num_computed_tokens, sliding_window)
        if first <= table.num_null_blocks:
            return
        self._pool.free(reversed(table.blocks[table.num_null_blocks : first]))
        table.blocks[table.num_null_blocks : first] = [self._pool.null_block] * (first - table.num_null_blocks)
        table.num_null_blocks = first

    def _find_from_start(self, request: Request, max_blocks: int) -> CachedPrefix:
        blocks = []
        for block_hash in request.block_hashes[:max_blocks]:
            block = self._pool.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        return CachedPrefix(len(blocks) * self._block_size, blocks)

    def _find_window(self, request: Request, max_blocks: int, sliding_window: int) -> CachedPrefix:
        """Walk back from the end until the blocks in a row cover what the token after them sees."""
        found: list[KVCacheBlock] = []
        for index in range(max_blocks - 1, -1, -1):
            block = self._pool.find(request.block_hashes[index])
            if block is None:
                found.clear()
                continue
            found.append(block)
            num_blocks = index + len(found)
            first = self._first_visible_block(num_blocks * self._block_size, sliding_window)
            if index <= first:
                blocks = [self._pool.null_block] * first + found[::-1][first - index :]
                return CachedPrefix(num_blocks * self._block_size, blocks, first)
        return NO_PREFIX

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        """Hash the full blocks that have no hash yet, up to `num_blocks`."""
        hashes, size = request.block_hashes, self._block_size
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else ROOT_HASH
            token_ids = request.token_ids[index * size : (index + 1) * size]
            hashes.append(hash_block(parent, token_ids, _extra_keys(request, index)))

    def _needs_copy(self, table: _BlockTable) -> bool:
        tail = table.blocks[-1]
        return tail.ref_count - tail.num_pins > 1 or tail.block_hash is not None

    def _take_over_tail(self, table: _BlockTable) -> None:
        """Make a borrowed last block the table's own: copy it, unless nobody else reads it."""
        if self._needs_copy(table):
            tail = table.blocks[-1]
            (own,) = self._pool.allocate(1)
            table.blocks[-1] = own
            self._pool.pin(tail)
            self._pool.pin(own)
            self._block_copies.append(BlockCopy(tail.block_id, own.block_id))
            self._pool.free((tail,))
        table.has_borrowed_tail = False


def _extra_keys(request: Request, block_index: int) -> ExtraKeys:
    """Return what else a block's KV, or who may share it, depends on. Later blocks inherit it through their parent."""
    if block_index > 0 or request.cache_salt is None:
        return ()
    return ("salt", request.cache_salt)

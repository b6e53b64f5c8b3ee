import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire_server.engine.block_pool import NULL_BLOCK_ID, ROOT_HASH, BlockHash, BlockPool, hash_block


def name(number: int) -> BlockHash:
    return hash_block(ROOT_HASH, [number])


def ids(blocks) -> list[int]:
    return [block.block_id for block in blocks]


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(4)
    assert NULL_BLOCK_ID not in ids(pool.allocate(pool.num_total))
    assert (pool.num_total, pool.num_free, pool.usage) == (3, 0, 1.0)


def test_a_pool_of_the_null_block_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        BlockPool(1)


def test_allocating_from_an_empty_pool_fails_loudly() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="no free block"):
        pool.allocate(1)


def test_a_block_freed_twice_fails_loudly() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.free(blocks)


def test_blocks_without_a_hash_are_reused_before_blocks_that_can_be_hit() -> None:
    pool = BlockPool(5)
    hashed, plain, *_ = pool.allocate(4)
    pool.cache(hashed, name(1))
    pool.free([hashed, plain])
    assert pool.allocate(1) == [plain]


def test_the_least_recently_freed_of_the_hashed_blocks_is_evicted_first() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    for number, block in enumerate(blocks):
        pool.cache(block, name(number))
    pool.free([blocks[2], blocks[0], blocks[1]])
    assert ids(pool.allocate(3)) == ids([blocks[2], blocks[0], blocks[1]])
    assert [pool.find(name(number)) for number in range(3)] == [None] * 3


def test_a_freed_block_can_be_hit_until_it_is_reused() -> None:
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.cache(block, name(1))
    pool.free([block])
    found = pool.find(name(1))
    assert found is block
    pool.touch([found])
    assert (block.ref_count, pool.num_free) == (1, 1)


def test_touching_a_free_block_in_the_middle_keeps_the_order_of_the_others() -> None:
    pool = BlockPool(6)
    blocks = pool.allocate(5)
    for number, block in enumerate(blocks):
        pool.cache(block, name(number))
    pool.free(blocks)
    pool.touch([blocks[2]])
    assert ids(pool.allocate(4)) == ids([blocks[0], blocks[1], blocks[3], blocks[4]])


def test_a_second_block_with_the_same_contents_stays_without_a_hash() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.cache(first, name(1))
    pool.cache(second, name(1))
    assert pool.find(name(1)) is first
    assert second.block_hash is None
    pool.check_integrity()


def test_a_pinned_block_outlives_its_holder() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.pin(block)
    pool.free([block])
    assert pool.num_free == 0
    pool.unpin(block.block_id)
    assert pool.num_free == 1


def test_reset_forgets_contents_and_keeps_holders() -> None:
    pool = BlockPool(4)
    held, free = pool.allocate(2)
    pool.cache(held, name(1))
    pool.cache(free, name(2))
    pool.free([free])
    pool.reset_prefix_cache()
    assert pool.find(name(1)) is None
    assert pool.find(name(2)) is None
    assert pool.held_blocks() == [held]
    pool.check_integrity()


@pytest.mark.parametrize(
    ("other_parent", "other_tokens", "other_keys"),
    [
        pytest.param(name(7), [1, 2], (), id="another parent"),
        pytest.param(ROOT_HASH, [1, 3], (), id="another token"),
        pytest.param(ROOT_HASH, [2, 1], (), id="another order"),
        pytest.param(ROOT_HASH, [1, 2, 2], (), id="another length"),
        pytest.param(ROOT_HASH, [1, 2], ("salt", "x"), id="a salt"),
        pytest.param(ROOT_HASH, [1, 2], (1,), id="a number as key"),
    ],
)
def test_a_hash_tells_apart(other_parent, other_tokens, other_keys) -> None:
    assert hash_block(ROOT_HASH, [1, 2]) != hash_block(other_parent, other_tokens, other_keys)


def test_a_hash_tells_the_types_of_extra_keys_apart() -> None:
    keys = [("1",), (b"1",), (1,), ("1", ""), ()]
    assert len({hash_block(ROOT_HASH, [1], key) for key in keys}) == len(keys)


def test_hashes_are_the_same_in_another_process() -> None:
    code = (
        "from quire_server.engine.block_pool import *; print(hash_block(ROOT_HASH, [1, 2, 70000], ('salt', 'x')).hex())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == hash_block(ROOT_HASH, [1, 2, 70000], ("salt", "x")).hex()


class BlockPoolMachine(RuleBasedStateMachine):
    """The pool against lists: `free` in the order of reuse, `holders` and `names` by block id."""

    @initialize(num_blocks=st.integers(2, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.blocks = {block.block_id: block for block in self.pool._blocks}
        self.free = list(range(1, num_blocks))
        self.holders: dict[int, int] = {}
        self.pins: dict[int, int] = {}
        self.names: dict[int, int] = {}

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        num_blocks = data.draw(st.integers(0, len(self.free)))
        blocks = self.pool.allocate(num_blocks)
        expected, self.free = self.free[:num_blocks], self.free[num_blocks:]
        assert ids(blocks) == expected
        for block_id in expected:
            self.names.pop(block_id, None)
            self.holders[block_id] = 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), number=st.integers(0, 5))
    def cache(self, data: st.DataObject, number: int) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.holders)))
        if block_id in self.names:
            number = self.names[block_id]
        self.pool.cache(self.blocks[block_id], name(number))
        if number not in self.names.values():
            self.names[block_id] = number

    @rule(number=st.integers(0, 5))
    def hit(self, number: int) -> None:
        block = self.pool.find(name(number))
        expected = [block_id for block_id, other in self.names.items() if other == number]
        assert (ids([block]) if block else []) == expected
        if block is not None:
            self.pool.touch([block])
            self._hold(block.block_id)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.holders)))
        self.pool.pin(self.blocks[block_id])
        self.pins[block_id] = self.pins.get(block_id, 0) + 1
        self._hold(block_id)

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(b for b, pins in self.pins.items() if pins)))
        self.pool.unpin(block_id)
        self.pins[block_id] -= 1
        self._let_go(block_id)

    @precondition(lambda self: any(n > self.pins.get(b, 0) for b, n in self.holders.items()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(b for b, n in self.holders.items() if n > self.pins.get(b, 0))))
        self.pool.free([self.blocks[block_id]])
        self._let_go(block_id)

    def _let_go(self, block_id: int) -> None:
        self.holders[block_id] -= 1
        if self.holders[block_id] == 0:
            del self.holders[block_id]
            self.free.insert(len(self.free) if block_id in self.names else 0, block_id)

    @rule()
    def reset(self) -> None:
        self.pool.reset_prefix_cache()
        self.names.clear()

    def _hold(self, block_id: int) -> None:
        if block_id in self.free:
            self.free.remove(block_id)
        self.holders[block_id] = self.holders.get(block_id, 0) + 1

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check_integrity()
        assert ids(self.pool._free.to_list()) == self.free
        assert {block.block_id: block.ref_count for block in self.pool.held_blocks()} == self.holders
        assert self.pool.num_free + len(self.holders) == self.pool.num_total


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=100, stateful_step_count=40)

"""A request and its copies share blocks until they write."""

import pytest
from engine_fakes import append, compute, make_manager, make_request

from quire_server.engine.kv_cache_manager import KVCacheManager
from quire_server.engine.request import Request
from quire_server.engine.step import BlockCopy


class TestFork:
    def fork(self, manager: KVCacheManager, parent: Request, child_id: str, *token_ids: int) -> Request:
        child = make_request(child_id, [*parent.token_ids[: parent.num_computed_tokens], *token_ids])
        child.num_computed_tokens = parent.num_computed_tokens
        manager.fork(parent, child)
        manager.check_integrity()
        return child

    def test_a_fork_takes_no_block(self) -> None:
        manager = make_manager(block_size=4)
        parent = make_request("a", range(6))
        compute(manager, parent)
        usage = manager.usage
        child = self.fork(manager, parent, "b", 7)
        assert manager.usage == usage
        assert manager.block_ids(child) == manager.block_ids(parent)

    def test_the_childs_first_write_copies_the_partial_block(self) -> None:
        manager = make_manager(block_size=4)
        parent = make_request("a", range(6))
        compute(manager, parent)
        child = self.fork(manager, parent, "b", 7)
        assert compute(manager, child) == ()
        (shared, src), (also_shared, dst) = manager.block_ids(parent), manager.block_ids(child)
        assert shared == also_shared
        assert src != dst
        assert manager.take_block_copies() == [BlockCopy(src, dst)]
        assert manager.take_block_copies() == []

    def test_after_its_copy_a_child_writes_to_its_own_blocks(self) -> None:
        manager = make_manager(block_size=4)
        parent = make_request("a", range(6))
        compute(manager, parent)
        child = self.fork(manager, parent, "b", 7)
        for token_id in range(4):
            compute(manager, child)
            append(child, token_id)
        assert len(manager.take_block_copies()) == 1

    def test_a_fork_of_what_was_reset_is_not_cached_either(self) -> None:
        manager = make_manager(block_size=4)
        parent = make_request("a", range(6))
        compute(manager, parent)
        manager.reset_prefix_cache()
        compute(manager, self.fork(manager, parent, "b", 6, 7))
        compute(manager, make_request("c", range(5)))
        assert manager.find_cached_prefix(make_request("d", range(9))).num_tokens == 4

    def test_the_parent_writes_in_place(self) -> None:
        manager = make_manager(block_size=4)
        parent = make_request("a", range(6))
        compute(manager, parent)
        before = manager.block_ids(parent)
        self.fork(manager, parent, "b", 7)
        append(parent, 8)
        compute(manager, parent)
        assert manager.block_ids(parent) == before
        assert manager.take_block_copies() == []

    def test_a_fork_at_the_end_of_a_block_copies_nothing(self) -> None:
        manager = make_manager(block_size=4)
        parent = make_request("a", range(8))
        compute(manager, parent)
        child = self.fork(manager, parent, "b", 7)
        compute(manager, child)
        assert manager.take_block_copies() == []
        assert manager.block_ids(child)[:2] == manager.block_ids(parent)

    def test_the_last_reader_of_a_partial_block_writes_in_place(self) -> None:
        manager = make_manager(block_size=4)
        parent = make_request("a", range(6))
        compute(manager, parent)
        children = [self.fork(manager, parent, child_id, 7) for child_id in "bc"]
        manager.free(parent)
        for child in children:
            compute(manager, child)
        assert len(manager.take_block_copies()) == 1

    def test_a_block_that_can_be_hit_is_copied_even_by_its_last_reader(self) -> None:
        manager = make_manager(block_size=4)
        parent = make_request("a", range(6))
        compute(manager, parent)
        child = self.fork(manager, parent, "b", 90)
        append(parent, 6, 7)
        compute(manager, parent)
        manager.free(parent)
        compute(manager, child)
        assert len(manager.take_block_copies()) == 1
        assert manager.find_cached_prefix(make_request("c", range(9))).num_tokens == 8

    def test_two_copies_of_one_block_pin_it_twice(self) -> None:
        manager = make_manager(num_blocks=11, block_size=4)
        parent = make_request("a", range(3))
        compute(manager, parent)
        children = [self.fork(manager, parent, child_id, 7) for child_id in "bc"]
        for child in children:
            compute(manager, child)
        block_copies = manager.take_block_copies()
        for request in [parent, *children]:
            manager.free(request)
        assert manager.usage == pytest.approx(3 / 10), "the source and both targets"
        manager.finish_block_copies(block_copies)
        manager.check_integrity()
        assert manager.usage == 0.0

    def test_no_room_for_the_copy_leaves_the_child_as_it_was(self) -> None:
        manager = make_manager(num_blocks=2, block_size=4)
        parent = make_request("a", range(3))
        compute(manager, parent)
        child = self.fork(manager, parent, "b", 7)
        assert manager.allocate(child, 1) is None
        manager.check_integrity()
        manager.free(parent)
        assert manager.allocate(child, 1) == ()
        assert manager.take_block_copies() == []

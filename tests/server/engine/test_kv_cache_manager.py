import pytest
from engine_fakes import append, compute, make_manager, make_request
from hypothesis import given
from hypothesis import strategies as st

from quire_server.engine import kv_cache_manager
from quire_server.engine.kv_cache_manager import NO_PREFIX


@pytest.mark.parametrize(
    ("num_prompt_tokens", "expected"),
    [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)],
)
def test_a_request_holds_as_many_blocks_as_its_tokens_need(num_prompt_tokens: int, expected: int) -> None:
    manager = make_manager(block_size=4)
    assert len(compute(manager, make_request(prompt=range(num_prompt_tokens)))) == expected


def test_a_block_is_appended_only_when_the_last_one_is_full() -> None:
    manager = make_manager(block_size=4)
    request = make_request(prompt=range(3))
    first = compute(manager, request)
    append(request, 9)
    assert compute(manager, request) == ()
    append(request, 9)
    second = compute(manager, request)
    assert manager.block_ids(request) == [*first, *second]
    assert len(second) == 1


def test_too_few_free_blocks_change_nothing() -> None:
    manager = make_manager(num_blocks=4, block_size=4)
    compute(manager, make_request("a", range(8)))
    usage = manager.usage
    assert manager.allocate(make_request("b", range(5)), 5) is None
    assert manager.usage == usage
    manager.check_integrity()


def test_freeing_a_request_that_holds_nothing_is_fine() -> None:
    make_manager().free(make_request())


class TestPrefixCache:
    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            pytest.param(range(10), 8, id="full blocks are hit"),
            pytest.param(range(9), 8, id="one token is left to compute"),
            pytest.param(range(8), 4, id="not the whole prompt: its last block is computed again"),
            pytest.param([0, 1, 2, 3, 4, 5, 6, 99, 8], 4, id="up to the first block that differs"),
            pytest.param([99, 1, 2, 3, 4, 5, 6, 7, 8], 0, id="nothing after a first block that differs"),
            pytest.param([4, 5, 6, 7, 0], 0, id="a block elsewhere in the prompt is another block"),
            pytest.param([0], 0, id="a prompt shorter than a block"),
        ],
    )
    def test_hit(self, prompt, expected: int) -> None:
        manager = make_manager(block_size=4)
        compute(manager, make_request("a", range(10)))
        assert manager.find_cached_prefix(make_request("b", prompt)).num_tokens == expected

    def test_a_hit_shares_blocks_with_the_request_that_made_them(self) -> None:
        manager = make_manager(block_size=4)
        first = compute(manager, make_request("a", range(10)))
        second = compute(manager, make_request("b", range(10)))
        assert first[:2] == second[:2]
        assert first[2] != second[2]

    def test_a_finished_request_can_be_hit_until_its_blocks_are_needed(self) -> None:
        manager = make_manager(num_blocks=6, block_size=4)
        request = make_request("a", range(9))
        compute(manager, request)
        manager.free(request)
        compute(manager, make_request("b", range(100, 108)))
        assert manager.find_cached_prefix(make_request("c", range(9))).num_tokens == 8
        compute(manager, make_request("d", range(200, 204)))
        compute(manager, make_request("e", range(300, 304)))
        assert manager.find_cached_prefix(make_request("c", range(9))).num_tokens == 4

    def test_generated_tokens_are_cached_as_well(self) -> None:
        manager = make_manager(block_size=4)
        request = make_request("a", range(3))
        compute(manager, request)
        append(request, 7)
        compute(manager, request)
        assert manager.find_cached_prefix(make_request("b", [0, 1, 2, 7, 5])).num_tokens == 4

    def test_a_block_that_is_not_computed_to_its_end_is_not_hit(self) -> None:
        manager = make_manager(block_size=4)
        compute(manager, make_request("a", range(9)), num_tokens=6)
        assert manager.find_cached_prefix(make_request("b", range(9))).num_tokens == 4

    @pytest.mark.parametrize(
        ("salts", "is_hit"),
        [((None, None), True), (("x", "x"), True), ((None, "x"), False), (("x", None), False), (("x", "y"), False)],
    )
    def test_only_equal_salts_share(self, salts, is_hit: bool) -> None:
        manager = make_manager(block_size=4)
        compute(manager, make_request("a", range(9), cache_salt=salts[0]))
        prefix = manager.find_cached_prefix(make_request("b", range(9), cache_salt=salts[1]))
        assert prefix.num_tokens == (8 if is_hit else 0)

    def test_nothing_is_hit_when_it_is_switched_off(self) -> None:
        manager = make_manager(block_size=4, enable_prefix_caching=False)
        compute(manager, make_request("a", range(9)))
        assert manager.find_cached_prefix(make_request("b", range(9))) is NO_PREFIX

    def test_each_block_is_hashed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        original = kv_cache_manager.hash_block
        monkeypatch.setattr(
            kv_cache_manager, "hash_block", lambda *args: calls.append(args) or original(*args), raising=True
        )
        manager = make_manager(block_size=4)
        request = make_request("a", range(9))
        for _ in range(3):
            manager.find_cached_prefix(request)
        compute(manager, request)
        for token_id in range(8):
            append(request, token_id)
            compute(manager, request)
        manager.free(request)
        request.num_computed_tokens = 0
        compute(manager, request)
        assert len(calls) == 17 // 4

    def test_reset_forgets_what_was_computed_before_and_what_rests_on_it(self) -> None:
        manager = make_manager(block_size=4)
        running = make_request("a", range(9))
        compute(manager, running)
        manager.reset_prefix_cache()
        append(running, 9, 10, 11)
        compute(manager, running)
        fresh = make_request("b", range(9))
        assert manager.find_cached_prefix(fresh).num_tokens == 0
        compute(manager, fresh)
        assert manager.find_cached_prefix(make_request("c", range(13))).num_tokens == 8, (
            "fresh blocks, not the old third"
        )


class TestAdmission:
    @pytest.mark.parametrize(
        ("num_tokens", "num_reserved", "expected"),
        [(12, 0, True), (13, 0, False), (12, 1, False), (8, 1, True)],
    )
    def test_the_whole_sequence_must_fit_beside_the_reserve(self, num_tokens, num_reserved, expected) -> None:
        manager = make_manager(num_blocks=6, block_size=4)
        compute(manager, make_request("a", range(100, 108)))
        assert manager.can_admit(make_request("b", range(num_tokens)), NO_PREFIX, num_reserved) is expected

    def test_blocks_that_are_hit_need_room_only_if_nobody_holds_them(self) -> None:
        manager = make_manager(num_blocks=4, block_size=4)
        holder, other = make_request("a", range(8)), make_request("b", range(9))
        compute(manager, holder)
        prefix = manager.find_cached_prefix(other)
        assert manager.can_admit(other, prefix, 0)
        assert not manager.can_admit(other, prefix, 1)
        manager.free(holder)
        prefix = manager.find_cached_prefix(other)
        assert manager.can_admit(other, prefix, 0)
        assert not manager.can_admit(other, prefix, 1)

    def test_blocks_of_a_hit_that_are_in_nobodys_hands_are_not_used_twice(self) -> None:
        manager = make_manager(num_blocks=4, block_size=4)
        request, other = make_request("a", range(8)), make_request("b", range(9))
        compute(manager, request)
        manager.free(request)
        prefix = manager.find_cached_prefix(other)
        assert prefix.num_tokens == 8
        assert manager.allocate(other, 5, prefix) is None, "two blocks are hit and one is left, where two are needed"
        assert manager.allocate(other, 1, prefix) is not None

    def test_null_blocks_of_a_hit_are_no_room(self) -> None:
        manager = make_manager(num_blocks=8, block_size=2, sliding_window=3, max_num_batched_tokens=4)
        request = make_request("a", range(9))
        while request.num_computed_tokens < 9:
            compute(manager, request, min(4, 9 - request.num_computed_tokens))
        other = make_request("b", range(20))
        prefix = manager.find_cached_prefix(other)
        assert prefix.num_tokens == 8
        # Of a window's 4 blocks 1 is hit; 2 of the 7 are held.
        assert manager.can_admit(other, prefix, 2)
        assert not manager.can_admit(other, prefix, 3)

    @pytest.mark.parametrize(
        ("sliding_window", "num_tokens", "expected"),
        [(None, 12, True), (None, 13, False), (5, 1000, True), (6, 1000, True), (7, 1000, False), (7, 12, True)],
    )
    def test_a_sliding_window_bounds_what_a_request_holds(self, sliding_window, num_tokens, expected) -> None:
        # 3 blocks of 4; steps of up to 4 tokens: a window of 6 sees 5 + 4 tokens, which touch at most 3 blocks.
        manager = make_manager(num_blocks=4, block_size=4, max_num_batched_tokens=4, sliding_window=sliding_window)
        assert manager.fits_alone(num_tokens) is expected

    def test_missing_blocks_are_those_of_the_tokens_to_come(self) -> None:
        manager = make_manager(block_size=4)
        request = make_request("a", range(10))
        compute(manager, request, num_tokens=3)
        assert manager.num_missing_blocks(request) == 2


class TestRoomBesideOthers:
    def test_what_somebody_outside_still_uses_is_no_room(self) -> None:
        manager = make_manager(num_blocks=7, block_size=4)
        gone, waiting = make_request("gone", range(8)), make_request("waiting", range(100, 120))
        compute(manager, gone)
        assert manager.fits_beside(waiting, NO_PREFIX, [], 0)
        deferred = manager.defer_free(gone)
        assert not manager.fits_beside(waiting, NO_PREFIX, [], 0)
        manager.finish_free(deferred)
        assert manager.fits_beside(waiting, NO_PREFIX, [], 1)
        assert not manager.fits_beside(waiting, NO_PREFIX, [], 2)

    def test_shared_blocks_count_once_and_those_that_are_hit_not_at_all(self) -> None:
        manager = make_manager(num_blocks=7, block_size=4)
        requests = [make_request(name, [*range(8), 100 + index]) for index, name in enumerate("abc")]
        for request in requests:
            compute(manager, request)
        waiting = make_request("waiting", [*range(8), 200])
        prefix = manager.find_cached_prefix(waiting)
        assert prefix.num_tokens == 8
        assert manager.fits_beside(waiting, prefix, requests, 0)
        assert not manager.fits_beside(waiting, prefix, requests, 1)
        assert not manager.fits_beside(waiting, NO_PREFIX, requests, 0)


class TestSlidingWindow:
    def test_blocks_that_no_token_sees_any_more_are_freed(self) -> None:
        manager = make_manager(num_blocks=11, block_size=2, sliding_window=3)
        request = make_request("a", range(8))
        first = compute(manager, request)
        append(request, 9)
        compute(manager, request)
        # The token at position 8 sees 6, 7 and itself: blocks 3 and 4.
        assert manager.block_ids(request)[:4] == [0, 0, 0, first[3]]
        assert manager.usage == pytest.approx(2 / 10)

    @given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 9), st.data())
    def test_the_blocks_that_a_window_and_a_step_touch_are_enough(
        self, window: int, block_size: int, budget: int, data: st.DataObject
    ) -> None:
        positions = [range(start, start + window - 1 + budget) for start in range(block_size)]
        num_needed = max(len({position // block_size for position in span}) for span in positions)
        manager = make_manager(
            num_blocks=num_needed + 1, block_size=block_size, sliding_window=window, max_num_batched_tokens=budget
        )
        request = make_request("a", range(60))
        assert manager.fits_alone(60)
        while request.num_computed_tokens < 60:
            num_tokens = min(data.draw(st.integers(1, budget)), 60 - request.num_computed_tokens)
            assert manager.allocate(request, num_tokens) is not None
            request.num_computed_tokens += num_tokens

    def test_a_long_request_runs_in_a_cache_of_a_few_blocks(self) -> None:
        manager = make_manager(num_blocks=4, block_size=2, sliding_window=3, max_num_batched_tokens=2)
        request = make_request("a", [1])
        assert manager.fits_alone(100)
        for token_id in range(99):
            compute(manager, request)
            append(request, token_id)
        assert manager.usage <= 1.0

    def test_a_hit_needs_only_the_blocks_in_the_window(self) -> None:
        manager = make_manager(num_blocks=7, block_size=2, sliding_window=3)
        request = make_request("a", range(8))
        compute(manager, request)
        append(request, 8)
        last = compute(manager, request)
        for number in range(4):  # takes the freed blocks, which forget their contents
            compute(manager, make_request(f"other {number}", [50 + number]))
        prefix = manager.find_cached_prefix(make_request("b", range(9)))
        assert prefix.num_tokens == 8
        hit = make_request("b", range(10))
        manager.free(make_request("other 0"))
        assert manager.find_cached_prefix(make_request("c", range(7))).num_tokens == 0
        block_ids = compute(manager, hit)
        assert list(block_ids[:3]) == [0, 0, 0]
        assert block_ids[3] == manager.block_ids(request)[3]
        assert block_ids[4] != last[0]

    def test_a_hole_in_the_window_is_no_hit(self) -> None:
        manager = make_manager(num_blocks=7, block_size=2, sliding_window=5)
        request = make_request("a", range(12))
        compute(manager, request)
        manager.free(request)
        # Holds blocks 4 and 5 of six, and its new block takes the place of block 3.
        compute(manager, make_request("b", range(13)))
        assert manager.find_cached_prefix(make_request("c", range(11))).num_tokens == 6

    def test_the_run_from_the_start_is_a_hit_however_short(self) -> None:
        manager = make_manager(num_blocks=9, block_size=2, sliding_window=7)
        request = make_request("a", range(8))
        compute(manager, request)
        manager.free(request)
        # The tail goes first: blocks 3 and 2 of four.
        compute(manager, make_request("b", range(50, 62)))
        assert manager.find_cached_prefix(make_request("c", range(9))).num_tokens == 4

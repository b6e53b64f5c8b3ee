"""The KV cache manager against a cache whose slots remember what was written to them.

The machine plays scheduler and runner: it admits, continues, forks, aborts and preempts at random, applies block copies
and writes through append-only block tables, and then reads back every token that a live request sees.
"""

from collections import defaultdict

from engine_fakes import make_manager, make_request, visible
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire_server.engine.kv_cache_manager import NO_PREFIX, DeferredFree
from quire_server.engine.request import Request

TOKENS = st.integers(0, 1)
MAX_CHUNK = 5


class KVCacheManagerMachine(RuleBasedStateMachine):
    @initialize(
        capacity=st.integers(6, 48),
        block_size=st.sampled_from([1, 2, 4]),
        sliding_window=st.none() | st.none() | st.integers(1, 6),
        enable_prefix_caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, capacity: int, block_size: int, sliding_window: int | None, enable_prefix_caching: bool) -> None:
        self.block_size, self.sliding_window = block_size, sliding_window
        self.manager = make_manager(
            1 + capacity // block_size,
            block_size,
            max_num_batched_tokens=MAX_CHUNK,
            sliding_window=sliding_window,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.kv: dict[tuple[int, int], tuple[object, ...]] = {}
        self.live: dict[str, Request] = {}
        self.tables: dict[str, list[int]] = {}  # as the runner has them
        self.oldest_epoch: dict[str, int] = {}  # of the KV that a request rests on
        self.deferred: list[tuple[DeferredFree, dict[tuple[int, int], tuple[object, ...]]]] = []
        self.epoch = 0
        self.num_requests = 0
        self.num_forks = 0
        self.num_copies = 0

    def new_id(self) -> str:
        self.num_requests += 1
        return f"r{self.num_requests}"

    def drop(self, request: Request) -> None:
        self.manager.free(request)
        del self.live[request.request_id]
        self.tables.pop(request.request_id, None)

    def slot(self, request: Request, position: int) -> tuple[int, int]:
        block_id = self.tables[request.request_id][position // self.block_size]
        assert block_id != 0
        return block_id, position % self.block_size

    # A step

    @rule(data=st.data(), num_new=st.integers(0, 2))
    def step(self, data: st.DataObject, num_new: int) -> None:
        writes: list[tuple[Request, int, int]] = []
        for request in list(self.live.values()):
            if data.draw(st.sampled_from([True, True, False])):
                self.allocate_running(data, request, writes)
        for request, start, num_tokens in writes:
            request.num_computed_tokens = start + num_tokens
            self.manager.cache_full_blocks(request)
        for _ in range(num_new):
            self.admit(data, writes)
        block_copies = self.manager.take_block_copies()
        self.num_copies += len(block_copies)
        assert self.num_copies <= self.num_forks
        tables = {request.request_id: list(self.tables[request.request_id]) for request, _, _ in writes}
        for request in list(self.live.values()):
            if data.draw(st.integers(0, 9)) == 9:
                self.drop(request)  # aborted while the step runs
        self.run(writes, tables, block_copies)
        self.manager.finish_block_copies(block_copies)

    def allocate_running(self, data: st.DataObject, request: Request, writes: list[tuple[Request, int, int]]) -> None:
        start = request.num_computed_tokens
        if start == request.num_tokens:
            request.token_ids.append(data.draw(TOKENS))
        num_tokens = data.draw(st.integers(1, min(request.num_tokens - start, MAX_CHUNK)))
        num_free_before = 1.0 - self.manager.usage
        block_ids = self.manager.allocate(request, num_tokens)
        if block_ids is None:
            assert num_free_before < 1.0
            self.drop(request)
            return
        if request.request_id in self.tables:
            self.tables[request.request_id] += block_ids
        else:
            self.tables[request.request_id] = self.manager.block_ids(request)
        writes.append((request, start, num_tokens))

    def admit(self, data: st.DataObject, writes: list[tuple[Request, int, int]]) -> None:
        num_shared, own = data.draw(st.integers(0, 12)), data.draw(st.lists(TOKENS, max_size=2))
        prompt = [*[0] * num_shared, *own] or [1]
        request = make_request(self.new_id(), prompt, cache_salt=data.draw(st.sampled_from([None, None, "salt"])))
        prefix = self.manager.find_cached_prefix(request)
        assert prefix.num_tokens < request.num_tokens
        assert prefix.num_tokens % self.block_size == 0
        num_tokens = data.draw(st.integers(1, min(request.num_tokens - prefix.num_tokens, MAX_CHUNK)))
        can_admit = self.manager.can_admit(request, prefix, 0)
        block_ids = self.manager.allocate(request, num_tokens, prefix)
        assert block_ids is not None or not can_admit
        if not self.live and self.manager.usage == 0.0:
            assert block_ids is not None or not self.manager.fits_alone(request.num_tokens)
        if block_ids is None:
            return
        self.live[request.request_id] = request
        self.tables[request.request_id] = list(block_ids)
        assert self.manager.block_ids(request) == block_ids
        self.oldest_epoch[request.request_id] = self.epoch
        request.num_computed_tokens = prefix.num_tokens + num_tokens
        self.manager.cache_full_blocks(request)
        writes.append((request, prefix.num_tokens, num_tokens))

    def run(self, writes, tables: dict[str, list[int]], block_copies) -> None:
        for src, dst in block_copies:
            for offset in range(self.block_size):
                self.kv.pop((dst, offset), None)
                if (src, offset) in self.kv:
                    self.kv[dst, offset] = self.kv[src, offset]
        for request, start, num_tokens in writes:
            for position in range(start, start + num_tokens):
                block_id = tables[request.request_id][position // self.block_size]
                assert block_id != 0
                self.kv[block_id, position % self.block_size] = self.contents(request, position)
        for request, start, num_tokens in writes:
            if request.request_id in self.live:
                for position in range(start, start + num_tokens):
                    self.read_back(request, visible(position, self.sliding_window))

    def contents(self, request: Request, position: int) -> tuple[object, ...]:
        oldest_epoch = self.oldest_epoch[request.request_id]
        return (oldest_epoch, request.cache_salt, *request.token_ids[: position + 1])

    def read_back(self, request: Request, positions: range) -> None:
        for position in positions:
            assert self.kv[self.slot(request, position)] == self.contents(request, position)

    # Between steps

    @precondition(lambda self: 0 < len(self.live) < 6)
    @rule(data=st.data(), token_id=TOKENS)
    def fork(self, data: st.DataObject, token_id: int) -> None:
        parent = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        token_ids = [*parent.token_ids[: parent.num_computed_tokens], token_id]
        child = make_request(self.new_id(), token_ids, cache_salt=parent.cache_salt)
        child.num_computed_tokens = parent.num_computed_tokens
        self.manager.fork(parent, child)
        self.num_forks += 1
        self.live[child.request_id] = child
        self.oldest_epoch[child.request_id] = self.oldest_epoch[parent.request_id]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.drop(self.live[data.draw(st.sampled_from(sorted(self.live)))])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free_later(self, data: st.DataObject) -> None:
        """Somebody outside still reads what the request has."""
        request = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        block_ids = self.manager.block_ids(request)
        read = {}
        for position in visible(request.num_computed_tokens, self.sliding_window):
            slot = block_ids[position // self.block_size], position % self.block_size
            read[slot] = self.kv[slot]
        usage = self.manager.usage
        self.deferred.append((self.manager.defer_free(request), read))
        assert self.manager.usage == usage
        del self.live[request.request_id]
        self.tables.pop(request.request_id, None)

    @precondition(lambda self: self.deferred)
    @rule(data=st.data())
    def somebody_outside_is_done(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.deferred) - 1))
        self.manager.finish_free(self.deferred.pop(index)[0])

    @precondition(lambda self: self.num_requests % 4 == 3)
    @rule()
    def reset_prefix_cache(self) -> None:
        self.manager.reset_prefix_cache()
        self.epoch += 1

    # What always holds

    @invariant()
    def every_live_token_is_read_back(self) -> None:
        for request in self.live.values():
            self.tables.setdefault(request.request_id, self.manager.block_ids(request))
            positions = visible(request.num_computed_tokens, self.sliding_window)
            self.read_back(request, positions)
            ids = self.manager.block_ids(request)
            for index in {position // self.block_size for position in positions}:
                assert ids[index] == self.tables[request.request_id][index]
        for request_id in [request_id for request_id in self.tables if self.is_borrower(request_id)]:
            del self.tables[request_id]

    def is_borrower(self, request_id: str) -> bool:
        return self.manager._tables[request_id].has_borrowed_tail

    @invariant()
    def blocks_are_conserved_and_counted(self) -> None:
        self.manager.check_integrity()

    @invariant()
    def what_somebody_outside_reads_stays(self) -> None:
        for _, read in self.deferred:
            assert all(self.kv[slot] == contents for slot, contents in read.items())

    @invariant()
    def a_block_that_is_not_full_has_one_writer(self) -> None:
        writers = defaultdict(list)
        for request in self.live.values():
            num_partial = request.num_computed_tokens % self.block_size
            if num_partial and not self.is_borrower(request.request_id):
                writers[self.manager.block_ids(request)[-1]].append(request.request_id)
        assert all(len(request_ids) == 1 for request_ids in writers.values())

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for request in list(self.live.values()):
            self.drop(request)
        for deferred, _ in self.deferred:
            self.manager.finish_free(deferred)
        self.manager.check_integrity()
        assert self.manager.usage == 0.0
        probe = make_request("probe", [0, 1])
        assert self.manager.allocate(probe, 1, NO_PREFIX) is not None


TestKVCacheManagerMachine = KVCacheManagerMachine.TestCase
TestKVCacheManagerMachine.settings = settings(max_examples=100, stateful_step_count=30)

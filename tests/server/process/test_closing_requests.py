"""Between the end of a request here and its end in the engine: its id is taken, and what still comes is nobody's."""

import asyncio
from collections.abc import Callable

import pytest
from client_helpers import MakeRequest, OpenClient, collect, run, tokens_of, until

from quire_contract.termination import TerminationMessage
from quire_server.engine.border.client import EngineClient
from quire_server.engine.border.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStep,
    ToEngine,
)
from quire_server.engine.output import EngineCoreOutput, SchedulerStats
from quire_server.engine.request import FinishReason
from quire_server.shared.config import EngineConfig
from quire_server.shared.errors import DrainingError, EngineDeadError, InvalidRequestError

READY = EngineReady(
    max_model_len=512,
    vocab_size=300,
    num_blocks=64,
    block_size=16,
    dtype="float32",
    device="cpu",
    weights_bytes=1,
    kv_cache_bytes=1,
    load_seconds={},
)


class Told(EngineClient):
    """A client without a process: a test says what the engine says."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(None, config)  # type: ignore[arg-type]
        self.sent: list[ToEngine] = []
        self._dispatch(READY)

    def _send(self, message: ToEngine) -> None:
        self.sent.append(message)

    @property
    def aborted(self) -> list[str]:
        return [each for message in self.sent if isinstance(message, AbortRequests) for each in message.request_ids]

    def hear(self, *outputs: EngineCoreOutput) -> None:
        self._dispatch(EngineStep(outputs=list(outputs), stats=SchedulerStats(), time=0.0))


def output(*token_ids: int, branch: int = 0, finish: FinishReason | None = None) -> EngineCoreOutput:
    return EngineCoreOutput(request_id="x", branch=branch, new_token_ids=list(token_ids), finish_reason=finish)


@pytest.fixture
def run_told(engine_config: EngineConfig) -> Callable[..., None]:
    def run_told(check: Callable[[Told], object]) -> None:
        async def body() -> None:
            result = check(Told(engine_config))
            if asyncio.iscoroutine(result):
                await result

        run(body())

    return run_told


@pytest.mark.parametrize("end", [FinishReason.ABORT, FinishReason.LENGTH, FinishReason.ERROR])
def test_an_id_is_free_again_once_the_engine_has_said_the_end(run_told, make_request: MakeRequest, end) -> None:
    """LENGTH: it had just ended there when the abort came, which is then not answered."""

    async def check(client: Told) -> None:
        client.generate(make_request("x")).close()
        for late in (output(42), output(43)):
            with pytest.raises(InvalidRequestError, match="'x' is being ended") as caught:
                client.generate(make_request("x"))
            assert caught.value.param == "request_id"
            client.hear(late)  # it was in the socket before the abort was sent
        assert client.num_open_requests == 0
        client.hear(output(44, finish=end))
        again = client.generate(make_request("x"))
        client.hear(output(7), output(8, finish=FinishReason.LENGTH))
        assert tokens_of(await collect(again)) == [7, 8]
        assert [type(message) for message in client.sent] == [AddRequest, AbortRequests, AddRequest]
        assert not client._closing

    run_told(check)


@pytest.mark.parametrize("ends", [(0, 1), (1, 0)])
def test_an_id_of_branches_is_free_when_the_last_of_them_has_ended(run_told, make_request: MakeRequest, ends) -> None:
    def check(client: Told) -> None:
        client.generate(make_request("x", num_branches=2)).close()
        for branch in ends:
            with pytest.raises(InvalidRequestError):
                client.generate(make_request("x"))
            client.hear(output(1, branch=branch, finish=FinishReason.STOP))
        client.generate(make_request("x"))

    run_told(check)


def test_a_branch_that_runs_on_for_nobody_is_aborted_and_its_id_waits_for_the_answer(
    run_told, make_request: MakeRequest
) -> None:
    async def check(client: Told) -> None:
        stream = client.generate(make_request("x", num_branches=2))
        client.hear(output(1))
        await anext(stream)
        stream.end_branch(0)
        assert (client.num_open_requests, client.aborted) == (1, [])
        client.hear(output(2, branch=1, finish=FinishReason.STOP))
        assert (client.num_open_requests, client.aborted) == (0, ["x"])
        assert tokens_of(await collect(stream)) == [2]
        with pytest.raises(InvalidRequestError):
            client.generate(make_request("x"))
        client.hear(output(finish=FinishReason.ABORT))
        client.generate(make_request("x"))
        assert client.aborted == ["x"]

    run_told(check)


def test_what_is_closed_or_ended_by_a_drain_is_closing_too(run_told, make_request: MakeRequest) -> None:
    async def check(client: Told) -> None:
        stream = client.generate(make_request("x"))
        await stream.aclose()
        assert await collect(stream) == []
        with pytest.raises(InvalidRequestError):
            client.generate(make_request("x"))
        client.hear(output(finish=FinishReason.ABORT))
        client.generate(make_request("x"))
        assert client.fail_open_requests(DrainingError("over")) == 1
        with pytest.raises(InvalidRequestError):
            client.generate(make_request("x"))
        assert client.aborted == ["x", "x"]
        assert await client.drain(0.0) == 0, "nobody waits for what is closing"

    run_told(check)


def test_each_end_in_the_engine_counts_once_towards_the_drain_rate(run_told, make_request: MakeRequest) -> None:
    def check(client: Told) -> None:
        client.generate(make_request("x")).close()
        client.hear(output(1))
        assert len(client._limit._finish_times) == 0
        client.hear(output(finish=FinishReason.ABORT))
        assert len(client._limit._finish_times) == 1

    run_told(check)


def test_death_leaves_nothing(run_told, make_request: MakeRequest) -> None:
    def check(client: Told) -> None:
        client.generate(make_request("x")).close()
        assert client._closing
        client._dispatch(EngineFailed(TerminationMessage(code="EngineFailed", stage="Serving", message="bad")))
        assert not client._closing
        with pytest.raises(EngineDeadError):
            client.generate(make_request("x"))

    run_told(check)


def test_an_id_is_used_again_against_a_process(open_client: OpenClient, make_request: MakeRequest) -> None:
    async def check() -> None:
        async with open_client("echo") as client:
            for number in range(20):
                stream = client.generate(make_request("x", 100, first_token=100))
                await anext(stream)
                await stream.aclose()
                await until(lambda: not client._closing)
                assert tokens_of(await collect(client.generate(make_request("x", 3, first_token=number)))) == [
                    number,
                    number + 1,
                    number + 2,
                ]
            client.generate(make_request("x")).close()
        assert not client._closing

    run(check())

"""The engine's loop over a runner without a model: whatever comes, each request and call ends once, and it goes on."""

import math
from pathlib import Path

import msgspec
import pytest
import torch
from engine_fakes import VOCAB_SIZE, FakeRunner, make_engine_request
from loop_fakes import INFO, FakeWire, add, altered, call, make_core, run

from quire_server.engine.border import loop as loop_module
from quire_server.engine.border.calls import Reply
from quire_server.engine.border.client import EngineClient
from quire_server.engine.border.loop import EngineLoop
from quire_server.engine.border.messages import (
    AddRequest,
    EngineBusy,
    EngineStep,
    FromEngine,
    Shutdown,
    ToEngine,
    encode,
)
from quire_server.engine.request import EngineRequest
from quire_server.engine.step import CompletedStep, SchedulerOutput
from quire_server.shared.config import EngineConfig, ModelConfig
from quire_server.shared.errors import (
    ContextLengthError,
    DrainingError,
    InternalError,
    InvalidRequestError,
    QuireError,
    decode_error,
)
from quire_server.shared.pooling_params import PoolingParams, PoolingTask


class TestRequests:
    def test_a_request_runs_to_its_end_and_then_the_loop_waits(self) -> None:
        wire, _ = run([add("a")])
        assert wire.ends() == {"a": 1}
        assert sum(len(output.new_token_ids) for output in wire.outputs) == 4
        assert wire.timeouts_ms[0] == loop_module.HEARTBEAT_MS
        assert set(wire.timeouts_ms[1:-1]) == {0}

    @pytest.mark.parametrize(
        ("message", "kind", "param"),
        [
            (add("bad", [1] * 22), ContextLengthError, "max_tokens"),
            (add("bad", [1] * 25), ContextLengthError, "prompt"),
            (add("bad", [1, VOCAB_SIZE]), InvalidRequestError, "prompt"),
            (add("bad", logit_bias={VOCAB_SIZE: 1.0}), InvalidRequestError, "logit_bias"),
            (
                AddRequest(
                    EngineRequest(request_id="bad", prompt_token_ids=[1], params=PoolingParams(task=PoolingTask.EMBED))
                ),
                InvalidRequestError,
                "task",
            ),
            (altered(add("bad"), "request", "prompt_token_ids", value=[]), InvalidRequestError, "prompt"),
            (altered(add("bad"), "request", "params", "max_tokens", value=None), InvalidRequestError, "max_tokens"),
            (altered(add("bad"), "request", "params", "temperature", value=-1.0), InvalidRequestError, "temperature"),
            (altered(add("bad"), "request", "params", "top_p", value=math.nan), InvalidRequestError, "top_p"),
            (altered(add("bad"), "request", "arrival_time", value=math.inf), InvalidRequestError, "arrival_time"),
            (altered(add("bad"), "request", "params", value=["PoolingParams", "embed", 0]), InvalidRequestError, None),
            (altered(add("bad"), "request", "params", value="none"), InvalidRequestError, None),
            (altered(add("bad"), "request", "prompt_token_ids", value=["x"]), InvalidRequestError, None),
        ],
    )
    def test_what_cannot_run_is_refused_by_class_and_field_and_the_others_go_on(
        self, message: ToEngine | bytes, kind: type[QuireError], param: str | None
    ) -> None:
        wire, _ = run([add("before"), message, add("after")])
        assert wire.ends() == {"before": 1, "bad": 1, "after": 1}
        error = wire.error_of("bad")
        assert type(error) is kind
        assert error.status == 400
        assert error.param == param or (param is None and error.param == "dimensions")

    def test_a_bug_met_while_one_is_taken_is_the_end_of_that_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        core = make_core()
        take = core.add_request

        def add_request(request: EngineRequest) -> None:
            if request.request_id == "bad":
                raise KeyError("what nobody thought of")
            take(request)

        monkeypatch.setattr(core, "add_request", add_request)
        wire, _ = run([add("a"), add("bad"), add("b")], core=core)
        assert wire.ends() == {"a": 1, "bad": 1, "b": 1}
        error = wire.error_of("bad")
        assert type(error) is InternalError
        assert "nobody" not in str(error), "the log has it; a client does not"

    @pytest.mark.parametrize("kind", [MemoryError, type("AcceleratorError", (RuntimeError,), {})])
    def test_but_where_nothing_can_go_on_the_loop_ends(
        self, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
    ) -> None:
        def raise_it(*_: object) -> None:
            raise kind

        for name, message in [("add_request", add("a")), ("reset_prefix_cache", call(0))]:
            core = make_core()
            monkeypatch.setattr(core, name, raise_it)
            with pytest.raises(kind):
                run([message], core=core)

    def test_the_name_of_a_dead_device_is_torchs(self) -> None:
        assert issubclass(torch.AcceleratorError, RuntimeError)
        assert torch.AcceleratorError.__name__ in loop_module._FATAL_NAMES


class TestCalls:
    def test_a_call_is_answered_between_two_steps_and_done_by_then(self) -> None:
        prompt = [1] * 9
        wire, _ = run(
            [add("first", prompt)], *[[]] * 5, [add("cached", prompt)], *[[]] * 5, [call(7)], [add("c", prompt)]
        )
        assert wire.replies == [Reply.succeeded(7, None)]
        cached = {output.request_id: output.num_cached_tokens for output in reversed(wire.outputs)}
        assert cached == {"first": 0, "cached": 8, "c": 0}

    def test_calls_do_not_hold_up_a_request(self) -> None:
        quiet, _ = run([add("a", max_tokens=6)])
        busy, _ = run([add("a", max_tokens=6), call(0)], *[[call(number)] for number in range(1, 5)])
        assert [output.new_token_ids for output in busy.outputs] == [output.new_token_ids for output in quiet.outputs]
        assert len([m for m in busy.sent if isinstance(m, EngineStep)]) == len(
            [m for m in quiet.sent if isinstance(m, EngineStep)]
        )
        positions = [index for index, message in enumerate(busy.sent) if isinstance(message, Reply)]
        assert len(positions) == 5
        assert all(isinstance(busy.sent[position + 1], EngineStep) for position in positions)

    @pytest.mark.parametrize(
        ("raised", "kind", "text"),
        [
            (DrainingError("Going.", 2.0), DrainingError, "Going."),
            (ValueError("a secret"), InternalError, "Something went wrong"),
        ],
    )
    def test_what_a_call_raises_is_its_answer(
        self, monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[QuireError], text: str
    ) -> None:
        def raise_it() -> None:
            raise raised

        core = make_core()
        monkeypatch.setattr(core, "reset_prefix_cache", raise_it)
        wire, _ = run([call(1), add("a")], core=core)
        assert wire.ends() == {"a": 1}
        (reply,) = wire.replies
        assert reply.error is not None
        error = decode_error(reply.error)
        assert (reply.call_id, type(error)) == (1, kind)
        assert text in str(error)

    @pytest.mark.parametrize("method", [{"type": "Levitate"}, None, 3, {"type": 1}])
    def test_a_method_that_is_not_known_is_answered_too(self, method: object) -> None:
        wire, _ = run([altered(call(3), "method", value=method), add("a")])
        assert wire.ends() == {"a": 1}
        (reply,) = wire.replies
        assert reply.error is not None
        assert (reply.call_id, decode_error(reply.error).status) == (3, 400)


class TestSilence:
    def test_a_slow_device_says_before_each_silence_how_long_it_may_be(self) -> None:
        wire, _ = run([], [add("a", max_tokens=3)], info=msgspec.structs.replace(INFO, max_step_s=600.0))
        said = [
            (message.reason, message.max_silence_s) if isinstance(message, EngineBusy) else message.max_silence_s
            for message in wire.sent
            if isinstance(message, EngineBusy | EngineStep)
        ]
        # an idle heartbeat; three steps and the one that tells the runner of the end; the last heartbeat
        assert said == [0.0, ("a step", 600.0), 600.0, 600.0, 600.0, 0.0, 0.0]

    def test_a_client_waits_for_every_step_of_a_slow_device_and_for_no_more(self) -> None:
        """In virtual time: each step takes 599 s, and calls come in between, whose replies are messages too."""
        config = EngineConfig(model=ModelConfig(model="m", path=Path("/m"), served_model_names=("m",)))
        client = EngineClient(None, config, heartbeat_timeout_s=60.0)  # type: ignore[arg-type]
        info = msgspec.structs.replace(INFO, max_step_s=600.0)
        client._dispatch(info)

        class SlowRunner(FakeRunner):
            def submit(self, scheduler_output: SchedulerOutput) -> CompletedStep:
                assert not any(client._watchdog.tick(1.0) for _ in range(599)), "taken for dead in the middle of a step"
                return super().submit(scheduler_output)

        class Told(FakeWire):
            def send(self, message: FromEngine) -> None:
                super().send(message)
                client._dispatch(self.sent[-1])

        core = make_core()
        core._runner = SlowRunner(20, 4)
        batches: list[list[ToEngine]] = [[], [add("a")], [], [call(0)], [call(1), add("b")], [], [call(2)]]
        EngineLoop(core, Told([[encode(each) for each in batch] for batch in batches]), info).run()
        assert not any(client._watchdog.tick(1.0) for _ in range(60))
        assert client._watchdog.tick(1.0), "an idle engine has nothing to be silent for"

    def test_a_fast_one_has_nothing_to_say(self) -> None:
        wire, _ = run([add("a", max_tokens=3)])
        assert not any(isinstance(message, EngineBusy) for message in wire.sent)
        assert all(message.max_silence_s == 0.0 for message in wire.sent if isinstance(message, EngineStep))


def test_a_loop_with_nothing_but_blocked_requests_waits_instead_of_spinning() -> None:
    wire = FakeWire([])
    core = make_core()
    core.add_request(make_engine_request("a"), blockers=["grammar"])
    EngineLoop(core, wire, INFO).run()
    assert wire.timeouts_ms == [0, loop_module.STALLED_MS]


def test_and_says_no_more_than_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """In virtual time: ten seconds of looking a hundred times a second whether it can go on."""
    clock_ms = 0
    monkeypatch.setattr(loop_module.time, "monotonic", lambda: clock_ms / 1000)

    class Patient(FakeWire):
        def receive(self, timeout_ms: int) -> list[bytes]:
            nonlocal clock_ms
            self.timeouts_ms.append(timeout_ms)
            clock_ms += timeout_ms
            if clock_ms == 5_000:
                core.unblock("b", "grammar")
            return [encode(Shutdown())] if clock_ms >= 10_000 else []

    wire, core = Patient([]), make_core()
    core.add_request(make_engine_request("a"), blockers=["grammar"])
    core.add_request(make_engine_request("b", max_tokens=1), blockers=["grammar"])
    EngineLoop(core, wire, INFO).run()
    assert wire.timeouts_ms.count(loop_module.STALLED_MS) == 1000
    assert wire.ends() == {"b": 1}, "what has come of it is said at once"
    # the stall; five heartbeats; the answer, its removal; five heartbeats less what these began anew
    assert 11 <= len(wire.sent) <= 14

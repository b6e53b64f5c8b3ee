"""A wire that brings what a test says, and the engine's loop run over it to the end."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from engine_fakes import VOCAB_SIZE, FakeRunner, make_engine_request
from kv_storage import small_kv_cache

from quire_server.engine.border.calls import Call, Reply, ResetPrefixCache
from quire_server.engine.border.loop import EngineLoop
from quire_server.engine.border.messages import (
    AddRequest,
    EngineReady,
    EngineStep,
    FromEngine,
    Shutdown,
    ToEngine,
    encode,
    from_engine_decoder,
)
from quire_server.engine.core import EngineCore, EngineCoreConfig
from quire_server.engine.output import EngineCoreOutput
from quire_server.engine.request import FinishReason
from quire_server.shared.config import SchedulerConfig
from quire_server.shared.errors import (
    QuireError,
    decode_error,
)

MAX_MODEL_LEN = 24
INFO = EngineReady(
    max_model_len=MAX_MODEL_LEN,
    vocab_size=VOCAB_SIZE,
    num_blocks=19,
    block_size=4,
    dtype="int",
    device="none",
    weights_bytes=0,
    kv_cache_bytes=0,
    load_seconds={},
)


@dataclass
class FakeWire:
    """Brings its frames batch by batch, and when all is said, the order to end. Keeps what is sent, as it arrives."""

    batches: list[list[bytes]]
    sent: list[FromEngine] = field(default_factory=list)
    timeouts_ms: list[int] = field(default_factory=list)

    def send(self, message: FromEngine) -> None:
        self.sent.append(from_engine_decoder.decode(encode(message)))

    def receive(self, timeout_ms: int) -> list[bytes]:
        self.timeouts_ms.append(timeout_ms)
        if self.batches:
            return self.batches.pop(0)
        return [encode(Shutdown())] if timeout_ms else []  # it waits only when nothing is left to do

    @property
    def outputs(self) -> list[EngineCoreOutput]:
        return [output for message in self.sent if isinstance(message, EngineStep) for output in message.outputs]

    @property
    def replies(self) -> list[Reply]:
        return [message for message in self.sent if isinstance(message, Reply)]

    def ends(self) -> Counter[str]:
        return Counter(output.request_id for output in self.outputs if output.finish_reason is not None)

    def error_of(self, request_id: str) -> QuireError:
        (output,) = (output for output in self.outputs if output.request_id == request_id)
        assert output.finish_reason is FinishReason.ERROR
        assert output.error is not None
        return decode_error(output.error)


def make_core() -> EngineCore:
    config = EngineCoreConfig(
        kv_cache=small_kv_cache(),
        scheduler=SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=8),
        max_model_len=MAX_MODEL_LEN,
        num_blocks=20,
        block_size=4,
    )
    return EngineCore(config, FakeRunner(20, 4))


def run(
    *batches: Sequence[ToEngine | bytes], core: EngineCore | None = None, info: EngineReady = INFO
) -> tuple[FakeWire, EngineCore]:
    core = core or make_core()
    frames = [[each if isinstance(each, bytes) else encode(each) for each in batch] for batch in batches]
    wire = FakeWire(frames)
    EngineLoop(core, wire, info).run()
    core.check_integrity()
    assert not core.has_unfinished
    return wire, core


def add(request_id: str, prompt: Sequence[int] = (1, 2, 3), **kwargs: Any) -> AddRequest:
    return AddRequest(make_engine_request(request_id, prompt, **{"max_tokens": 4, **kwargs}))


def altered(message: ToEngine, *path: str, value: object) -> bytes:
    """A frame of the message with one field as no constructor would have it."""
    decoded = msgspec.msgpack.decode(encode(message))
    inner = decoded
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return msgspec.msgpack.encode(decoded)


def call(call_id: int) -> Call:
    return Call(call_id=call_id, method=ResetPrefixCache())

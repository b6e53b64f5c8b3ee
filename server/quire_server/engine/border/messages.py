"""The messages between the API process and the engine process: msgpack over ZeroMQ, no pickle.

How the engine process is started and finds its sockets is in `launch`; the API process's end is `client`.
"""

import msgspec

from quire_contract.phases import Phase
from quire_contract.termination import TerminationMessage
from quire_server.engine.border.calls import Call, Reply
from quire_server.engine.output import EngineCoreOutput, SchedulerStats
from quire_server.engine.request import EngineRequest


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    request: EngineRequest


class AbortRequests(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End after the current step; whatever still runs is dropped."""


ToEngine = AddRequest | AbortRequests | Call | Shutdown


class EngineProgress(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The engine is not ready yet, and says how far it is."""

    phase: Phase
    message: str = ""
    percent: float | None = None


class EngineReady(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The engine can take requests. All that the API process needs to know of it."""

    max_model_len: int
    vocab_size: int
    num_blocks: int
    """Blocks that can be allocated (the null block is not counted)."""
    block_size: int
    dtype: str
    device: str
    """Such as `cpu (amx)` or `cuda:0 NVIDIA H200`."""
    weights_bytes: int
    kv_cache_bytes: int
    load_seconds: dict[str, float]
    """Seconds by stage of the start: import, weights, kv_cache, warm_up."""
    max_step_s: float = 0.0
    """How long a step may take on this device, where that may be longer than an engine can be silent and live."""


class EngineStep(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """What a step brought; with no outputs it is the heartbeat of an idle engine (about one a second)."""

    outputs: list[EngineCoreOutput] = []
    stats: SchedulerStats
    time: float
    """Unix time in seconds."""
    max_silence_s: float = 0.0
    """How long the next message may take, at most; 0: as long as a heartbeat."""


class EngineBusy(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The engine is about to say nothing for a while, and lives: until its next message, whatever that is."""

    reason: str
    """What it does meanwhile, such as `a step` or `capturing CUDA graphs`."""
    max_silence_s: float
    """How long that may take, at most."""


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine is ending; nothing follows."""

    message: TerminationMessage


FromEngine = EngineProgress | EngineReady | EngineStep | EngineBusy | Reply | EngineFailed

to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
encode = msgspec.msgpack.Encoder().encode

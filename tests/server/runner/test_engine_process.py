"""The engine process as the API process sees it: a real process, real sockets, a tiny checkpoint."""

import asyncio
import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import msgspec
import pytest
import torch
import zmq
from kv_storage import small_kv_cache
from transformers import LlamaForCausalLM

from quire_contract.paths import TERMINATION_LOG_ENV
from quire_contract.phases import Phase
from quire_contract.termination import decode_termination
from quire_server.engine.border.calls import Call, Reply, ResetPrefixCache
from quire_server.engine.border.client import EngineClient
from quire_server.engine.border.launch import EngineProcess
from quire_server.engine.border.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineProgress,
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
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.engine.step import CompletedStep, RunnerOutput, SchedulerOutput
from quire_server.engine_process.process import run_engine
from quire_server.shared.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from quire_server.shared.errors import ContextLengthError, InvalidRequestError, decode_error
from quire_server.shared.pooling_params import PoolingParams, PoolingTask
from quire_server.shared.sampling_params import SamplingParams

M = TypeVar("M")
PATIENCE_MS = 60_000
PROMPT = list(b"What is a quire?")


def engine_config(path: Path) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(path), path=path, served_model_names=("m",), dtype="float32"),
        cache=CacheConfig(block_size=4),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
        device="cpu",
        num_threads=1,
    )


class Peer:
    """The API process's ends of the two sockets."""

    def __init__(self, to_engine: str, from_engine: str) -> None:
        self._context = zmq.Context()
        self._sender = self._context.socket(zmq.PUSH)
        self._receiver = self._context.socket(zmq.PULL)
        self._sender.bind(to_engine)
        self._receiver.bind(from_engine)

    def send(self, message: ToEngine) -> None:
        self.send_bytes(encode(message))

    def send_bytes(self, frame: bytes) -> None:
        self._sender.send(frame)

    def receive(self) -> FromEngine:
        assert self._receiver.poll(PATIENCE_MS), "the engine says nothing"
        return from_engine_decoder.decode(self._receiver.recv())

    def wait_for(self, kind: type[M]) -> M:
        while True:
            message = self.receive()
            if isinstance(message, kind):
                return message
            assert not isinstance(message, EngineFailed), message

    def outputs_of(self, *request_ids: str) -> dict[str, list[EngineCoreOutput]]:
        """Everything that is said of the requests, up to their ends."""
        found: dict[str, list[EngineCoreOutput]] = {request_id: [] for request_id in request_ids}
        while not all(outputs and outputs[-1].finish_reason for outputs in found.values()):
            for output in self.wait_for(EngineStep).outputs:
                found[output.request_id].append(output)
        return found

    def close(self) -> None:
        self._context.destroy(linger=0)


@dataclass
class Engine:
    """A process and the peer that talks to it."""

    process: EngineProcess
    peer: Peer


StartEngine = Callable[[Path], Engine]


@pytest.fixture
def termination_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "termination.json"
    monkeypatch.setenv(TERMINATION_LOG_ENV, str(path))
    return path


@pytest.fixture
def start() -> Iterator[StartEngine]:
    started: list[Engine] = []

    def start_engine(path: Path) -> Engine:
        process = EngineProcess()
        engine = Engine(process, Peer(process.to_engine, process.from_engine))
        started.append(engine)
        process.configure(engine_config(path))
        return engine

    yield start_engine
    for engine in started:
        engine.process.close()
        engine.peer.close()


def request(request_id: str, *, max_tokens: int = 8, **params: Any) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=PROMPT,
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, **params),
    )


@torch.inference_mode()
def greedy_answer(checkpoint: Path, num_tokens: int) -> list[int]:
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens = list(PROMPT)
    for _ in range(num_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def abort_in_mid_run(peer: Peer, request_id: str) -> FinishReason | None:
    """Return how it ended: the hundred tokens of so small a model may all be there before the abort is."""
    peer.send(AddRequest(request(request_id, max_tokens=100)))
    peer.wait_for(EngineStep)
    peer.send(AbortRequests(request_ids=[request_id, "unknown"]))
    return peer.outputs_of(request_id)[request_id][-1].finish_reason


def test_a_life(llama_checkpoint: Path, start: StartEngine, termination_log: Path) -> None:
    """Ready, requests good and bad, an abort, a heartbeat, and the end that was asked for."""
    engine = start(llama_checkpoint)
    peer = engine.peer

    phases, message = [], peer.receive()
    while isinstance(message, EngineProgress):
        phases.append(message.phase)
        message = peer.receive()
    assert list(dict.fromkeys(phases)) == [Phase.STARTING, Phase.LOADING, Phase.WARMING_UP]
    assert isinstance(message, EngineReady)
    assert (message.max_model_len, message.vocab_size, message.block_size) == (128, 264, 4)
    assert message.num_blocks == 4 * 128 // 4
    assert message.dtype == "float32"
    assert message.device.startswith("cpu (")
    assert message.weights_bytes > 0
    assert message.kv_cache_bytes == (message.num_blocks + 1) * 4 * 2 * 2 * 2 * 8 * 4
    assert message.load_seconds.keys() == {"import", "weights", "kv_cache", "warm_up"}

    os.kill(engine.process.pid, signal.SIGINT)  # Ctrl-C is the API process's business
    peer.send(AddRequest(request("good")))
    outputs = peer.outputs_of("good")["good"]
    tokens = [token_id for output in outputs for token_id in output.new_token_ids]
    assert tokens == greedy_answer(llama_checkpoint, 8)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert len(outputs) == 8

    peer.send(AddRequest(request("too long", max_tokens=1000)))
    peer.send(AddRequest(request("bad bias", logit_bias={264: 1.0})))
    peer.send_bytes(b"\xc1 not msgpack")
    malformed = msgspec.msgpack.decode(encode(AddRequest(request("malformed"))))
    malformed["request"]["params"]["temperature"] = -1.0
    peer.send_bytes(msgspec.msgpack.encode(malformed))
    refused = peer.outputs_of("too long", "bad bias", "malformed")
    for outputs in refused.values():
        assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
    assert "maximum context length is 128 tokens" in str(refused["too long"][0].error)
    assert "264" in str(refused["bad bias"][0].error)
    assert "temperature" in str(refused["malformed"][0].error)
    errors = {request_id: decode_error(outputs[0].error) for request_id, outputs in refused.items() if outputs[0].error}
    assert type(errors["too long"]) is ContextLengthError
    assert {request_id: error.param for request_id, error in errors.items()} == {
        "too long": "max_tokens",
        "bad bias": "logit_bias",
        "malformed": "temperature",
    }

    reasons = (abort_in_mid_run(peer, f"aborted-{attempt}") for attempt in range(50))
    assert FinishReason.ABORT in reasons

    peer.send(AddRequest(request("cached")))
    assert peer.outputs_of("cached")["cached"][0].num_cached_tokens == 12
    peer.send(Call(call_id=5, method=ResetPrefixCache()))
    assert peer.wait_for(Reply) == Reply.succeeded(5, None)
    peer.send(AddRequest(request("not cached")))
    assert peer.outputs_of("not cached")["not cached"][0].num_cached_tokens == 0

    heartbeat = peer.wait_for(EngineStep)
    assert heartbeat.outputs == []
    assert heartbeat.stats.num_running == 0
    assert heartbeat.stats.prefix_cache_hits >= 12

    peer.send(Shutdown())
    assert engine.process.wait(10.0)
    assert engine.process.exit_code == 0
    assert not termination_log.exists()


async def ask_through_the_client(checkpoint: Path) -> None:
    client = EngineClient(EngineProcess(), engine_config(checkpoint))
    await client.start()
    try:
        info = await client.wait_until_ready()
        assert info.max_step_s == 600.0  # a CPU

        pooling = PoolingParams(task=PoolingTask.EMBED)
        asked = client.generate(EngineRequest(request_id="embed", prompt_token_ids=PROMPT, params=pooling))
        (refused,) = [output async for output in asked]
        assert refused.error is not None
        error = decode_error(refused.error)
        assert (type(error), error.status, error.param) == (InvalidRequestError, 400, "task")
        assert "This model generates text" in str(error)

        prompt = [(7 * position) % 256 for position in range(info.max_model_len)]
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        scoring = client.generate(EngineRequest(request_id="score", prompt_token_ids=prompt, params=params))
        outputs = [output async for output in scoring]
        assert [output.finish_reason for output in outputs][-1] is FinishReason.LENGTH
        assert not any(output.new_token_ids for output in outputs)
        scored = [position for output in outputs for position in output.prompt_logprobs]
        assert [position.token_id for position in scored] == prompt[1:]
        expected = prompt_logprobs(checkpoint, prompt)
        assert [position.logprob for position in scored] == pytest.approx(expected, abs=1e-4)

        await client.call(ResetPrefixCache())
    finally:
        await client.stop()
    assert client.death is None


@torch.inference_mode()
def prompt_logprobs(checkpoint: Path, prompt: list[int]) -> list[float]:
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    return logprobs[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])].tolist()


def test_what_the_client_asks_and_hears(llama_checkpoint: Path) -> None:
    """Pooling refused by name, a prompt as long as the context scored, a call answered: through the real sockets."""
    asyncio.run(asyncio.wait_for(ask_through_the_client(llama_checkpoint), PATIENCE_MS / 1000))


def test_corrupt_weights(llama_checkpoint: Path, tmp_path: Path, start: StartEngine, termination_log: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama_checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    engine = start(broken)
    message = engine.peer.receive()
    while isinstance(message, EngineProgress):
        message = engine.peer.receive()
    assert isinstance(message, EngineFailed)
    assert message.message.code == "BadCheckpoint"
    assert "model.safetensors" in message.message.message
    assert engine.process.wait(10.0)
    assert engine.process.exit_code == 1
    assert decode_termination(termination_log.read_bytes()) == message.message


def test_the_engine_does_not_outlive_its_parent(llama_checkpoint: Path, start: StartEngine) -> None:
    """Whatever ended the parent, the pipe that it held is closed."""
    engine = start(llama_checkpoint)
    engine.peer.wait_for(EngineReady)
    assert engine.process._popen.stdin is not None
    engine.process._popen.stdin.close()
    assert engine.process.wait(10.0)


# In this process: failures that a real model does not have.


@dataclass
class FailingRunner:
    """Works until it has to decode."""

    is_asynchronous = False

    error: Exception
    steps: list[SchedulerOutput] = field(default_factory=list)

    def submit(self, scheduler_output: SchedulerOutput) -> CompletedStep:
        self.steps.append(scheduler_output)
        if scheduler_output.scheduled and not scheduler_output.new_requests:
            raise self.error
        return CompletedStep(
            RunnerOutput(sampled_token_ids={each.request_id: [1] for each in scheduler_output.new_requests})
        )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("the kernel broke"), "EngineFailed"),
        (MemoryError(), "OutOfMemory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "OutOfMemory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"), "OutOfMemory"),
    ],
)
def test_a_failing_step_ends_the_engine_and_says_why(
    llama_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    termination_log: Path,
    error: Exception,
    code: str,
) -> None:
    core = EngineCore(
        EngineCoreConfig(kv_cache=small_kv_cache(), max_model_len=128, num_blocks=20, block_size=4),
        FailingRunner(error),
    )
    ready = EngineReady(
        max_model_len=128,
        vocab_size=264,
        num_blocks=19,
        block_size=4,
        dtype="float32",
        device="none",
        weights_bytes=0,
        kv_cache_bytes=0,
        load_seconds={},
    )
    monkeypatch.setattr(
        "quire_server.engine_process.startup.start_engine", lambda *_, **__: SimpleNamespace(core=core, info=ready)
    )
    to_engine, from_engine = f"ipc://{tmp_path}/to", f"ipc://{tmp_path}/from"
    peer = Peer(to_engine, from_engine)
    statuses: list[int] = []
    config = replace(engine_config(llama_checkpoint))
    thread = threading.Thread(target=lambda: statuses.append(run_engine(config, to_engine, from_engine)))
    thread.start()
    peer.wait_for(EngineReady)
    peer.send(AddRequest(request("a")))
    message = peer.receive()
    while not isinstance(message, EngineFailed):
        message = peer.receive()
    thread.join(10.0)
    peer.close()
    assert statuses == [1]
    assert (message.message.code, message.message.stage) == (code, "Serving")
    assert type(error).__name__ in message.message.message
    assert decode_termination(termination_log.read_bytes()) == message.message

"""An engine process that speaks the messages and computes nothing. Its one argument says how it behaves.

`num_preemptions` in its statistics counts the aborts that it was sent, and `num_steps` the steps with outputs.
"""

import os
import signal
import sys

import zmq

from quire_contract.phases import Phase
from quire_contract.termination import TerminationMessage
from quire_server.engine.border.calls import Call, Reply
from quire_server.engine.border.launch import receive_launch
from quire_server.engine.border.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineStep,
    FromEngine,
    Shutdown,
    encode,
    to_engine_decoder,
)
from quire_server.engine.output import EngineCoreOutput, SchedulerStats
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.shared.errors import InternalError, UnavailableError

READY = EngineReady(
    max_model_len=512,
    vocab_size=300,
    num_blocks=64,
    block_size=16,
    dtype="float32",
    device="fake",
    weights_bytes=1,
    kv_cache_bytes=1,
    load_seconds={"weights": 0.5},
)


class FakeEngine:
    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour
        launch = receive_launch()
        self.context = zmq.Context()
        self.inbox, self.outbox = self.context.socket(zmq.PULL), self.context.socket(zmq.PUSH)
        self.outbox.connect(launch.from_engine)
        if behaviour == "hears-late":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        else:
            self.inbox.connect(launch.to_engine)
        self.to_engine = launch.to_engine
        self.running: dict[str, tuple[EngineRequest, int]] = {}
        self.num_aborts = self.num_steps = 0

    def send(self, message: FromEngine) -> None:
        self.outbox.send(encode(message))

    def say_last(self, message: FromEngine) -> None:
        """Send, and return once it is out: a socket that is only closed leaves that to a thread, which dies too."""
        self.send(message)
        self.inbox.close(linger=0)
        self.outbox.close(linger=2000)
        self.context.term()

    def step(self, outputs: list[EngineCoreOutput]) -> None:
        self.num_steps += bool(outputs)
        stats = SchedulerStats(
            num_running=len(self.running),
            num_preemptions=self.num_aborts,
            num_steps=self.num_steps,
            step_num_tokens=len(outputs),
        )
        self.send(EngineStep(outputs=outputs, stats=stats, time=100.0 + self.num_steps))

    def run(self) -> int:
        self.send(EngineProgress(phase=Phase.LOADING, message="Loading the weights", percent=50.0))
        if self.behaviour == "fails-to-load":
            message = TerminationMessage(code="OutOfMemory", stage="Loading", message="too big", need_bytes=2)
            self.say_last(EngineFailed(message))
            return 1
        if self.behaviour == "exits-while-loading":
            return 7
        if self.behaviour == "never-ready":
            signal.pause()
        self.send(READY)
        if self.behaviour == "hears-late":
            signal.sigwait({signal.SIGUSR1})
            self.inbox.connect(self.to_engine)
            self.behaviour = "echo"
        if self.behaviour == "silent":
            signal.pause()
        while True:
            if self.inbox.poll(0 if self.running and self.behaviour in ("echo", "branches") else 20):
                message = to_engine_decoder.decode(self.inbox.recv())
                if isinstance(message, Shutdown):
                    return 0
                self.take(message)
            next_outputs = self.next_of_branches if self.behaviour == "branches" else self.next_output
            self.step([output for request_id in list(self.running) for output in next_outputs(request_id)])

    def take(self, message: object) -> None:
        if isinstance(message, AbortRequests):
            self.num_aborts += len(message.request_ids)
            live = [request_id for request_id in message.request_ids if self.running.pop(request_id, None)]
            self.step([EngineCoreOutput(request_id=each, finish_reason=FinishReason.ABORT) for each in live])
        elif isinstance(message, AddRequest):
            self.running[message.request.request_id] = (message.request, 0)
        elif isinstance(message, Call):
            self.answer(message.call_id)

    def answer(self, call_id: int) -> None:
        """Do what is asked; `holds` never says that it did."""
        if self.behaviour == "refuses-calls":
            self.send(Reply.failed(call_id, UnavailableError("Not now.", retry_after_s=3.0)))
        elif self.behaviour == "fails-calls":
            self.send(Reply.failed(call_id, InternalError("A bug.")))
        elif self.behaviour != "holds":
            self.send(Reply.succeeded(call_id, None))

    def next_of_branches(self, request_id: str) -> list[EngineCoreOutput]:
        """A token for each branch: branch b says the prompt, each token b higher, without its last b tokens.

        A prompt that begins with 66 goes wrong as a whole when its first branch has ended.
        """
        request, num_done = self.running[request_id]
        self.running[request_id] = (request, num_done + 1)
        prompt = request.prompt_token_ids
        lengths = {branch: len(prompt) - branch for branch in range(request.num_branches)}
        outputs = [
            EngineCoreOutput(
                request_id=request_id,
                branch=branch,
                new_token_ids=[prompt[num_done] + branch],
                finish_reason=FinishReason.LENGTH if num_done + 1 == length else None,
            )
            for branch, length in lengths.items()
            if num_done < length
        ]
        if prompt[0] == 66 and any(output.finish_reason for output in outputs):
            outputs.append(EngineCoreOutput.failed(request_id, UnavailableError("Out of room.")))
        if num_done + 1 == len(prompt) or outputs[-1].error:
            del self.running[request_id]
        return outputs

    def next_output(self, request_id: str) -> list[EngineCoreOutput]:
        """The prompt, token by token; then the end. All but `echo` give one token and no more."""
        request, num_done = self.running[request_id]
        if num_done and self.behaviour != "echo":
            self.misbehave()
            return []
        self.running[request_id] = (request, num_done + 1)
        is_last = num_done + 1 == min(len(request.prompt_token_ids), request.sampling_params.max_tokens or 0)
        if is_last and self.behaviour == "echo":
            del self.running[request_id]
        return [
            EngineCoreOutput(
                request_id=request_id,
                new_token_ids=[request.prompt_token_ids[num_done]],
                finish_reason=FinishReason.LENGTH if is_last and self.behaviour == "echo" else None,
                num_cached_tokens=3,
                scheduled_time=request.arrival_time + 1.0,
            )
        ]

    def misbehave(self) -> None:
        if self.behaviour == "dies":
            os._exit(3)
        if self.behaviour == "is-killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour == "fails":
            self.say_last(
                EngineFailed(TerminationMessage(code="EngineFailed", stage="Serving", message="ValueError: bad"))
            )
            os._exit(1)
        if self.behaviour == "garbles":
            self.outbox.send(b"\xc1 not msgpack")


if __name__ == "__main__":
    sys.exit(FakeEngine(sys.argv[1]).run())

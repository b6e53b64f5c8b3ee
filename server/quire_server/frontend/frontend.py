"""What request handlers work with: the configuration, the engine, and, once it is loaded, the model's tokenizer.

Joins `EngineClient` (token ids), `OutputProcessor` (text) and `ServerMetrics` for one request at a time. Knows no HTTP.
"""

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from quire_contract.phases import Phase, Readiness
from quire_server.engine.border.client import LOADING_RETRY_AFTER_S, EngineClient
from quire_server.engine.border.messages import EngineReady
from quire_server.engine.border.output_stream import OutputStream
from quire_server.engine.request import EngineRequest
from quire_server.frontend.metrics import RequestTimer, ServerMetrics
from quire_server.frontend.output_processor import CompletionDelta, OutputProcessor
from quire_server.frontend.text_lanes import CHARS_PER_TOKEN, TextLanes
from quire_server.frontend.text_limits import TextLimits
from quire_server.shared.config import ServerConfig
from quire_server.shared.errors import ModelLoadingError
from quire_server.shared.logs import request_id_context
from quire_server.tokens.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class CompletionStream:
    """Async iterator over one completion's deltas; closing it before its end aborts the request in the engine.

    Raises, while iterating:
        EngineDeadError, DrainingError: the completion ends without its last delta.
    """

    def __init__(
        self, outputs: OutputStream, processor: OutputProcessor, timer: RequestTimer, lanes: TextLanes
    ) -> None:
        self._outputs = outputs
        self._processor = processor
        self._timer = timer
        self._lanes = lanes

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> CompletionDelta:
        if self._processor.is_finished:
            raise StopAsyncIteration
        output = await self._outputs.__anext__()
        if output.prompt_logprobs:  # of a whole step's tokens at once
            num_entries = len(output.prompt_logprobs) * (1 + len(output.prompt_logprobs[-1].top))
            delta = await self._lanes.run(num_entries, lambda: self._processor.process(output))
        else:
            delta = self._processor.process(output)
        self._timer.observe(delta, output.scheduled_time, time.time())
        if delta.finish_reason is not None:
            self._outputs.end_branch(delta.branch)  # where a stop string ended the last one, this aborts the request
        return delta

    async def aclose(self) -> None:
        self._outputs.close()
        self._timer.close(time.time())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Frontend:
    """One served model, from the first second of the process to its last."""

    def __init__(self, config: ServerConfig, client: EngineClient, metrics: ServerMetrics) -> None:
        self.config = config
        self.client = client
        self.metrics = metrics
        self.created = int(time.time())
        scheduler = config.engine.scheduler
        self.lanes = TextLanes(max_waiting=scheduler.max_num_seqs + scheduler.max_num_queued_reqs)
        """Where work goes whose length a client chooses."""
        self._tokenizer: Tokenizer | None = None
        self._generation_defaults: Mapping[str, Any] = {}

    def set_model(self, tokenizer: Tokenizer, generation_defaults: Mapping[str, Any]) -> None:
        """Make the model's texts available; called once, when they are loaded."""
        self._tokenizer = tokenizer
        self._generation_defaults = generation_defaults

    @property
    def readiness(self) -> Readiness:
        """The engine's, but not Ready before the tokenizer is."""
        readiness = self.client.readiness
        if readiness.phase is Phase.READY and self._tokenizer is None:
            return Readiness(phase=Phase.LOADING, message="Loading the tokenizer")
        return readiness

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ModelLoadingError: it is not loaded yet.
        """
        if self._tokenizer is None:
            phase = self.readiness.phase
            raise ModelLoadingError(f"The model is not ready yet (phase {phase}).", retry_after_s=LOADING_RETRY_AFTER_S)
        return self._tokenizer

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """Sampling parameters of the model's generation_config.json (temperature, top_p, top_k, min_p,
        repetition_penalty, max_tokens); empty with `--generation-config vllm`."""
        return self._generation_defaults

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together.

        Raises:
            ModelLoadingError: the engine is not ready yet.
        """
        return self._info().max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below it. Raises ModelLoadingError: the engine is not ready yet."""
        return self._info().vocab_size

    def _info(self) -> EngineReady:
        if self.client.info is None:
            raise ModelLoadingError("The model is not ready yet.", retry_after_s=LOADING_RETRY_AFTER_S)
        return self.client.info

    async def encode(
        self, text: str, *, add_special_tokens: bool = True, is_cut: bool = False, param: str = "prompt"
    ) -> list[int]:
        """Tokenise without holding up the event loop. With `is_cut` the ids need not fit the model's context.

        Raises:
            ContextLengthError: the text is too long, whatever its tokens turn out to be; it was not tokenised.
            QueueFullError: too many long texts wait.
        """
        tokenizer, max_model_len = self.tokenizer, self.max_model_len
        limits = TextLimits.of(max_model_len, tokenizer.max_bytes_per_token, is_cut=is_cut)
        limits.check(text, param)
        encode = functools.partial(tokenizer.encode, text, add_special_tokens, limits.max_tokens)
        return await self.lanes.run(len(text), encode)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids without holding up the event loop."""
        decode = functools.partial(self.tokenizer.decode, token_ids, skip_special_tokens)
        return await self.lanes.run(len(token_ids) * CHARS_PER_TOKEN, decode)

    def generate(self, request: EngineRequest) -> CompletionStream:
        """Send a request to the engine and iterate over its deltas.

        Raises (here, before any delta): what `EngineClient.generate` raises.
        """
        request_id_context.set(request.request_id)
        processor = OutputProcessor(self.tokenizer, request)
        outputs = self.client.generate(request)
        if self.config.log_requests:
            log.info("Took request: prompt_tokens=%d %s", len(request.prompt_token_ids), request.params)
        return CompletionStream(outputs, processor, self.metrics.start_request(request), self.lanes)

"""Executes a step: removals, block movement, additions, the model, sampling.

Owns the batch state, the sampler and the KV tensors of one device, and the paths by which the model may run. Decides
nothing: who runs, with how many tokens and in which blocks is in the `SchedulerOutput`. One step at a time, from one
thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quire_contract.memory.fit import logits_chunk_rows
from quire_server.engine.output import TokenLogprobs
from quire_server.engine.step import CompletedStep, RunnerOutput, SchedulerOutput
from quire_server.models.attention import KVCache
from quire_server.models.decoder import DecoderModel
from quire_server.runner.forward_path import EagerPath, ForwardPath
from quire_server.runner.input_batch import BatchState, InputBatch, IntArray
from quire_server.runner.kv_cache import KVCacheStorage
from quire_server.runner.logprobs import build_token_logprobs
from quire_server.runner.recorded_path import RecordedPath
from quire_server.runner.sampler import Sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """Sizes of the runner's tables."""

    max_num_seqs: int
    max_model_len: int
    block_size: int
    seed: int
    enable_recording: bool = True
    """Replay decode steps where the device and the model allow it; off, for comparison."""


class ModelRunner:
    """The `Runner` of one device."""

    is_asynchronous = False
    """Whether `submit` returns before the device has done the step."""

    def __init__(
        self,
        model: DecoderModel,
        storage: KVCacheStorage,
        config: RunnerConfig,
        *,
        device: torch.device,
        host_storage: KVCacheStorage | None = None,
    ) -> None:
        self._model = model
        self._storage = storage
        self._host_storage = host_storage
        self._device = device
        self._logits_chunk_rows = logits_chunk_rows(model.spec.vocab_size)
        self._state = BatchState(
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            device=device,
        )
        self._sampler = Sampler(max_num_seqs=config.max_num_seqs, seed=config.seed)
        self._paths = _build_paths(model, storage.layers, config, device)

    def submit(self, scheduler_output: SchedulerOutput) -> CompletedStep:
        """Run one step: the result is simply there."""
        return CompletedStep(self.execute(scheduler_output))

    @torch.inference_mode()
    def execute(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        """Run one step and return the tokens of the requests that sample in it."""
        for request_id in scheduler_output.removed_request_ids:
            self._remove(request_id)
        if scheduler_output.block_copies or scheduler_output.swap_out or scheduler_output.swap_in:
            self._storage.move(
                self._host_storage,
                block_copies=scheduler_output.block_copies,
                swap_out=scheduler_output.swap_out,
                swap_in=scheduler_output.swap_in,
            )
        for request in scheduler_output.new_requests:
            self._sampler.add(self._state.add(request), request)
        if not scheduler_output.scheduled:
            return RunnerOutput()
        batch = self._state.build(scheduler_output.scheduled)
        path = next(path for path in self._paths if path.takes(batch))
        output = path.run(batch)
        prompt_logprobs: dict[str, Sequence[TokenLogprobs]] = {}
        if batch.wants_hidden:
            assert output.hidden is not None, "a path that takes such a batch keeps them"
            prompt_logprobs = self._build_prompt_logprobs(batch, output.hidden)
        if output.logits is None:
            return RunnerOutput(prompt_logprobs=prompt_logprobs)
        return self._sample(batch, output.logits, prompt_logprobs)

    def _remove(self, request_id: str) -> None:
        row = self._state.remove(request_id)
        if row is not None:
            self._sampler.remove(row)

    def _sample(
        self, batch: InputBatch, logits: torch.Tensor, prompt_logprobs: dict[str, Sequence[TokenLogprobs]]
    ) -> RunnerOutput:
        rows = batch.rows[batch.sampled]
        output_positions = self._state.num_tokens[rows] - self._state.num_prompt_tokens[rows]
        sampled = self._sampler.sample(logits, rows, output_positions)
        self._state.append_tokens(rows, sampled.token_ids)
        request_ids = [batch.request_ids[index] for index in batch.sampled.tolist()]
        return RunnerOutput(
            sampled_token_ids={
                request_id: [token_id]
                for request_id, token_id in zip(request_ids, sampled.token_ids.tolist(), strict=True)
            },
            logprobs={request_ids[index]: [logprobs] for index, logprobs in sampled.logprobs.items()},
            prompt_logprobs=prompt_logprobs,
        )

    def _build_prompt_logprobs(self, batch: InputBatch, hidden: torch.Tensor) -> dict[str, Sequence[TokenLogprobs]]:
        """For the requests that asked: how likely each prompt token was after the position before it."""
        result: dict[str, Sequence[TokenLogprobs]] = {}
        for index, request_id in enumerate(batch.request_ids):
            row = int(batch.rows[index])
            num_top = self._state.num_prompt_logprobs.get(row)
            if num_top is None:
                continue
            first = int(batch.context_lens[index])
            num_positions = min(int(batch.query_lens[index]), int(self._state.num_prompt_tokens[row]) - 1 - first)
            if num_positions > 0:
                start = int(batch.query_start_loc[index])
                targets = self._state.token_ids[row, first + 1 : first + 1 + num_positions].astype(np.int64)
                result[request_id] = self._score(hidden[start : start + num_positions], targets, num_top)
        return result

    def _score(self, hidden: torch.Tensor, targets: IntArray, num_top: int) -> list[TokenLogprobs]:
        """In chunks, so that memory does not grow with the prompt times the vocabulary."""
        scored: list[TokenLogprobs] = []
        for start in range(0, len(targets), self._logits_chunk_rows):
            chunk = targets[start : start + self._logits_chunk_rows]
            logits = self._model.compute_logits(hidden[start : start + len(chunk)])
            scored += build_token_logprobs(logits, self._index(chunk), [num_top] * len(chunk))
        return scored

    def _index(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _build_paths(
    model: DecoderModel, kv_caches: Sequence[KVCache], config: RunnerConfig, device: torch.device
) -> tuple[ForwardPath, ...]:
    """The ways to run a step on this device, the fastest first; the last one takes any step."""
    eager = EagerPath(model, kv_caches)
    if device.type != "cpu" or not config.enable_recording:
        return (eager,)
    max_blocks_per_seq = -(-config.max_model_len // config.block_size)
    recorded = RecordedPath(model, kv_caches, max_num_seqs=config.max_num_seqs, max_blocks_per_seq=max_blocks_per_seq)
    return (recorded, eager)

"""What a step's result means for one request. Pure but for the request, whose tokens it appends.

Goes by the share that the step carried, never by what the scheduler has decided since.
"""

from collections.abc import Sequence
from typing import NamedTuple

from quire_server.engine.finish import Finish, find_finish
from quire_server.engine.output import EngineCoreOutput, TokenLogprobs
from quire_server.engine.request import FinishReason, Request
from quire_server.engine.step import RunnerOutput, ScheduledRequest


class Progress(NamedTuple):
    """What a step has brought."""

    new_token_ids: list[int]
    """Up to the one that ends the request."""
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    """Those that have not been sent before."""
    is_first: bool
    """The request had no output before."""
    finish: Finish | None


def record_progress(
    request: Request, share: ScheduledRequest, runner_output: RunnerOutput, max_model_len: int
) -> Progress:
    """Append what a step sampled, settle what was in flight, and say whether the request is over.

    Raises:
        RuntimeError: the runner did not do what it was told.
    """
    sampled_token_ids = runner_output.sampled_token_ids.get(share.request_id, ())
    if not min(share.num_samples, 1) <= len(sampled_token_ids) <= share.num_samples:
        raise RuntimeError(
            f"The runner sampled {len(sampled_token_ids)} tokens for request {share.request_id}, of which at most "
            f"{share.num_samples} were asked for after {share.first_position + share.num_tokens} tokens."
        )
    is_first = request.num_output_tokens == 0
    _settle(request, share, len(sampled_token_ids))
    new_token_ids, finish = _append(request, sampled_token_ids, max_model_len)
    if request.num_pending_tokens == 0:  # else the tokens that they guess at are being sampled already
        request.draft_token_ids = runner_output.draft_token_ids.get(share.request_id, ())
    return Progress(
        new_token_ids=new_token_ids,
        logprobs=list(runner_output.logprobs.get(share.request_id, ())[: len(new_token_ids)]),
        prompt_logprobs=_take_prompt_logprobs(request, share.first_position, runner_output),
        is_first=is_first,
        finish=finish,
    )


def build_output(request: Request, progress: Progress) -> EngineCoreOutput | None:
    """Tell a request's client what a step brought; None where it brought nothing to tell."""
    if not (progress.new_token_ids or progress.prompt_logprobs or progress.finish):
        return None
    reason, stop_reason = progress.finish or (None, None)
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=progress.new_token_ids,
        logprobs=progress.logprobs,
        prompt_logprobs=progress.prompt_logprobs,
        finish_reason=reason,
        stop_reason=stop_reason,
        num_cached_tokens=request.num_cached_tokens if progress.is_first else 0,
        scheduled_time=request.scheduled_time if progress.is_first else None,
    )


def _settle(request: Request, share: ScheduledRequest, num_sampled: int) -> None:
    """Take the step out of what is in flight. Drafts that were wrong were computed for nothing."""
    request.num_pending_tokens -= share.num_samples
    if share.draft_token_ids:
        request.has_drafts_in_flight = False
        request.num_computed_tokens -= share.num_samples - num_sampled


def _append(request: Request, sampled_token_ids: Sequence[int], max_model_len: int) -> tuple[list[int], Finish | None]:
    """Append sampled tokens, up to the one that ends the request. Returns those appended."""
    if sampled_token_ids and request.max_tokens == 0:
        return [], Finish(FinishReason.LENGTH)
    new_token_ids: list[int] = []
    for token_id in sampled_token_ids:
        request.token_ids.append(token_id)
        new_token_ids.append(token_id)
        finish = find_finish(request, max_model_len)
        if finish is not None:
            return new_token_ids, finish
    return new_token_ids, None


def _take_prompt_logprobs(request: Request, first_position: int, runner_output: RunnerOutput) -> list[TokenLogprobs]:
    if request.sampling_params.prompt_logprobs is None:
        return []
    computed = runner_output.prompt_logprobs.get(request.request_id, ())
    new = list(computed[max(0, request.num_sent_prompt_logprobs - first_position) :])
    request.num_sent_prompt_logprobs += len(new)
    return new

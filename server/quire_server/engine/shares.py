"""How many tokens a request gets in a step. Pure functions of one request and the configuration.

A request's tokens are those that are known, those that steps in flight will add (`num_pending_tokens`), and guesses for
the ones after them (`draft_token_ids`). What is computed chases all of these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from quire_server.engine.request import Request
from quire_server.shared.config import SchedulerConfig


class Share(NamedTuple):
    """What one request gets in one step."""

    num_tokens: int
    """Drafts included; 0: nothing now."""
    draft_token_ids: Sequence[int] = ()
    num_samples: int = 0


NOTHING = Share(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareRules:
    """Limits on what one request gets."""

    max_num_batched_tokens: int
    max_chunk: int
    """Most tokens that one request gets in one step."""
    is_chunked: bool
    max_model_len: int

    @classmethod
    def from_config(cls, config: SchedulerConfig, max_model_len: int) -> "ShareRules":
        threshold = config.long_prefill_token_threshold if config.enable_chunked_prefill else 0
        return cls(
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_chunk=threshold or config.max_num_batched_tokens,
            is_chunked=config.enable_chunked_prefill,
            max_model_len=max_model_len,
        )


def share_of_running(rules: ShareRules, request: Request, token_budget: int) -> Share:
    """Return the next share of a running request; nothing where it has to wait for what is in flight."""
    if request.has_drafts_in_flight or is_complete_in_flight(rules, request):
        return NOTHING
    num_left = request.num_tokens + request.num_pending_tokens - request.num_computed_tokens
    return _share(rules, request, num_left, token_budget)


def share_of_waiting(rules: ShareRules, request: Request, num_cached_tokens: int, token_budget: int) -> Share:
    """Return the first share of a request that is let in; nothing where it has to wait for a step with more budget.

    Without chunked prefill a prompt goes whole or waits; one that is longer than any step's budget goes in pieces.
    """
    num_left = request.num_tokens - num_cached_tokens
    is_splittable = rules.is_chunked or num_left > rules.max_num_batched_tokens
    if num_left > token_budget and not is_splittable:
        return NOTHING
    return _share(rules, request, num_left, token_budget)


def without_drafts(share: Share) -> Share:
    """Return the same share, but of known tokens alone."""
    return Share(share.num_tokens - len(share.draft_token_ids), (), min(share.num_samples, 1))


def is_complete_in_flight(rules: ShareRules, request: Request) -> bool:
    """Say whether the steps in flight end the request, whatever tokens they bring."""
    return 0 < request.num_pending_tokens >= _num_outputs_wanted(rules, request)


def _share(rules: ShareRules, request: Request, num_left: int, token_budget: int) -> Share:
    limit = min(rules.max_chunk, token_budget)
    if num_left > limit:
        return Share(limit)
    drafts = request.draft_token_ids[: min(limit - num_left, _num_useful_drafts(rules, request))]
    return Share(num_left + len(drafts), drafts, 1 + len(drafts))


def _num_outputs_wanted(rules: ShareRules, request: Request) -> int:
    """Tokens that can still be added to those that are known. Where none is asked for, one is made and dropped."""
    num_wanted = max(request.max_tokens, 1) - request.num_output_tokens
    return min(num_wanted, rules.max_model_len - request.num_tokens)


def _num_useful_drafts(rules: ShareRules, request: Request) -> int:
    return max(_num_outputs_wanted(rules, request) - request.num_pending_tokens - 1, 0)

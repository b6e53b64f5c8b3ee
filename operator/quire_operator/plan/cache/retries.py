"""When a download that has failed is tried again: after a while, longer each time, or when a person asks for it.

A person asks by the annotation `quire.dev/retry-at`, a time: a try that failed before it is made again from then on. So
whoever has mended what the operator may not see, a Secret or the hub's side, need not wait. A time, because several
LLMDeployments may share one download: each asks once, whatever the others say.
"""

from typing import Final

from quire_contract.names import ANNOTATION_RETRY_AT
from quire_kube.objects import Manifest, annotation_of
from quire_kube.times import parse_time
from quire_operator.spec.llm_deployment import SpecError

_BACKOFF_S: Final = 15.0
_MAX_BACKOFF_S: Final = 300.0


def read_retry_at(manifest: Manifest) -> float | None:
    """Return when a person wants a failed download to be tried again; None where nobody does.

    Raises:
        SpecError: the annotation is no time.
    """
    text = annotation_of(manifest, ANNOTATION_RETRY_AT)
    asked_at = parse_time(text)
    if text is not None and asked_at is None:
        path = f"metadata.annotations[{ANNOTATION_RETRY_AT}]"
        raise SpecError(path, "must be a time such as 2026-01-31T12:00:00Z, which `date -u +%FT%TZ` prints; correct it")
    return asked_at


def due_at(failed_at: float, attempt: int, asked_at: float | None) -> float:
    """Return when a try that failed is made again."""
    after_pause = failed_at + min(_MAX_BACKOFF_S, _BACKOFF_S * 2.0 ** (attempt - 1))
    return after_pause if asked_at is None or asked_at <= failed_at else min(after_pause, asked_at)

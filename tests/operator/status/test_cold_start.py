"""Cold starts, measured from the times in pods and in the download Job."""

from typing import Any

import pytest

from quire_kube.times import format_time
from quire_operator.status.cold_start import MAX_RECENT, derive_cold_start, measure_start

BASE = 1_763_722_800  # 2025-11-21T11:00:00Z


def _at(seconds: float) -> str:
    return format_time(BASE + seconds)


def _pod(
    uid: str, *, at: float = 0.0, schedule: float = 1.0, pull: float = 4.0, load: float = 20.0, **container: Any
) -> dict[str, Any]:
    started = at + schedule + pull
    return {
        "metadata": {"name": f"p-{uid}", "uid": uid, "creationTimestamp": _at(at)},
        "status": {
            "conditions": [
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": _at(at + schedule)},
                {"type": "Ready", "status": "True", "lastTransitionTime": _at(started + load)},
            ],
            "containerStatuses": [
                {"name": "server", "restartCount": 0, "state": {"running": {"startedAt": _at(started)}}} | container
            ],
        },
    }


def _job(start: float, end: float) -> dict[str, Any]:
    return {"metadata": {"name": "j"}, "status": {"startTime": _at(start), "completionTime": _at(end)}}


def test_the_stages_of_a_start() -> None:
    assert derive_cold_start(None, [_pod("a")], None) == {
        "lastSeconds": 25.0,
        "p50Seconds": 24.0,
        "recentSeconds": [24.0],
        "stages": {"schedule": 1.0, "pull": 4.0, "load": 20.0},
        "pod": "a",
        "podStartedAt": _at(5),
    }


def test_a_wait_for_a_node_is_not_expected_of_the_next_start() -> None:
    result = derive_cold_start(None, [_pod("a", schedule=7200.0)], None)
    assert result is not None
    assert (result["lastSeconds"], result["p50Seconds"]) == (7224.0, 24.0)


def test_a_pod_is_counted_once() -> None:
    pod = _pod("a")
    once = derive_cold_start(None, [pod], None)
    assert derive_cold_start(once, [pod], None) == once
    flipped = _pod("a", load=500.0)  # unready, and ready again much later
    assert derive_cold_start(once, [flipped], None) == once
    assert derive_cold_start(once, [], None) == once


def test_many_pods_are_counted_once_each_in_any_order() -> None:
    pods = [_pod(f"u{index}", at=index % 3, load=10.0 + index) for index in range(8)]
    once = derive_cold_start(None, pods, None)
    assert once is not None
    assert len(once["recentSeconds"]) == MAX_RECENT
    assert derive_cold_start(once, list(reversed(pods)), None) == once
    for pod in pods:
        assert derive_cold_start(once, [pod], None) == once


def test_the_median_is_over_the_last_five() -> None:
    result: dict[str, Any] | None = None
    for index, load in enumerate((1000.0, 6.0, 26.0, 16.0, 46.0, 36.0)):
        result = derive_cold_start(result, [_pod(f"u{index}", at=100.0 * index, load=load)], None)
    assert result is not None
    assert result["recentSeconds"] == [10.0, 30.0, 20.0, 50.0, 40.0]
    assert result["p50Seconds"] == 30.0


@pytest.mark.parametrize(
    "pod",
    [
        _pod("a", restartCount=1),
        _pod("a", state={"waiting": {"reason": "CrashLoopBackOff"}}),
        {"metadata": {"name": "p", "uid": "a"}},
        _pod("a") | {"metadata": {"name": "p", "uid": "a", "creationTimestamp": "yesterday"}},
    ],
    ids=["restarted", "not running", "new", "unreadable"],
)
def test_what_is_no_clean_start_is_not_counted(pod: dict[str, Any]) -> None:
    assert measure_start(pod) is None
    assert derive_cold_start(None, [pod], None) is None


def test_a_download_belongs_to_the_first_pod_after_it() -> None:
    job = _job(0, 90)
    waiting = derive_cold_start(None, [], job)
    assert waiting == {"stages": {"download": 90.0}}
    first = derive_cold_start(waiting, [_pod("a", at=92)], job)
    assert first is not None
    assert first["stages"] == {"schedule": 1.0, "pull": 4.0, "load": 20.0, "download": 90.0}
    assert first["recentSeconds"] == [24.0]
    assert derive_cold_start(first, [_pod("a", at=92)], job) == first
    second = derive_cold_start(first, [_pod("b", at=500)], None)
    assert second is not None
    assert "download" not in second["stages"]


def test_a_download_whose_job_is_deleted_before_it_knows_of_its_end() -> None:
    job = {"metadata": {"name": "j"}, "status": {"startTime": _at(0)}}
    failed = {"metadata": {"name": "a"}, "status": {"phase": "Failed"}}
    ended = {"state": {"terminated": {"exitCode": 0, "finishedAt": _at(75)}}}
    done = {"metadata": {"name": "b"}, "status": {"phase": "Running", "containerStatuses": [ended]}}
    assert derive_cold_start(None, [], job, [failed]) is None
    assert derive_cold_start(None, [], job, [failed, done]) == {"stages": {"download": 75.0}}


def test_a_running_download_is_not_measured() -> None:
    assert derive_cold_start(None, [], {"metadata": {"name": "j"}, "status": {"startTime": _at(0)}}) is None

"""How conditions are written: their times, their generations, and what an API server accepts."""

from typing import Any

from quire_operator.status.conditions import ACCEPTED, FITS, READY, Condition, find_condition, write_conditions

NOW, LATER = 1_763_722_800.0, 1_763_726_400.0
AT_NOW, AT_LATER = "2025-11-21T11:00:00Z", "2025-11-21T12:00:00Z"


def _write(*conditions: Condition, old: Any = None, generation: int = 1, now: float = NOW) -> dict[str, dict[str, Any]]:
    written = write_conditions(conditions, {"conditions": old or []}, generation, now)
    return {condition["type"]: condition for condition in written}


def _ready(holds: bool | None, reason: str = "Because", message: str = "m") -> Condition:
    return Condition(type=READY, holds=holds, reason=reason, message=message)


def _accepted(holds: bool) -> Condition:
    return Condition(type=ACCEPTED, holds=holds, reason="Checked", message="")


def test_time_moves_only_with_status() -> None:
    first = _write(_ready(False))
    assert first[READY] == {
        "type": READY,
        "status": "False",
        "observedGeneration": 1,
        "lastTransitionTime": AT_NOW,
        "reason": "Because",
        "message": "m",
    }
    old = list(first.values())
    other_reason = _write(_ready(False, "Other", "n"), old=old, generation=2, now=LATER)[READY]
    assert (other_reason["lastTransitionTime"], other_reason["reason"]) == (AT_NOW, "Other")
    assert other_reason["observedGeneration"] == 2
    assert _write(_ready(True), old=old, now=LATER)[READY]["lastTransitionTime"] == AT_LATER
    assert _write(_ready(None), old=old, now=LATER)[READY]["lastTransitionTime"] == AT_LATER


def test_an_old_condition_without_a_time_gets_one() -> None:
    old = [{"type": READY, "status": "False"}]
    assert _write(_ready(False), old=old)[READY]["lastTransitionTime"] == AT_NOW


def test_what_is_said_of_the_pods_while_a_spec_is_refused_is_about_the_accepted_one() -> None:
    old = list(_write(_accepted(True), _ready(True), generation=3).values())
    refused = _write(_accepted(False), _ready(True), old=old, generation=4, now=LATER)
    assert (refused[ACCEPTED]["observedGeneration"], refused[READY]["observedGeneration"]) == (4, 3)
    again = _write(_accepted(False), _ready(False), old=list(refused.values()), generation=5)
    assert again[READY]["observedGeneration"] == 3
    mended = _write(_accepted(True), _ready(True), old=list(again.values()), generation=6)
    assert mended[READY]["observedGeneration"] == 6


def test_a_first_spec_that_is_refused_is_what_everything_is_about() -> None:
    assert _write(_accepted(False), _ready(False), generation=1)[READY]["observedGeneration"] == 1


def test_what_is_not_asked_of_a_refused_spec_stays_as_it_was() -> None:
    fits = Condition(type=FITS, holds=True, reason="Fits", message="64 sequences.")
    old = list(_write(_accepted(True), fits, generation=3).values())
    not_asked = Condition(type=FITS, holds=None, reason="NotAccepted", message="")
    assert _write(_accepted(False), not_asked, old=old, generation=4, now=LATER)[FITS] == old[1]
    assert _write(_accepted(True), not_asked, old=old, generation=4, now=LATER)[FITS]["status"] == "Unknown"


def test_reason_and_message_are_what_an_api_server_accepts() -> None:
    written = _write(_ready(False, "Out of/cpu", "a\nb\x00c" + "x" * 9000))[READY]
    assert written["reason"] == "Outofcpu"
    assert written["message"].startswith("a b c")
    assert len(written["message"]) == 4096


def test_finding_a_condition() -> None:
    assert find_condition(None, READY) == {}
    assert find_condition({}, READY) == {}
    assert find_condition({"conditions": [{"type": READY, "status": "True"}]}, READY)["status"] == "True"

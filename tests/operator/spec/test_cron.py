"""Five cron fields, or what is wrong with them."""

import pytest

from quire_operator.spec.cron import find_cron_problem


@pytest.mark.parametrize(
    "text",
    ["* * * * *", "0 8 * * 1-5", "*/15 0-6,22,23 1-31/2 jan-mar mon,WED", "59 23 31 12 7", "5/10 * * * sun"],
)
def test_schedules(text: str) -> None:
    assert find_cron_problem(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("60 * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("* * 0 * *", "day of the month"),
        ("* * * 13 *", "month"),
        ("* * * * 8", "day of the week"),
        ("* * * * fun", "day of the week"),
        ("*/0 * * * *", "minute"),
        ("9-5 * * * *", "minute"),
        ("1,,2 * * * *", "minute"),
        ("-1 * * * *", "minute"),
        ("² * * * *", "minute"),
        ("* * * *", "has 4 fields"),
    ],
)
def test_what_is_none(text: str, expected: str) -> None:
    problem = find_cron_problem(text)
    assert problem is not None
    assert expected in problem

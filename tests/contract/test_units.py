"""Durations and quantities as Kubernetes writes them."""

from fractions import Fraction

import pytest

from quire_contract.units import UnitError, format_bytes, parse_duration, parse_quantity


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30.0), ("5m", 300.0), ("1h30m", 5400.0), ("500ms", 0.5), ("0s", 0.0), ("1h1m1s1ms", 3661.001)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "s", "1d", "-5s", "1.5h", "5m ", "auto", "5 m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UnitError, match=r"is not a duration such as 30s, 5m or 1h30m"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        (2, 2),
        ("500m", Fraction(1, 2)),
        ("1.5", Fraction(3, 2)),
        (".5", Fraction(1, 2)),
        ("16Gi", 16 << 30),
        ("1.5Gi", 3 << 29),
        ("1G", 10**9),
        ("1k", 1000),
        ("1Ki", 1024),
        ("2E", 2 * 10**18),
        ("2Ei", 2 << 60),
        ("2e3", 2000),
        ("2E-1", Fraction(1, 5)),
        ("7u", Fraction(7, 10**6)),
        ("-1", -1),
    ],
)
def test_quantities(text: str | int, value: Fraction | int) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["", "two", "1 Gi", "1GiB", "Gi", "1KI", "1e", "0x10", "."])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(UnitError, match=r"is not a quantity such as 2, 500m or 16Gi"):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (812 << 20, "812 MiB"),
        (int(17.1 * 2**30), "17.1 GiB"),
        (3000 << 40, "3000 TiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text

"""Whatever is nested too deeply is refused with an error that the reader expects, never with a RecursionError."""

import json

import pytest

from quire_contract.model_facts import decode_facts
from quire_contract.nesting import MAX_DEPTH, NestingError, bounded_nesting, check_depth
from quire_contract.termination import decode_termination

DEEP = "[" * 100_000 + "]" * 100_000


def test_a_decoders_recursion_error_is_a_fault_of_the_text() -> None:
    with pytest.raises(NestingError, match="nested too deeply"), bounded_nesting():
        json.loads(DEEP)


def test_depth_is_counted_in_both_kinds_of_container() -> None:
    document: object = "leaf"
    for level in range(MAX_DEPTH - 1):
        document = [document] if level % 2 else {"key": document}
    check_depth(document)
    with pytest.raises(NestingError):
        check_depth([[document]])


def test_a_value_in_many_places_is_walked_once() -> None:
    document: list[object] = ["leaf"]
    for _ in range(100):
        document = [document, document]
    check_depth(document)


@pytest.mark.parametrize("text", [DEEP, '{"type": "ModelFacts", "x": ' + DEEP + "}", '{"x": ' + DEEP + ', "code": 5}'])
def test_termination_messages_and_facts(text: str) -> None:
    assert decode_facts(text) is None
    assert decode_termination(text) is None


def test_facts_of_another_version_with_a_deep_shape() -> None:
    facts = {"type": "ModelFacts", "path": "m", "bytes": 1, "shape": 5}
    assert decode_facts(json.dumps(facts)[:-1] + f', "more": {DEEP}}}') is None

"""Making over what was written whole to the one who applies."""

from typing import Any

from quire_contract import names
from quire_operator.watch.ownership import WHOLE_MANAGER, brief_managed_fields, is_owned_whole, make_over

Fields = dict[str, Any]


def entry(manager: str, operation: str, fields: Fields, **more: str) -> Fields:
    return {"manager": manager, "operation": operation, "apiVersion": "v1", "fieldsV1": fields, **more}


WHOLE = entry(WHOLE_MANAGER, "Update", {"f:spec": {"f:ports": {".": {}, "k:1": {".": {}, "f:name": {}}}}})
APPLIED = entry(names.FIELD_MANAGER, "Apply", {"f:spec": {"f:ports": {"k:1": {"f:port": {}}}, "f:type": {}}})
STATUS = entry(names.FIELD_MANAGER, "Apply", {"f:status": {}}, subresource="status")
THEIRS = entry("kubectl-edit", "Update", {"f:spec": {"f:ports": {"k:2": {}}}})


def test_only_what_was_written_whole_needs_it() -> None:
    assert is_owned_whole({"metadata": {"managedFields": [THEIRS, WHOLE]}})
    assert not is_owned_whole({"metadata": {"managedFields": [APPLIED, THEIRS]}})
    assert not is_owned_whole({"metadata": {}})
    assert is_owned_whole({"metadata": {"managedFields": brief_managed_fields([THEIRS, WHOLE])}})
    assert brief_managed_fields([THEIRS, APPLIED]) == []
    assert make_over([APPLIED, THEIRS]) == [APPLIED, THEIRS]


def test_both_sets_become_ours_and_others_keep_theirs() -> None:
    *others, ours = make_over([APPLIED, STATUS, WHOLE, THEIRS])
    assert others == [STATUS, THEIRS]
    assert ours == {
        "manager": names.FIELD_MANAGER,
        "operation": "Apply",
        "apiVersion": "v1",
        "fieldsV1": {"f:spec": {"f:ports": {".": {}, "k:1": {".": {}, "f:name": {}, "f:port": {}}}, "f:type": {}}},
    }


def test_a_field_that_is_owned_itself_stays_so_beside_what_is_in_it() -> None:
    whole = entry(WHOLE_MANAGER, "Update", {"f:metadata": {"f:labels": {}}})
    applied = entry(names.FIELD_MANAGER, "Apply", {"f:metadata": {"f:labels": {"f:a": {}}}})
    (ours,) = make_over([applied, whole])
    assert ours["fieldsV1"] == {"f:metadata": {"f:labels": {".": {}, "f:a": {}}}}


def test_what_is_given_is_left_as_it_is() -> None:
    before = [dict(APPLIED), dict(WHOLE)]
    make_over(before)
    assert before == [APPLIED, WHOLE]
    assert WHOLE["fieldsV1"] == {"f:spec": {"f:ports": {".": {}, "k:1": {".": {}, "f:name": {}}}}}

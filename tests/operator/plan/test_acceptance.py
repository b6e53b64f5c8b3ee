"""How many devices this version takes. Other refusals are in `test_plan.py`, which plans for more devices as well."""

import pytest
from plan_world import World, manifest


@pytest.mark.parametrize("field", ["tensorParallelSize", "pipelineParallelSize"])
def test_more_devices_than_the_server_uses_are_refused(field: str) -> None:
    plan = World(manifest=manifest({"engine": {field: 2}})).plan()
    assert (plan.accepted.holds, plan.accepted.reason, plan.actions) == (False, "NotSupported", ())
    assert plan.accepted.message.startswith(f"spec.engine.{field}: ")


def test_what_the_server_does_by_default_may_be_asked_for() -> None:
    engine = {"kvCacheDtype": "auto", "tensorParallelSize": 1, "pipelineParallelSize": 1}
    assert World(manifest=manifest({"engine": engine})).plan().accepted.holds is True

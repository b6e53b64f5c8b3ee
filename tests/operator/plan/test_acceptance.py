"""What this version's server takes, in fields and in further arguments. Other refusals are in `test_plan.py`."""

import pytest
from plan_world import World, manifest, served


@pytest.mark.parametrize("field", ["tensorParallelSize", "pipelineParallelSize"])
def test_more_devices_than_the_server_uses_are_refused(field: str) -> None:
    plan = World(manifest=manifest({"engine": {field: 2}})).plan()
    assert (plan.accepted.holds, plan.accepted.reason, plan.actions) == (False, "NotSupported", ())
    assert plan.accepted.message.startswith(f"spec.engine.{field}: ")


def test_what_the_server_does_by_default_may_be_asked_for() -> None:
    engine = {"kvCacheDtype": "auto", "tensorParallelSize": 1, "pipelineParallelSize": 1}
    assert World(manifest=manifest({"engine": engine})).plan().accepted.holds is True


@pytest.mark.parametrize(
    ("arguments", "reason", "message"),
    [
        (["--quantization", "fp8"], "NotSupported", "--quantization fp8 is not supported by this server; leave it out"),
        (["-tp", "2"], "NotSupported", "--tensor-parallel-size 2 is not supported"),
        (["--enable-lora"], "NotSupported", "--enable-lora is not supported"),
        (["--no-such-flag"], "InvalidSpec", "unrecognized arguments: --no-such-flag"),
        (["stray"], "InvalidSpec", "unrecognized arguments: stray"),
        (["--help"], "InvalidSpec", "unrecognized arguments: --help"),
        (["--num-threads", "0"], "InvalidSpec", "--num-threads: must be at least 1, not 0"),
        (["--log-format", "xml"], "InvalidSpec", "--log-format: invalid choice: 'xml'"),
    ],
)
def test_further_arguments_that_would_end_the_server_are_refused_before_a_rollout(
    arguments: list[str], reason: str, message: str
) -> None:
    """With `Replace` the good pods would have gone first. The judge is the server: `test_flags_are_the_servers.py`."""
    world = served()
    world.set_spec(engine={"maxModelLen": 4096, "extraArgs": arguments}, rollout={"strategy": "Replace"})
    plan = world.plan()
    assert (plan.accepted.holds, plan.accepted.reason, plan.actions) == (False, reason, ())
    assert plan.accepted.message.startswith(f"spec.engine.extraArgs: {message}")

"""A download that fails again and again, over reconciles that each see what the API server and the watch made of it."""

import asyncio

from fake_kube import make_llm
from operator_world import World

from quire_contract import names
from quire_kube.objects import Key, Ref
from quire_kube.times import format_time
from quire_operator.spec.kinds import JOB, LLM_DEPLOYMENT

KEY = Key(namespace="default", name="smollm2")
LLM_REF = Ref(kind=LLM_DEPLOYMENT, namespace="default", name="smollm2")


def fail_download(world: World) -> None:
    (job,) = world.kube.of_kind(JOB)
    failed = {"type": "Failed", "status": "True", "lastTransitionTime": format_time(world.now)}
    world.kube.put({**job, "status": {"conditions": [failed]}})


async def fail_and_wait(world: World, number: int, wait_s: int, *keys: Key) -> None:
    """Let attempt `number` fail; it is the one that is there until `wait_s` have gone by."""
    fail_download(world)
    for seconds in (0, wait_s - 1, 1):
        assert attempts(world) == [str(number)]
        world.now += seconds
        world.pending.update(keys)
        await world.settle(with_controllers=False)


def attempts(world: World) -> list[str]:
    return [job["metadata"]["annotations"][names.ANNOTATION_ATTEMPT] for job in world.kube.of_kind(JOB)]


def test_a_download_that_keeps_failing_is_tried_ever_more_seldom() -> None:
    async def main() -> None:
        world = World()
        world.kube.put(make_llm())
        await world.settle(with_controllers=False)
        for number, wait_s in ((1, 15), (2, 30), (3, 60), (4, 120), (5, 240), (6, 300)):
            await fail_and_wait(world, number, wait_s, KEY)
        world.kube.edit(LLM_REF, {"spec": {"model": {"tokenSecretRef": {"name": "hf"}}}})
        await world.settle(with_controllers=False)
        assert attempts(world) == ["1"]

    asyncio.run(main())


def test_two_with_bad_tokens_replace_each_others_download_ever_more_seldom() -> None:
    async def main() -> None:
        world = World()
        for name in ("one", "two"):
            uri = make_llm()["spec"]["model"]["uri"]
            world.kube.put(make_llm(name, model={"uri": uri, "tokenSecretRef": {"name": name}}))
        await world.settle(with_controllers=False)
        for number, wait_s in ((1, 15), (2, 30), (3, 60), (4, 120)):
            await fail_and_wait(
                world, number, wait_s, *(Key(namespace="default", name=name) for name in ("one", "two"))
            )

    asyncio.run(main())

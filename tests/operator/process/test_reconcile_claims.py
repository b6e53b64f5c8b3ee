"""Cache claims over the changes of a model: which is named, which goes, and what is said of one that stays unused."""

import asyncio

from fake_kube import make_llm
from operator_world import World, names_of, settled_world

from quire_contract import names
from quire_kube.objects import Manifest, Ref
from quire_operator.plan.cache.claim_differences import CLAIM_DIFFERS
from quire_operator.spec.kinds import EVENT, LLM_DEPLOYMENT, PERSISTENT_VOLUME_CLAIM

LLM_REF = Ref(kind=LLM_DEPLOYMENT, namespace="default", name="smollm2")


def claims(world: World) -> dict[str, Manifest]:
    return {claim["metadata"]["name"]: claim for claim in world.kube.of_kind(PERSISTENT_VOLUME_CLAIM)}


def unused_since(claim: Manifest) -> str:
    return str(claim["metadata"]["annotations"].get(names.ANNOTATION_UNUSED_SINCE, ""))


def test_the_status_names_the_claim_of_the_model() -> None:
    async def main() -> None:
        world = await settled_world()
        ((name, claim),) = claims(world).items()
        size = claim["status"]["capacity"]["storage"]
        assert world.llm()["status"]["cache"] == {"claimName": name, "size": size}
        world.kube.edit(LLM_REF, {"spec": {"model": {"uri": "hf://other/model"}}})
        await world.settle()
        assert world.llm()["status"]["cache"]["claimName"] == names.cache_pvc_name("hf://other/model")

    asyncio.run(main())


def test_a_refused_spec_keeps_the_claim_of_before() -> None:
    async def main() -> None:
        world = await settled_world()
        before = world.llm()["status"]["cache"]
        world.kube.edit(LLM_REF, {"spec": {"model": {"uri": "file:///there"}}})
        await world.settle()
        assert world.condition("Accepted")["status"] == "False"
        assert world.llm()["status"]["cache"] == before

    asyncio.run(main())


def test_a_claim_that_a_changed_model_left_says_since_when_and_until() -> None:
    async def main() -> None:
        world = await settled_world()
        (old,) = claims(world)
        uri = world.llm()["spec"]["model"]["uri"]
        world.kube.edit(LLM_REF, {"spec": {"model": {"uri": "hf://other/model"}}})
        await world.settle()
        (new,) = set(claims(world)) - {old}
        assert unused_since(claims(world)[old])
        assert not unused_since(claims(world)[new])
        world.kube.calls.clear()
        world.pending.update(world.store.keys())
        await world.run_pending()
        assert world.kube.calls == [], "said once, it costs nothing more"
        world.kube.edit(LLM_REF, {"spec": {"model": {"uri": uri}}})
        await world.settle()
        assert not unused_since(claims(world)[old])
        assert unused_since(claims(world)[new])

    asyncio.run(main())


def test_a_wish_that_comes_with_the_change_of_the_model_holds_for_the_claim_that_is_left() -> None:
    async def main() -> None:
        world = await settled_world()
        (old,) = claims(world)
        world.kube.edit(LLM_REF, {"spec": {"model": {"uri": "hf://other/model"}, "cache": {"retain": False}}})
        await world.settle()
        assert set(claims(world)) == {world.llm()["status"]["cache"]["claimName"]} != {old}

    asyncio.run(main())


def test_a_claim_that_another_model_uses_is_neither_let_go_nor_called_unused() -> None:
    async def main() -> None:
        world = await settled_world()
        (old,) = claims(world)
        world.kube.put(make_llm("second"))
        await world.settle()
        world.kube.edit(LLM_REF, {"spec": {"model": {"uri": "hf://other/model"}, "cache": {"retain": False}}})
        await world.settle()
        assert not unused_since(claims(world)[old])
        assert claims(world)[old]["metadata"]["annotations"].get(names.ANNOTATION_RETAIN) != "false"

    asyncio.run(main())


def test_a_claim_that_is_not_as_asked_is_told_as_an_event_while_the_model_serves() -> None:
    async def main() -> None:
        world = await settled_world()
        world.kube.edit(LLM_REF, {"spec": {"cache": {"accessMode": "ReadWriteMany"}}})
        await world.settle()
        assert world.condition("ModelCached")["reason"] == CLAIM_DIFFERS
        assert world.condition("Ready")["status"] == "True"
        (event,) = (event for event in world.kube.of_kind(EVENT) if event["reason"] == CLAIM_DIFFERS)
        assert (event["type"], names_of([event])[0].partition(".")[0]) == ("Warning", "smollm2")

    asyncio.run(main())

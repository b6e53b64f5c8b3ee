"""What a reconcile does when the API server refuses, goes away, or changes things under its hands."""

import asyncio
import dataclasses

import fake_controllers
from fake_kube import make_llm
from operator_world import World, names_of, settled_world

from quire_contract import names
from quire_kube.api import (
    ConflictError,
    ForbiddenError,
    InvalidError,
    KubeError,
    MistypedError,
    NameTakenError,
    UnavailableError,
)
from quire_kube.objects import Key, Ref
from quire_operator.spec.kinds import DEPLOYMENT, EVENT, LLM_DEPLOYMENT, POD, SERVICE, SERVICE_ACCOUNT, SERVICE_MONITOR

KEY = Key(namespace="default", name="smollm2")
DEPLOYMENT_REF = Ref(kind=DEPLOYMENT, namespace="default", name="smollm2")
LLM_REF = Ref(kind=LLM_DEPLOYMENT, namespace="default", name="smollm2")


def test_nothing_is_made_in_a_namespace_that_ends_and_nothing_loops() -> None:
    async def main() -> None:
        world = World()
        world.kube.put(make_llm())
        world.kube.terminating.add("default")
        await world.settle()
        assert world.errors == []
        assert {ref.kind for ref in world.kube.objects} == {LLM_DEPLOYMENT}

    asyncio.run(main())


def test_a_deployment_that_is_ending_is_left_alone() -> None:
    async def main() -> None:
        world = await settled_world()
        world.kube.edit(
            LLM_REF, {"metadata": {"finalizers": ["somebody/else"], "deletionTimestamp": "2026-01-31T12:00:00Z"}}
        )
        world.kube.remove(DEPLOYMENT_REF)
        await world.settle()
        assert world.kube.writes == []

    asyncio.run(main())


def test_a_refused_child_is_a_condition_and_the_others_are_applied() -> None:
    async def main() -> None:
        world = World()
        error = InvalidError("no", (("spec.ports[0].port", "Invalid value: 80: is not to my taste"),))
        world.kube.refuse = lambda verb, ref: error if verb == "create" and ref.kind == SERVICE else None
        world.kube.put(make_llm())
        for num_turns in range(6):
            if num_turns == 3:
                world.kube.calls.clear()
            world.deliver()
            await world.run_pending()
        accepted = world.condition("Accepted")
        assert (accepted["status"], accepted["reason"]) == ("False", "RefusedByServer")
        assert "spec.ports[0].port: Invalid value" in accepted["message"]
        assert names_of(world.kube.of_kind(SERVICE_ACCOUNT)) == ["smollm2"]
        assert {call for call in world.kube.writes if not call[1].startswith("Service ")} == set()
        world.kube.refuse = lambda verb, ref: None
        await world.settle()
        assert world.condition("Accepted")["status"] == "True"
        assert world.condition("Ready")["status"] == "True"

    asyncio.run(main())


def test_a_typo_in_the_pod_template_is_said_and_changes_nothing() -> None:
    async def main() -> None:
        world = await settled_world()
        before = world.kube.objects[DEPLOYMENT_REF]
        error = MistypedError("no", (("spec.template.spec.nodeSelecter", "field not declared in schema"),))
        world.kube.refuse = lambda verb, ref: error if (verb, ref) == ("apply", DEPLOYMENT_REF) else None
        world.kube.edit(LLM_REF, {"spec": {"podTemplate": {"spec": {"nodeSelecter": {"disk": "fast"}}}}})
        world.deliver()
        await world.run_pending()
        accepted = world.condition("Accepted")
        assert (accepted["status"], accepted["reason"]) == ("False", "InvalidPodTemplate")
        assert "spec.template.spec.nodeSelecter: field not declared" in accepted["message"]
        assert world.kube.objects[DEPLOYMENT_REF] == before
        assert world.errors == [error]

    asyncio.run(main())


def test_children_of_a_deleted_deployment_of_the_name_are_waited_for() -> None:
    """Deleted and made again before its children are collected."""

    async def main() -> None:
        world = await settled_world()
        account_ref = Ref(kind=SERVICE_ACCOUNT, namespace="default", name="smollm2")
        left = {**world.kube.objects[account_ref]}
        world.kube.remove(LLM_REF)
        owners = [{**left["metadata"]["ownerReferences"][0], "uid": "former"}]
        world.kube.put({**left, "metadata": {**left["metadata"], "ownerReferences": owners}})
        world.kube.put(make_llm())
        for _ in range(3):
            world.deliver()
            await world.run_pending()
        assert {type(error) for error in world.errors} == {ConflictError}
        assert world.condition("Accepted")["status"] == "True"
        assert not [event for event in world.kube.of_kind(EVENT) if event["type"] == "Warning"]
        assert world.kube.objects[account_ref]["metadata"]["ownerReferences"] == owners
        world.kube.remove(account_ref)
        await world.settle()
        assert world.condition("Ready")["status"] == "True"
        (owner,) = world.kube.objects[account_ref]["metadata"]["ownerReferences"]
        assert owner["uid"] == world.llm()["metadata"]["uid"]
        assert owner["kind"] == names.KIND

    asyncio.run(main())


def test_a_missing_right_is_told_and_tried_again() -> None:
    async def main() -> None:
        world = World()
        error = ForbiddenError("may not")
        world.kube.refuse = lambda verb, ref: error if verb == "create" and ref.kind == SERVICE_ACCOUNT else None
        world.kube.put(make_llm())
        world.deliver()
        await world.run_pending()
        assert world.pending == {KEY}
        assert world.condition("Accepted")["reason"] == "Forbidden"

    asyncio.run(main())


def test_what_a_model_serves_without_is_told_in_an_event_while_it_is_tried_again() -> None:
    async def main() -> None:
        world = World()
        has_monitors = dataclasses.replace(world.reconciler.cluster(), kinds=frozenset({SERVICE_MONITOR}))
        world.reconciler = dataclasses.replace(world.reconciler, cluster=lambda: has_monitors)
        error = ForbiddenError("denied by a webhook")
        world.kube.refuse = lambda verb, ref: error if verb == "create" and ref.kind == SERVICE_MONITOR else None
        world.kube.put(make_llm())
        for _ in range(5):
            world.deliver()
            await world.run_pending()
        assert world.pending == {KEY}
        assert world.condition("Accepted")["status"] == "True"
        said = [event for event in world.kube.of_kind(EVENT) if "webhook" in event["message"]]
        assert {(event["type"], event["reason"]) for event in said} == {("Warning", "Forbidden")}
        assert "Done without, and tried again: ServiceMonitor default/smollm2: denied" in said[0]["message"]
        versions = [event["involvedObject"]["resourceVersion"] for event in said]
        assert len(set(versions)) == len(versions), "said once of each version of the object"

    asyncio.run(main())


def test_what_somebody_else_made_under_our_name_is_not_taken_over() -> None:
    async def main() -> None:
        world = World()
        theirs = {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "smollm2", "namespace": "default", "labels": {"app": "theirs"}},
        }
        world.kube.put(theirs)
        world.kube.put(make_llm())
        for _ in range(3):
            await world.run_pending()
            world.kube.events.clear()
            world.store.put(world.llm())
        account = world.kube.of_kind(SERVICE_ACCOUNT)[0]
        assert account["metadata"]["labels"] == {"app": "theirs"}
        assert "ownerReferences" not in account["metadata"]
        assert world.condition("Accepted")["reason"] == "NameTaken"

    asyncio.run(main())


def test_a_foreign_service_is_never_ready_and_its_end_is_found() -> None:
    async def main() -> None:
        world = World()
        service = Ref(kind=SERVICE, namespace="default", name="smollm2")
        metadata = {"name": "smollm2", "namespace": "default"}
        world.kube.put({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {}})
        world.kube.put(make_llm())
        for _ in range(6):
            world.deliver()
            await world.run_pending()
            fake_controllers.step(world.kube)
        assert {type(error) for error in world.errors} == {NameTakenError}
        assert world.llm()["status"]["readyReplicas"] == 1
        assert world.condition("Ready")["status"] == "False"
        assert world.condition("ServiceReady")["reason"] == "ServiceMissing"
        assert world.llm()["status"]["reason"].startswith("NameTaken: Service default/smollm2")
        world.kube.remove(service)
        await world.settle()
        assert world.condition("Ready")["status"] == "True"

    asyncio.run(main())


def test_an_api_server_that_is_gone_for_a_while_is_waited_for() -> None:
    async def main() -> None:
        world = World()
        world.kube.put(make_llm())
        gone: KubeError = UnavailableError("restarting", 3)
        world.kube.refuse = lambda verb, ref: gone
        world.deliver()
        for _ in range(3):
            await world.run_pending()
        assert world.errors == [gone] * 3
        world.kube.refuse = lambda verb, ref: None
        await world.settle()
        assert world.condition("Ready")["status"] == "True"

    asyncio.run(main())


def test_a_change_while_the_status_is_written_is_not_missed() -> None:
    """The answer to our write already holds it, so that its event is no news."""

    async def main() -> None:
        world = await settled_world()
        world.kube.remove(Ref(kind=POD, namespace="default", name=names_of(world.kube.of_kind(POD))[0]))
        world.deliver()

        def change(verb: str, ref: Ref) -> KubeError | None:
            if verb == "apply_status" and world.llm()["spec"]["replicas"] == 1:
                world.kube.edit(LLM_REF, {"spec": {"replicas": 2}})
            return None

        world.kube.refuse = change
        await world.settle()
        assert world.llm()["spec"]["replicas"] == 2
        assert world.llm()["status"]["readyReplicas"] == 2

    asyncio.run(main())

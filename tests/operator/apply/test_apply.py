"""Carrying out actions: each is tried, the store learns, nobody else's object is taken over."""

import asyncio
from typing import Any

import pytest
from fake_kube import FakeKube
from store_objects import KEY, llm, make

from quire_contract import names
from quire_kube.api import (
    ConflictError,
    ForbiddenError,
    InvalidError,
    KubeError,
    MistypedError,
    NamespaceTerminatingError,
    UnavailableError,
    UnreachableError,
)
from quire_kube.objects import Kind, Manifest, Ref
from quire_operator.apply.apply import Applied, Refusal, apply_actions, with_refusals
from quire_operator.plan.actions import Action, Annotate, Apply, Delete, Plan, SetReplicas, Verdict
from quire_operator.spec.kinds import (
    DEPLOYMENT,
    JOB,
    LEADER_WORKER_SET,
    LLM_DEPLOYMENT,
    POD,
    SERVICE,
    SERVICE_MONITOR,
    ref_of,
)
from quire_operator.watch.ownership import is_owned_whole
from quire_operator.watch.packing import trim
from quire_operator.watch.store import Store

NOW = 1_769_860_800.0
ASKED = Verdict(holds=True, reason="Accepted")


def document(name: str, kind: Kind = SERVICE, **spec: Any) -> Manifest:
    owner = {"apiVersion": names.GROUP_VERSION, "kind": names.KIND, "name": KEY.name, "uid": "llm-1"}
    metadata = {
        "name": name,
        "namespace": "default",
        "labels": {names.LABEL_MANAGED_BY: names.MANAGED_BY},
        "ownerReferences": [owner],
    }
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, "spec": spec}


def act(kube: FakeKube, store: Store, *actions: Action) -> Applied:
    return asyncio.run(apply_actions(kube, store, actions, now=NOW))


def applies(*names_: str) -> list[Action]:
    return [Apply(manifest=document(name, port=80), reason="Created") for name in names_]


def fail(**by_name: KubeError) -> FakeKube:
    kube = FakeKube()
    kube.refuse = lambda verb, ref: by_name.get(ref.name) if verb in ("create", "apply") else None
    return kube


def done_names(applied: Applied) -> list[str]:
    return [action.manifest["metadata"]["name"] for action in applied.done if isinstance(action, Apply)]


def test_what_is_applied_is_known_at_once() -> None:
    kube, store = FakeKube(), Store()
    applied = act(kube, store, *applies("a", "b"))
    assert done_names(applied) == ["a", "b"]
    assert applied.is_complete
    assert store.get(Ref(kind=SERVICE, namespace="default", name="a")) == trim(kube.of_kind(SERVICE)[0])
    act(kube, store, *applies("a"))
    kube.calls.clear()
    act(kube, store, *applies("a"))
    assert [verb for verb, _ in kube.calls] == ["apply"], "what the store knows is not asked for"


def test_what_users_merge_nothing_into_is_created_by_one_call() -> None:
    """A workload is applied from the first: of a mistyped field in it, create would say nothing."""
    kube = FakeKube()
    act(kube, Store(), *applies("a"), Apply(manifest=document("a", DEPLOYMENT), reason="Created"))
    assert [verb for verb, _ in kube.calls] == ["create", "get", "apply"]


def test_a_field_that_was_created_is_taken_out_when_it_is_applied_no_more() -> None:
    kube, store = FakeKube(), Store()
    act(kube, store, Apply(manifest=document("a", port=80, timeout=5), reason="Created"))
    ref = ref_of(document("a"))
    store.put(kube.edit(ref, {"metadata": {"labels": {"app": "theirs"}}}))
    for calls in (["get", "patch", "apply"], ["apply"]):
        kube.calls.clear()
        act(kube, store, *applies("a"))
        assert [verb for verb, _ in kube.calls] == calls
    live = kube.objects[ref]
    assert live["spec"] == {"port": 80}
    assert live["metadata"]["labels"]["app"] == "theirs", "what others have added stays"
    assert store.get(ref) == trim(live)


def test_what_a_full_quota_hides_is_found_and_healed() -> None:
    """Admission refuses before anybody looks whether the name is taken."""
    kube, store = FakeKube(), Store()
    ours = document("a", port=81)
    ours["metadata"]["labels"] = {}  # so that no watch tells of it
    kube.put(ours)
    refused = ForbiddenError("exceeded quota")
    kube.refuse = lambda verb, _: refused if verb == "create" else None
    assert act(kube, store, *applies("a")).has_learned
    assert done_names(act(kube, store, *applies("a"))) == ["a"]
    assert [refusal.error for refusal in act(kube, store, *applies("b")).refusals] == [refused]


@pytest.mark.parametrize("num_call", range(3))
@pytest.mark.parametrize("after", [False, True])
def test_a_first_apply_that_is_broken_off_leaves_nothing_behind(num_call: int, after: bool) -> None:
    kube, store = FakeKube(), Store()
    act(kube, store, Apply(manifest=document("a", port=80, timeout=5), reason="Created"))
    kube.fail_at(num_call, after=after)
    assert act(kube, store, *applies("a")).failure is not None
    act(kube, store, *applies("a"))
    live = kube.objects[ref_of(document("a"))]
    assert (live["spec"], is_owned_whole(live)) == ({"port": 80}, False)


def test_one_failure_does_not_keep_the_others() -> None:
    first, second = UnavailableError("webhook"), UnavailableError("again")
    kube = fail(a=InvalidError("no"), b=first, c=second)
    applied = act(kube, Store(), *applies("a", "b", "c", "d"))
    assert done_names(applied) == ["d"]
    assert applied.failure is first
    assert [refusal.ref.name for refusal in applied.refusals] == ["a"]


def test_nobody_answering_ends_it() -> None:
    kube = fail(a=UnreachableError("refused"))
    applied = act(kube, Store(), *applies("a", "b"))
    assert applied.done == ()
    assert isinstance(applied.failure, UnreachableError)
    assert kube.calls == [("create", "Service default/a")]


def test_a_namespace_that_ends_is_no_failure() -> None:
    applied = act(fail(a=NamespaceTerminatingError("going")), Store(), *applies("a"))
    assert (applied.failure, applied.refusals, applied.is_namespace_ending) == (None, (), True)


def test_an_object_that_the_store_missed_is_learned_and_not_written() -> None:
    kube, store = FakeKube(), Store()
    live = kube.put(document("a", port=81))
    applied = act(kube, store, *applies("a"))
    assert (applied.done, applied.has_learned) == ((), True)
    assert store.get(ref_of(live)) == live
    assert kube.writes == []


def test_somebody_elses_object_is_left_alone() -> None:
    kube = FakeKube()
    theirs = document("a", port=81)
    theirs["metadata"] |= {"labels": {"app": "theirs"}, "ownerReferences": []}
    kube.put(theirs)
    applied = act(kube, Store(), *applies("a"))
    assert kube.writes == []
    verdict = applied.refusals[0].as_verdict()
    assert (verdict.holds, verdict.reason) == (False, "NameTaken")
    assert "Service default/a" in verdict.message


def test_our_object_is_known_by_its_owner_where_the_labels_are_gone() -> None:
    kube, store = FakeKube(), Store()
    ours = document("a", port=81)
    ours["metadata"]["labels"] = {}
    kube.put(ours)
    assert act(kube, store, *applies("a")).has_learned
    assert done_names(act(kube, store, *applies("a"))) == ["a"]


def test_a_deletion_is_made_once_and_nothing_is_applied_until_it_is_over() -> None:
    kube, store = FakeKube(), Store()
    job = make(JOB, "j")
    job["metadata"]["finalizers"] = ["orphan"]
    live = kube.put(job)
    store.put(live)
    ref = ref_of(live)
    delete = Delete(ref=ref, uid=live["metadata"]["uid"], reason="Failed")
    assert act(kube, store, delete).done == (delete,)
    applied = act(kube, store, delete, Apply(manifest=document("j", JOB), reason="Created"))
    assert (applied.done, applied.has_learned) == ((), False)
    assert kube.writes == [("delete", str(ref))]


def test_only_the_named_incarnation_is_deleted() -> None:
    kube, store = FakeKube(), Store()
    live = kube.put(make(JOB, "j"))
    act(kube, store, Delete(ref=ref_of(live), uid="former", reason="Failed"))
    assert kube.of_kind(JOB) == [live]


def test_replicas_and_annotations_are_patched_alone() -> None:
    kube, store = FakeKube(), Store()
    kube.put(llm())
    kube.put(make(DEPLOYMENT, "smollm2", spec={"replicas": 3, "paused": True}))
    kube.put(make(POD, "p"))
    refs = {
        kind: Ref(kind=kind, namespace="default", name="p" if kind == POD else "smollm2")
        for kind in (LLM_DEPLOYMENT, DEPLOYMENT, POD)
    }
    applied = act(
        kube,
        store,
        SetReplicas(ref=refs[LLM_DEPLOYMENT], replicas=2, reason="Created"),
        SetReplicas(ref=refs[DEPLOYMENT], replicas=0, reason="Suspended"),
        Annotate(ref=refs[POD], annotations={names.ANNOTATION_POD_DELETION_COST: "5"}, reason="Load"),
    )
    assert len(applied.done) == 3
    assert kube.objects[refs[LLM_DEPLOYMENT]]["spec"]["replicas"] == 2
    assert kube.objects[refs[DEPLOYMENT]]["spec"] == {"replicas": 0, "paused": True}
    assert store.pods_of(KEY) == ()
    assert store.get(refs[POD]) == kube.objects[refs[POD]]


def test_a_pod_that_went_meanwhile_is_nobodys_fault() -> None:
    ref = Ref(kind=POD, namespace="default", name="p")
    applied = act(FakeKube(), Store(), Annotate(ref=ref, annotations={"a": "b"}, reason="Load"))
    assert applied == Applied()


def test_refusals_become_the_verdict_unless_there_is_a_worse_one() -> None:
    ref = Ref(kind=SERVICE, namespace="default", name="a")
    refused = Applied(refusals=(Refusal(ref=ref, error=ForbiddenError("may not")),))
    plan = Plan(accepted=ASKED, model_cached=ASKED, fits=ASKED, autoscaling=ASKED)
    assert with_refusals(plan, Applied()) is plan
    told = with_refusals(plan, refused).accepted
    assert (told.holds, told.reason, told.message) == (False, "Forbidden", "Service default/a: may not")
    unaccepted = Plan(accepted=Verdict(holds=False, reason="Bad"), model_cached=ASKED, fits=ASKED, autoscaling=ASKED)
    assert with_refusals(unaccepted, refused) is unaccepted


def test_a_merge_key_that_somebody_edited_is_healed_by_putting_the_whole_object() -> None:
    """Server-side apply would keep the edited port beside ours for ever, under the same name."""
    kube, store = FakeKube(), Store()
    act(kube, store, *applies("a"))
    ref = ref_of(document("a"))
    store.put(kube.edit(ref, {"spec": {"port": 81, "replicas": 3}, "metadata": {"labels": {"app": "theirs"}}}))
    is_replaced = False

    def refuse(verb: str, _: Ref) -> KubeError | None:
        nonlocal is_replaced
        is_replaced |= verb == "update"
        return InvalidError("duplicate") if verb == "apply" and not is_replaced else None

    kube.refuse = refuse
    applied = act(kube, store, *applies("a"))
    assert done_names(applied) == ["a"]
    live = kube.objects[ref]
    assert live["spec"] == {"port": 80, "replicas": 3}, "how many there are is not ours to say"
    assert store.get(ref) == trim(live)


def refuse_until_replaced(kube: FakeKube, **errors: KubeError) -> None:
    """Refuse what is applied until the whole object has been put; and calls of other verbs with these errors."""
    is_replaced = False

    def refuse(verb: str, _: Ref) -> KubeError | None:
        nonlocal is_replaced
        is_replaced |= verb == "update"
        return errors.get(verb) or (InvalidError("duplicate") if verb == "apply" and not is_replaced else None)

    kube.refuse = refuse


@pytest.mark.parametrize("is_broken_off", [False, True])
def test_what_was_put_whole_is_still_taken_out_when_it_is_applied_no_more(is_broken_off: bool) -> None:
    """Whoever puts an object owns its fields: left so, they would outlast every document that lacks them."""
    kube, store = FakeKube(), Store()
    for timeout in (5, 6):  # the second makes it over to the one who applies
        longer = Apply(manifest=document("a", port=80, timeout=timeout), reason="Created")
        act(kube, store, longer)
    assert not is_owned_whole(kube.objects[ref_of(document("a"))])
    longer = Apply(manifest=document("a", port=80, timeout=7), reason="Changed")
    refuse_until_replaced(kube, **({"patch": UnavailableError("gone")} if is_broken_off else {}))
    assert (act(kube, store, longer).failure is not None) is is_broken_off
    kube.refuse = lambda verb, _: None
    assert done_names(act(kube, store, *applies("a"))) == ["a"]
    live = kube.objects[ref_of(document("a"))]
    assert live["spec"] == {"port": 80}
    assert not is_owned_whole(live)


@pytest.mark.parametrize("error", [InvalidError("immutable"), ForbiddenError("may not update")])
def test_a_document_that_is_itself_at_fault_is_refused_in_its_own_terms(error: KubeError) -> None:
    kube, store = FakeKube(), Store()
    act(kube, store, *applies("a"))
    refused = InvalidError("no", (("spec.port", "not to my taste"),))
    answers = {"apply": refused, "update": error}
    kube.refuse = lambda verb, _: answers.get(verb)
    applied = act(kube, store, *applies("a"))
    assert [refusal.error for refusal in applied.refusals] == [refused]


def test_an_object_that_changes_while_it_is_put_is_tried_again() -> None:
    kube, store = FakeKube(), Store()
    act(kube, store, *applies("a"))
    changed = ConflictError("changed")
    refuse_until_replaced(kube, update=changed)
    applied = act(kube, store, *applies("a"))
    assert (applied.refusals, applied.failure) == ((), changed)


def test_a_mistyped_document_is_never_put_whole() -> None:
    """An API server drops a field that it does not know from what is put, and takes the rest."""
    kube, store = FakeKube(), Store()
    act(kube, store, *applies("a"))
    kube.calls.clear()
    error = MistypedError("no", (("spec.template.spec.nodeSelecter", "field not declared in schema"),))
    kube.refuse = lambda verb, _: error if verb == "apply" else None
    applied = act(kube, store, *applies("a"))
    assert "update" not in {verb for verb, _ in kube.calls}
    verdict = applied.refusals[0].as_verdict()
    assert (verdict.holds, verdict.reason) == (False, "InvalidPodTemplate")
    assert verdict.message.startswith("spec.podTemplate: Service default/a: spec.template.spec.nodeSelecter: field not")
    assert verdict.message.endswith("; correct it in spec.podTemplate")


def test_a_mistyped_field_elsewhere_is_not_blamed_on_the_pod_template() -> None:
    error = MistypedError("no", (("spec.portz", "field not declared in schema"),))
    verdict = Refusal(ref=ref_of(document("a")), error=error).as_verdict()
    assert (verdict.reason, verdict.message) == (
        "RefusedByServer",
        "Service default/a: spec.portz: field not declared in schema",
    )


@pytest.mark.parametrize("is_known", [True, False])
def test_what_a_deleted_llm_deployment_of_the_name_has_left_is_waited_for(is_known: bool) -> None:
    kube, store = FakeKube(), Store()
    left = document("a", port=81)
    left["metadata"]["ownerReferences"][0]["uid"] = "llm-0"
    live = kube.put(left)
    if is_known:
        store.put(live)
    applied = act(kube, store, *applies("a"))
    assert (kube.writes, applied.refusals) == ([], ())
    assert isinstance(applied.failure, ConflictError)
    assert "Service default/a belongs to a deleted LLMDeployment of this name" in str(applied.failure)


def test_a_child_of_another_llm_deployment_is_not_taken_from_it() -> None:
    kube, store = FakeKube(), Store()
    theirs = document("a", port=81)
    theirs["metadata"]["ownerReferences"][0] |= {"uid": "llm-0", "name": "other"}
    store.put(kube.put(theirs))
    verdict = act(kube, store, *applies("a")).refusals[0].as_verdict()
    assert kube.writes == []
    assert (verdict.reason, verdict.message) == (
        "NameTaken",
        "Service default/a: it belongs to LLMDeployment other; rename one of the two",
    )


def test_what_a_model_serves_without_says_nothing_against_its_spec() -> None:
    kube = FakeKube()
    kube.refuse = lambda verb, _: ForbiddenError("may not") if verb in ("create", "apply", "patch") else None
    pod = Ref(kind=POD, namespace="default", name="p")
    minor = act(
        kube,
        Store(),
        Apply(manifest=document("a", SERVICE_MONITOR), reason="Created"),
        Annotate(ref=pod, annotations={names.ANNOTATION_POD_DELETION_COST: "5"}, reason="Load"),
    )
    plan = Plan(accepted=ASKED, model_cached=ASKED, fits=ASKED, autoscaling=ASKED)
    assert len(minor.refusals) == 2, "they are tried again"
    assert minor.is_complete
    assert with_refusals(plan, minor) is plan
    workload = Apply(manifest=document("a", LEADER_WORKER_SET), reason="Created")
    both = act(kube, Store(), Apply(manifest=document("a", SERVICE_MONITOR), reason="Created"), workload)
    assert not both.is_complete
    assert with_refusals(plan, both).accepted.message == "LeaderWorkerSet default/a: may not"


def test_what_the_api_server_drops_without_a_word_is_not_sent_over_and_over() -> None:
    kube, store = FakeKube(), Store()
    for _ in range(2):
        act(kube, store, *applies("a"))
    applied = act(kube, store, *applies("a"))
    assert (applied.done, applied.has_learned) == ((), False)

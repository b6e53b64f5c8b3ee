"""The store: what is newer wins, what is gone stays gone, everything is found by what it belongs to."""

from typing import Any

import pytest
from store_objects import CLAIM, JOB_NAME, KEY, SHARED_LABELS, llm, make

from quire_contract import names
from quire_kube.objects import Key, Kind, Ref
from quire_operator.spec.kinds import (
    DEPLOYMENT,
    JOB,
    LEADER_WORKER_SET,
    LLM_DEPLOYMENT,
    PERSISTENT_VOLUME_CLAIM,
    POD,
    SERVICE,
)
from quire_operator.watch.packing import trim
from quire_operator.watch.store import Store, model_place


def ref(kind: Kind, name: str) -> Ref:
    return Ref(kind=kind, namespace="default", name=name)


def test_older_and_equal_versions_are_no_news() -> None:
    news: list[frozenset[Key]] = []
    store = Store(news.append)
    assert store.put(llm(version=10, suspend=True))
    assert not store.put(llm(version=9))
    assert not store.put(llm(version=10))
    found = store.llm(KEY)
    assert found is not None
    assert found["spec"]["suspend"] is True
    assert store.put(llm(version=100))  # compared as numbers
    assert news == [frozenset({KEY})] * 2


def test_a_late_event_of_a_former_incarnation_changes_nothing() -> None:
    store = Store()
    store.put(llm(uid="new", version=20))
    assert not store.put(llm(uid="old", version=5))
    assert not store.remove(llm(uid="old", version=19))
    found = store.llm(KEY)
    assert found is not None
    assert found["metadata"]["uid"] == "new"


def test_what_is_gone_is_not_brought_back_by_the_late_answer_to_a_write() -> None:
    store = Store()
    store.put(llm(version=1))
    assert store.remove(llm(version=5))
    assert not store.put(llm(version=4))
    assert store.llm(KEY) is None
    assert store.put(llm(version=9, uid="llm-2"))


def test_what_only_lost_its_labels_comes_back_when_it_has_them_again() -> None:
    """A watch by label says of both that they are deleted."""
    store = Store()
    store.put(make(SERVICE, "smollm2", 1))
    store.remove(make(SERVICE, "smollm2", 2))
    assert store.put(make(SERVICE, "smollm2", 3))


def test_a_deletion_is_not_undone() -> None:
    store = Store()
    job = ref(JOB, JOB_NAME)
    store.put(make(JOB, JOB_NAME, 1))
    store.mark_ending(job, "another", "2026-01-31T12:00:00Z")
    assert not store.is_ending(job)
    store.mark_ending(job, "u1", "2026-01-31T12:00:00Z")
    assert store.is_ending(job)
    assert not store.put(make(JOB, JOB_NAME, 2, status={"active": 1}))
    found = store.get(job)
    assert found is not None
    assert found["metadata"]["deletionTimestamp"] == "2026-01-31T12:00:00Z"
    assert store.put(make(JOB, JOB_NAME, 5, uid="u2"))
    assert not store.is_ending(job)


def test_children_are_those_of_this_incarnation() -> None:
    store = Store()
    labels = {names.LABEL_DEPLOYMENT: KEY.name}
    store.put(make(SERVICE, "mine", labels=labels, owner_uid="llm-1"))
    store.put(make(SERVICE, "unlabelled", owner_uid="llm-1"))
    store.put(make(SERVICE, "former", labels=labels, owner_uid="llm-0"))
    store.put(make(SERVICE, "theirs", labels=labels))
    disowned = make(SERVICE, "disowned", labels=labels)
    disowned["metadata"]["annotations"] = {names.ANNOTATION_APPLIED_HASH: "1234"}
    store.put(disowned)
    assert sorted(child.name for child in store.children_of(KEY, "llm-1")) == ["disowned", "mine", "unlabelled"]
    assert store.children_of(Key(namespace="other", name=KEY.name), "llm-1") == {}


def test_an_object_moves_with_its_labels() -> None:
    store = Store()
    store.put(make(POD, "p", 1, labels={names.LABEL_DEPLOYMENT: "smollm2"}))
    store.put(make(POD, "p", 2, labels={names.LABEL_DEPLOYMENT: "other"}))
    assert store.pods_of(KEY) == ()
    assert len(store.pods_of(Key(namespace="default", name="other"))) == 1
    store.remove(make(POD, "p", 3))
    assert store._groups == {}


def test_pods_of_a_job_are_no_serving_pods() -> None:
    store = Store()
    labels = {"batch.kubernetes.io/job-name": JOB_NAME, **SHARED_LABELS, names.LABEL_DEPLOYMENT: "smollm2"}
    store.put(make(POD, "b", labels=labels))
    store.put(make(POD, "a", uid="u2", labels=labels))
    assert store.pods_of(KEY) == ()
    assert [pod["metadata"]["name"] for pod in store.job_pods("default", JOB_NAME)] == ["a", "b"]


@pytest.mark.parametrize(
    ("spec", "claim"),
    [
        ({}, CLAIM),
        ({"cache": {"existingClaim": "mine"}}, "mine"),
        ({"model": {"uri": "pvc://weights/llama"}}, "weights"),
        ({"model": {"uri": "oci://registry.example/acme/model:1"}}, None),
        ({"model": {"uri": "not a uri"}}, None),
        ({"model": {"uri": "file:///models"}}, None),
    ],
)
def test_where_a_model_is(spec: dict[str, Any], claim: str | None) -> None:
    place = model_place(llm(**spec))
    assert (place.claim if place else None) == claim
    store = Store()
    store.put(llm(**spec))
    if claim is not None:
        assert store.keys_using_claim("default", claim) == {KEY}
        assert store.keys_using_claim("other", claim) == frozenset()


def test_shared_objects_concern_every_user() -> None:
    store = Store()
    store.put(llm("one", uid="1"))
    store.put(llm("two", uid="2"))
    store.put(llm("three", uid="3", model={"uri": "hf://other/model"}))
    users = {Key(namespace="default", name="one"), Key(namespace="default", name="two")}
    for shared in (
        make(PERSISTENT_VOLUME_CLAIM, CLAIM, labels=SHARED_LABELS),
        make(JOB, JOB_NAME, labels=SHARED_LABELS),
        make(POD, "p", labels={"batch.kubernetes.io/job-name": JOB_NAME, **SHARED_LABELS}),
    ):
        assert store.keys_for(shared) == users
    theirs = make(PERSISTENT_VOLUME_CLAIM, "somebody-elses")
    assert store.keys_for(theirs) == frozenset()


def test_what_nobody_uses_concerns_a_key_that_is_nobodys() -> None:
    store = Store()
    claim = make(PERSISTENT_VOLUME_CLAIM, CLAIM, labels=SHARED_LABELS)
    store.put(claim)
    store.put(make(PERSISTENT_VOLUME_CLAIM, "theirs", uid="u2"))
    store.put(make(JOB, JOB_NAME, uid="u3", labels=SHARED_LABELS))
    assert [found["metadata"]["name"] for found in store.claims_without_users("default")] == [CLAIM]
    assert [found["metadata"]["name"] for found in store.jobs_without_users("default")] == [JOB_NAME]
    assert store.claims_without_users("other") == ()
    assert store.keys_for(claim) == {Key(namespace="default", name=CLAIM)}
    store.put(llm())
    assert (store.claims_without_users("default"), store.jobs_without_users("default")) == ((), ())
    store.put(llm(version=2, model={"uri": "hf://other/model"}))
    assert len(store.claims_without_users("default")) == 1


@pytest.mark.parametrize("templates", ["template", "leaderTemplate", "workerTemplate"])
def test_what_a_workload_mounts_is_used(templates: str) -> None:
    store = Store()
    store.put(make(PERSISTENT_VOLUME_CLAIM, CLAIM, uid="u2", labels=SHARED_LABELS))
    pod = {"spec": {"volumes": [{"persistentVolumeClaim": {"claimName": name}} for name in (CLAIM, "mine")]}}
    kind = DEPLOYMENT if templates == "template" else LEADER_WORKER_SET
    spec = {"template": pod} if kind == DEPLOYMENT else {"leaderWorkerTemplate": {templates: pod}}
    store.put(make(kind, "smollm2", 1, owner_uid="llm-1", spec=spec))
    assert store.claims_without_users("default") == ()
    store.put(make(kind, "smollm2", 2, owner_uid="llm-1", spec={}))
    assert len(store.claims_without_users("default")) == 1


@pytest.mark.parametrize(("phase", "is_used"), [("Running", True), ("Pending", True), ("Failed", False)])
def test_what_a_serving_pod_mounts_is_used(phase: str, is_used: bool) -> None:
    store = Store()
    store.put(make(PERSISTENT_VOLUME_CLAIM, CLAIM, uid="u2", labels=SHARED_LABELS))
    labels = {names.LABEL_DEPLOYMENT: "smollm2", names.LABEL_CLAIM: names.claim_digest(CLAIM)}
    store.put(make(POD, "p", labels=labels, status={"phase": phase}))
    assert (store.claims_without_users("default") == ()) == is_used


def test_an_event_concerns_whom_its_object_concerns() -> None:
    store = Store()
    store.put(make(POD, "p", labels={names.LABEL_DEPLOYMENT: "smollm2"}))
    event = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": "e", "namespace": "default"}}
    about = {"apiVersion": "v1", "kind": "Pod", "namespace": "default", "name": "p"}
    assert store.keys_for({**event, "involvedObject": about}) == {KEY}
    assert store.keys_for({**event, "involvedObject": {**about, "name": "q"}}) == frozenset()
    assert store.keys_for({**event, "involvedObject": {**about, "kind": "Node"}}) == frozenset()


def test_what_is_looked_up_is_a_copy() -> None:
    store = Store()
    store.put(llm())
    first = store.llm(KEY)
    assert first is not None
    first["spec"].clear()
    assert store.llm(KEY) != first
    assert store.keys() == {KEY}


def test_versions_name_what_there_is() -> None:
    store = Store()
    store.put(llm(version=7))
    assert store.versions(LLM_DEPLOYMENT) == {ref(LLM_DEPLOYMENT, "smollm2"): ("llm-1", 7)}
    assert store.versions(JOB) == {}


def test_only_pods_lose_more_than_managed_fields() -> None:
    container = {"name": "server", "image": "i", "args": ["serve"], "env": [], "resources": {"limits": {"cpu": "1"}}}
    spec = {"nodeName": "n", "containers": [container], "volumes": [{"name": "v"}]}
    pod = make(POD, "p", spec=spec)
    pod["metadata"] |= {
        "managedFields": [{"manager": "m"}],
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "kept": "yes"},
    }
    trimmed = trim(pod)
    assert trimmed["metadata"]["annotations"] == {"kept": "yes"}
    assert "managedFields" not in trimmed["metadata"]
    kept = {key: container[key] for key in ("name", "image", "resources")}
    assert trimmed["spec"] == {"nodeName": "n", "containers": [kept]}
    assert pod["spec"] == spec, "the caller's is left as it was"
    service = make(SERVICE, "s", spec={"volumes": 1})
    assert trim(service) == service


def test_whoever_shared_a_volume_is_looked_at_when_another_user_leaves_it() -> None:
    """Whether the volume outlives its last user is decided by those who are left."""
    changed: list[frozenset[Key]] = []
    store = Store(changed.append)
    one, two = llm("one", uid="llm-1"), llm("two", uid="llm-2")
    store.put(one)
    store.put(two)
    changed.clear()
    store.remove(one)
    assert changed == [frozenset({Key(namespace="default", name="one"), Key(namespace="default", name="two")})]

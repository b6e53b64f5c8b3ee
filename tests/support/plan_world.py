"""A pretended cluster for tests of `plan`: keeps what plans write, adds what an API server would, and plays kubelet.

Only the state that plans read. Documents are copied on the way in, so a plan that changed one would be found out.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from quire_contract import names
from quire_contract.model_facts import ModelFacts, encode_facts
from quire_contract.termination import TerminationMessage, encode_termination
from quire_kube.objects import Manifest, Ref
from quire_kube.times import format_time
from quire_operator.plan.actions import Action, Annotate, Apply, Delete, Plan, SetReplicas
from quire_operator.plan.plan import plan
from quire_operator.spec.kinds import DEPLOYMENT, JOB, LLM_DEPLOYMENT, PERSISTENT_VOLUME_CLAIM, POD, ref_of
from quire_operator.spec.settings import Settings, parse_settings
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import Observed
from quire_server.models.footprint import shape_of_config

NOW = 1_800_000_000.0
GIB = 1 << 30
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
"""The sizes of Llama 3.2 1B: 2.3 GiB of weights."""
FACTS = ModelFacts(path="b-1234", bytes=2_500_000_000, revision="abc", shape=shape_of_config(LLAMA))
SPEC: dict[str, Any] = {
    "model": {"uri": "hf://a/b"},
    "engine": {"maxModelLen": 4096},
    "resources": {"limits": {"cpu": "4", "memory": "8Gi"}},
    "replicas": 1,
}
CLAIM = names.cache_pvc_name("hf://a/b")
JOB_NAME = names.download_job_name("hf://a/b", None, CLAIM)
WORKLOAD = Ref(kind=DEPLOYMENT, namespace="ns", name="m")
CLUSTER = ClusterFacts(has_default_storage_class=True, expandable_storage_classes=frozenset({"fast"}))


def manifest(spec: dict[str, Any] | None = None, **status: Any) -> Manifest:
    """Return an LLMDeployment called `m`; fields of `spec` replace those of `SPEC`, and None takes one out."""
    merged = {key: value for key, value in {**SPEC, **(spec or {})}.items() if value is not None}
    return {
        "apiVersion": names.GROUP_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "m", "namespace": "ns", "uid": "uid-m", "generation": 1},
        "spec": copy.deepcopy(merged),
        "status": status,
    }


@dataclass
class World:
    """One LLMDeployment and all that belongs to it."""

    manifest: Manifest = field(default_factory=manifest)
    cluster: ClusterFacts = CLUSTER
    settings: Settings = field(default_factory=lambda: parse_settings({}))
    now: float = NOW
    observed: Observed = field(init=False)
    _last_uid: int = 0

    def __post_init__(self) -> None:
        self.observed = Observed(manifest=self.manifest)

    def plan(self) -> Plan:
        return plan(self.observed, self.cluster, self.settings, self.now)

    def see(self, **fields: Any) -> None:
        """Change what is observed."""
        self.observed = replace(self.observed, **fields)

    def set_spec(self, **fields: Any) -> None:
        changed = copy.deepcopy(self.observed.manifest)
        changed["spec"] = {key: v for key, v in {**changed["spec"], **fields}.items() if v is not None}
        self.see(manifest=changed)

    def set_status(self, **fields: Any) -> None:
        changed = copy.deepcopy(self.observed.manifest)
        changed["status"] = {**changed["status"], **fields}
        self.see(manifest=changed)

    def step(self) -> Plan:
        """Plan, and carry it out."""
        made = self.plan()
        deleted = {action.ref for action in made.actions if isinstance(action, Delete)}
        applied = {ref_of(action.manifest) for action in made.actions if isinstance(action, Apply)}
        assert deleted.isdisjoint(applied), "what is deleted cannot be applied before it is gone"
        for action in made.actions:
            self.carry_out(action)
        return made

    def settle(self) -> Plan:
        """Carry out plans until there is nothing left to do; a plan should need few rounds."""
        for _ in range(4):
            made = self.step()
            if not made.actions:
                return made
        raise AssertionError(f"plans never end: {self.plan().actions}")

    def carry_out(self, action: Action) -> None:
        match action:
            case Apply(manifest=document):
                self._put(self._store(document))
            case Delete(ref=ref, uid=uid):
                assert self.find(ref)["metadata"]["uid"] == uid
                self._remove(ref)
            case SetReplicas(ref=ref, replicas=replicas):
                live = copy.deepcopy(self.find(ref))
                live["spec"]["replicas"] = replicas
                self._put(live)
            case Annotate(ref=ref, annotations=annotations):
                live = copy.deepcopy(self.find(ref))
                live["metadata"].setdefault("annotations", {}).update(annotations)
                self._put(live)

    def find(self, ref: Ref) -> Manifest:
        if ref.kind == LLM_DEPLOYMENT:
            return self.observed.manifest
        if ref.kind == POD:
            return next(pod for pod in self.observed.pods if pod["metadata"]["name"] == ref.name)
        shared = {PERSISTENT_VOLUME_CLAIM: self.observed.volume, JOB: self.observed.job}
        found = shared[ref.kind] if ref.kind in shared else self.observed.children[ref]
        assert found is not None
        assert found["metadata"]["name"] == ref.name
        return found

    def workload(self) -> Manifest:
        return self.find(Ref(kind=DEPLOYMENT, namespace="ns", name="m"))

    def _store(self, document: Manifest) -> Manifest:
        """Return a document as an API server would keep it."""
        ref = ref_of(document)
        try:
            uid = self.find(ref)["metadata"]["uid"]
        except (KeyError, AssertionError):
            self._last_uid += 1
            uid = f"uid-{self._last_uid}"
        live = copy.deepcopy(document)
        live["metadata"] |= {"uid": uid, "resourceVersion": "1", "creationTimestamp": format_time(self.now)}
        if ref.kind == DEPLOYMENT:
            live["spec"]["template"]["spec"] |= {"dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler"}
            live["spec"]["template"]["metadata"]["creationTimestamp"] = None
        if ref.kind == PERSISTENT_VOLUME_CLAIM:
            live["spec"] = {"storageClassName": "fast", **live["spec"], "volumeMode": "Filesystem"}
            live["status"] = {"phase": "Bound", "capacity": live["spec"]["resources"]["requests"]}
        return live

    def _put(self, live: Manifest) -> None:
        ref = ref_of(live)
        if ref.kind == LLM_DEPLOYMENT:
            self.see(manifest=live)
        elif ref.kind == PERSISTENT_VOLUME_CLAIM:
            self.see(volume=live)
        elif ref.kind == JOB:
            self.see(job=live)
        elif ref.kind == POD:
            self.see(pods=tuple(live if p["metadata"]["name"] == ref.name else p for p in self.observed.pods))
        else:
            self.see(children={**self.observed.children, ref: live})

    def _remove(self, ref: Ref) -> None:
        if ref.kind == JOB:
            self.see(job=None, job_pods=())
        elif ref.kind == PERSISTENT_VOLUME_CLAIM:
            self.see(volume=None)
        else:
            self.see(children={other: live for other, live in self.observed.children.items() if other != ref})

    def end_job(self, type_: str, *, ago_s: float = 0.0) -> None:
        live = copy.deepcopy(self.observed.job)
        assert live is not None
        live["status"] = {"conditions": [condition(type_, "True", at=self.now - ago_s)]}
        self.see(job=live)

    def add_job_pod(self, phase: str, *, waiting: dict[str, str] | None = None, **terminated: Any) -> Manifest:
        """Let the Job have one more pod. `waiting` and `terminated` are the container's states."""
        assert self.observed.job is not None
        self._last_uid += 1
        state: Manifest = {"terminated": terminated} if terminated else {"running": {}}
        if waiting is not None:
            state = {"waiting": waiting}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"pod-{self._last_uid:03}",
                "namespace": "ns",
                "uid": f"uid-{self._last_uid}",
                "creationTimestamp": format_time(self.now + self._last_uid),
                "ownerReferences": [{"kind": "Job", "uid": self.observed.job["metadata"]["uid"]}],
            },
            "status": {"phase": phase, "containerStatuses": [{"name": "download", "state": state}]},
        }
        self.see(job_pods=(*self.observed.job_pods, pod))
        return pod

    def fail_job_pod(self, code: str, message: str = "It failed.", **fields: Any) -> Manifest:
        told = encode_termination(TerminationMessage(code=code, stage="Downloading", message=message, **fields))
        return self.add_job_pod(
            "Failed", message=told.decode(), exitCode=1, reason="Error", finishedAt=format_time(self.now)
        )

    def download(self, facts: ModelFacts = FACTS) -> None:
        """Let the download come to its good end, and the plan take note of it."""
        self.settle()
        self.add_job_pod("Succeeded", message=encode_facts(facts).decode(), exitCode=0)
        self.end_job("Complete")
        self.settle()

    def add_pod(self, *, is_ready: bool = True, unschedulable_since: float | None = None, **metadata: Any) -> str:
        """Add a pod of the live workload's revision; return its name."""
        self._last_uid += 1
        name = f"m-{self._last_uid}"
        revision = self.workload()["metadata"]["labels"][names.LABEL_REVISION]
        conditions = [condition("Ready", str(is_ready), at=self.now)]
        if unschedulable_since is None:
            conditions.append(condition("PodScheduled", "True", at=self.now))
        else:
            conditions.append(
                condition("PodScheduled", "False", at=unschedulable_since, reason="Unschedulable", message="no GPU")
            )
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": "ns",
                "uid": f"uid-{name}",
                "labels": {names.LABEL_REVISION: revision},
                **metadata,
            },
            "status": {"conditions": conditions},
        }
        self.see(pods=(*self.observed.pods, pod))
        return name


def condition(type_: str, status: str, *, at: float, **fields: str) -> Manifest:
    return {"type": type_, "status": status, "lastTransitionTime": format_time(at), **fields}


def described(actions: tuple[Action, ...]) -> list[str]:
    """Return actions as short texts: `Apply Service/m`."""
    texts = []
    for action in actions:
        ref = ref_of(action.manifest) if isinstance(action, Apply) else action.ref
        texts.append(f"{type(action).__name__} {ref.kind.kind}/{ref.name}")
    return texts


def served(spec: dict[str, Any] | None = None, **world: Any) -> World:
    """Return a world in which the model is there and the workload made."""
    made = World(manifest=manifest(spec), **world)
    made.download()
    return made


def downloading(spec: dict[str, Any] | None = None, **world: Any) -> World:
    """Return a world in which the volume and the download Job are made."""
    made = World(manifest=manifest(spec), **world)
    made.settle()
    return made


def pending(world: World, **spec: Any) -> None:
    """Let the volume be unbound, with these fields of its spec."""
    volume = copy.deepcopy(world.observed.volume)
    assert volume is not None
    volume["status"] = {"phase": "Pending"}
    volume["spec"].update(spec)
    world.see(volume=volume)


def says(world: World) -> tuple[str, str]:
    """Return reason and message of why the model is not in its volume."""
    cached = world.plan().model_cached
    assert cached.holds is False
    return cached.reason, cached.message


def attempt(world: World) -> str:
    """Return which try the download Job is."""
    assert world.observed.job is not None
    text: str = world.observed.job["metadata"]["annotations"][names.ANNOTATION_ATTEMPT]
    return text

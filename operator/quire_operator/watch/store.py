"""What the operator knows of the cluster's objects: a cache that watch events and the operator's own writes feed.

Holds each object once, packed, found by name and by what it belongs to. Knows no API server; decides nothing.
Invariants: an older version of an object never replaces a newer one, nor brings back what is gone; a deletion that has
begun is never undone; what is looked up is a fresh copy, the caller's own. Every piece of news, whoever brings
it, is told to `on_change` once: the echo of a write that the store has seen already is no news.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from quire_contract import names
from quire_contract.model_uri import ModelUriError, Scheme, parse_model_uri
from quire_kube.objects import Key, Kind, Manifest, Ref, annotation_of, label_of
from quire_operator.spec.kinds import (
    EVENT,
    JOB,
    LLM_DEPLOYMENT,
    OWNED_KINDS,
    PERSISTENT_VOLUME_CLAIM,
    POD,
    WORKLOAD_KINDS,
    pod_templates_of,
    ref_of,
)
from quire_operator.watch.packing import pack, unpack
from quire_operator.watch.pods import is_over

_MAX_TOMBSTONES: Final = 4096
_LABEL_JOB_NAME: Final = "batch.kubernetes.io/job-name"


class ModelPlace(NamedTuple):
    """Where the model of one LLMDeployment is kept."""

    claim: str
    job: str


def model_place(manifest: Manifest) -> ModelPlace | None:
    """Return where an LLMDeployment's model is; None where it needs no claim, or its URI cannot be read."""
    spec = manifest.get("spec") or {}
    model = spec.get("model") or {}
    try:
        uri = parse_model_uri(model.get("uri") or "")
    except ModelUriError:
        return None
    revision = model.get("revision")
    if uri.scheme is Scheme.PVC:
        claim = uri.authority
    elif uri.is_downloaded:
        claim = (spec.get("cache") or {}).get("existingClaim") or names.cache_pvc_name(str(uri), revision)
    else:
        return None
    return ModelPlace(claim, names.download_job_name(str(uri), revision, claim))


class _Entry(NamedTuple):
    packed: bytes
    uid: str
    version: int
    is_ending: bool
    groups: tuple[Hashable, ...]


class Store:
    """The cache. A look-up costs what it returns.

    Args:
        on_change: told which LLMDeployments each piece of news concerns.
    """

    def __init__(self, on_change: Callable[[frozenset[Key]], None] = lambda keys: None) -> None:
        self._on_change = on_change
        self._entries: dict[Ref, _Entry] = {}
        self._groups: dict[Hashable, dict[Ref, None]] = {}
        self._tombstones: dict[str, int] = {}  # uids that are gone, oldest first, and the version they went at

    def put(self, manifest: Manifest) -> bool:
        """Take in an object as an event or the answer to a write brought it. False: it was no news."""
        metadata = manifest["metadata"]
        uid, version = metadata.get("uid", ""), _version(metadata)
        is_ending = "deletionTimestamp" in metadata
        ref = ref_of(manifest)
        known = self._entries.get(ref)
        if uid in self._tombstones and version <= self._tombstones[uid]:
            return False
        if known is not None:
            is_older = known.version >= version >= 0
            is_undoing = known.uid == uid and known.is_ending and not is_ending
            if is_older or is_undoing:
                return False
        entry = _Entry(pack(manifest), uid, version, is_ending, tuple(_groups_of(ref, manifest)))
        self._replace(ref, known, entry)
        self._on_change(self.keys_for(manifest) | self._left_behind(known, entry))
        return True

    def remove(self, manifest: Manifest) -> bool:
        """Take in that an object is gone. False: this incarnation was not here."""
        uid = manifest["metadata"].get("uid", "")
        self._bury(uid, _version(manifest["metadata"]))
        ref = ref_of(manifest)
        known = self._entries.get(ref)
        if known is None or known.uid != uid:
            return False
        self._replace(ref, known, None)
        self._on_change(self.keys_for(manifest) | self._left_behind(known, None))
        return True

    def mark_ending(self, ref: Ref, uid: str, since: str) -> None:
        """Note that this incarnation has been deleted by us; the event that it is gone comes later."""
        known = self._entries.get(ref)
        if known is None or known.uid != uid or known.is_ending:
            return
        manifest = unpack(known.packed)
        manifest["metadata"]["deletionTimestamp"] = since
        self._entries[ref] = known._replace(packed=pack(manifest), is_ending=True)

    def get(self, ref: Ref) -> Manifest | None:
        entry = self._entries.get(ref)
        return None if entry is None else unpack(entry.packed)

    def is_ending(self, ref: Ref) -> bool:
        """Whether the object is there and being deleted."""
        entry = self._entries.get(ref)
        return entry is not None and entry.is_ending

    def llm(self, key: Key) -> Manifest | None:
        return self.get(Ref(kind=LLM_DEPLOYMENT, namespace=key.namespace, name=key.name))

    def keys(self) -> frozenset[Key]:
        """Return all LLMDeployments."""
        return frozenset(_key_of(ref) for ref in self._groups.get(("kind", LLM_DEPLOYMENT), ()))

    def children_of(self, key: Key, uid: str) -> dict[Ref, Manifest]:
        """Return the objects of `OWNED_KINDS` whose owner reference names this incarnation of the LLMDeployment.

        Those that we applied and whose owner reference was taken away are children, too.
        """
        found = self._members(("child", key))
        return {ref: manifest for ref, manifest in found if _is_child(manifest, uid)}

    def pods_of(self, key: Key) -> tuple[Manifest, ...]:
        """Return the serving pods, by name."""
        return self._sorted(("pod", key))

    def volume(self, namespace: str, claim: str) -> Manifest | None:
        return self.get(Ref(kind=PERSISTENT_VOLUME_CLAIM, namespace=namespace, name=claim))

    def job(self, namespace: str, name: str) -> Manifest | None:
        return self.get(Ref(kind=JOB, namespace=namespace, name=name))

    def job_pods(self, namespace: str, job: str) -> tuple[Manifest, ...]:
        """Return a Job's pods, by name."""
        return self._sorted(("job pod", namespace, job))

    def keys_using_claim(self, namespace: str, claim: str) -> frozenset[Key]:
        """Return the LLMDeployments whose model is, or is to be, in this claim."""
        return self._users(("uses claim", namespace, claim))

    def claims_without_users(self, namespace: str) -> tuple[Manifest, ...]:
        """Return the cache volumes of ours that no LLMDeployment of the namespace has its model in.

        What its workload or pods still mount is used, whatever its spec says by now.
        """
        unused = self._unused(PERSISTENT_VOLUME_CLAIM, "uses claim", namespace)
        return tuple(claim for claim in unused if _mounts(namespace, claim["metadata"]["name"]) not in self._groups)

    def jobs_without_users(self, namespace: str) -> tuple[Manifest, ...]:
        """Return the download Jobs that no LLMDeployment of the namespace waits for."""
        return self._unused(JOB, "uses job", namespace)

    def keys_for(self, manifest: Manifest) -> frozenset[Key]:
        """Return the LLMDeployments that an object concerns: those to look at after it changed.

        A cache volume or download Job of ours that has no user gives a key that is no LLMDeployment's, so that the
        reconcile of that key clears it away.
        """
        if manifest["kind"] == EVENT.kind:
            about = _ref_about(manifest)
            known = None if about is None else self.get(about)
            return frozenset() if known is None else self.keys_for(known)
        ref = ref_of(manifest)
        if ref.kind == LLM_DEPLOYMENT:
            return frozenset({_key_of(ref)})
        keys = {group[1] for group in _groups_of(ref, manifest) if group[0] in ("child", "pod")}
        job = ref.name if ref.kind == JOB else label_of(manifest, _LABEL_JOB_NAME)
        if job is not None:
            keys |= self._users(("uses job", ref.namespace, job))
        if ref.kind == PERSISTENT_VOLUME_CLAIM:
            keys |= self.keys_using_claim(ref.namespace, ref.name)
        is_shared = ref.kind in (PERSISTENT_VOLUME_CLAIM, JOB) and label_of(manifest, names.LABEL_CACHE) is not None
        return frozenset(keys or ({_key_of(ref)} if is_shared else ()))

    def versions(self, kind: Kind) -> dict[Ref, tuple[str, int]]:
        """Return uid and version of every object of a kind."""
        refs = self._groups.get(("kind", kind), ())
        return {ref: (self._entries[ref].uid, self._entries[ref].version) for ref in refs}

    def num_bytes(self) -> int:
        """Return the bytes of all packed objects."""
        return sum(len(entry.packed) for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def _replace(self, ref: Ref, old: _Entry | None, new: _Entry | None) -> None:
        for group in old.groups if old else ():
            members = self._groups[group]
            del members[ref]
            if not members:
                del self._groups[group]
        if new is None:
            self._entries.pop(ref, None)
            return
        self._entries[ref] = new
        for group in new.groups:
            self._groups.setdefault(group, {})[ref] = None

    def _bury(self, uid: str, version: int) -> None:
        """Refuse what comes late. Newer versions may come: a watch by label loses an object, and finds it again."""
        self._tombstones[uid] = max(version, self._tombstones.get(uid, -1))
        if len(self._tombstones) > _MAX_TOMBSTONES:
            del self._tombstones[next(iter(self._tombstones))]

    def _members(self, group: Hashable) -> Iterator[tuple[Ref, Manifest]]:
        for ref in self._groups.get(group, ()):
            yield ref, unpack(self._entries[ref].packed)

    def _sorted(self, group: Hashable) -> tuple[Manifest, ...]:
        return tuple(manifest for _, manifest in sorted(self._members(group), key=lambda member: member[0].name))

    def _left_behind(self, old: _Entry | None, new: _Entry | None) -> frozenset[Key]:
        """Return those that shared something with an LLMDeployment until now: what it wished holds them no more."""
        left = set(old.groups if old else ()) - set(new.groups if new else ())
        shared = [group for group in left if isinstance(group, tuple) and group[0] in ("uses claim", "uses job")]
        return frozenset(key for group in shared for key in self._users(group))

    def _users(self, group: Hashable) -> frozenset[Key]:
        return frozenset(_key_of(ref) for ref in self._groups.get(group, ()))

    def _unused(self, kind: Kind, use: str, namespace: str) -> tuple[Manifest, ...]:
        shared = self._groups.get(("shared", kind, namespace), ())
        unused = sorted(ref for ref in shared if (use, namespace, ref.name) not in self._groups)
        return tuple(unpack(self._entries[ref].packed) for ref in unused)


def owner_uids(manifest: Manifest) -> frozenset[str]:
    """Return the uids of the LLMDeployments that own an object."""
    return frozenset(owner.get("uid", "") for owner in _owners(manifest))


def _is_child(manifest: Manifest, uid: str) -> bool:
    uids = owner_uids(manifest)
    return uid in uids or (not uids and annotation_of(manifest, names.ANNOTATION_APPLIED_HASH) is not None)


def _owners(manifest: Manifest) -> list[Mapping[str, Any]]:
    references = manifest["metadata"].get("ownerReferences") or []
    return [owner for owner in references if owner.get("kind") == names.KIND and _group_of(owner) == names.API_GROUP]


def _group_of(owner: Mapping[str, Any]) -> str:
    return str(owner.get("apiVersion", "")).partition("/")[0]


def _groups_of(ref: Ref, manifest: Manifest) -> Iterator[tuple[Any, ...]]:
    """Yield what an object is found under, each a tuple that begins with the kind of relation."""
    yield "kind", ref.kind
    namespace = ref.namespace
    deployment = label_of(manifest, names.LABEL_DEPLOYMENT)
    if ref.kind == LLM_DEPLOYMENT:
        place = model_place(manifest)
        if place is not None:
            yield "uses claim", namespace, place.claim
            yield "uses job", namespace, place.job
    elif ref.kind == POD:
        job = label_of(manifest, _LABEL_JOB_NAME)
        if job is not None:
            yield "job pod", namespace, job
        elif deployment is not None:
            yield "pod", Key(namespace=namespace, name=deployment)
            yield from _mounts_of_pod(namespace, manifest)
    elif ref.kind in OWNED_KINDS:
        owners = {owner.get("name", "") for owner in _owners(manifest)} or {deployment}
        for name in sorted(owner for owner in owners if owner):
            yield "child", Key(namespace=namespace, name=name)
        if ref.kind in WORKLOAD_KINDS:
            yield from _mounts_of_workload(namespace, manifest)
    elif label_of(manifest, names.LABEL_CACHE) and label_of(manifest, names.LABEL_MANAGED_BY) == names.MANAGED_BY:
        yield "shared", ref.kind, namespace


def _mounts_of_pod(namespace: str, pod: Manifest) -> Iterator[tuple[Any, ...]]:
    """Yield the relation of a pod that is not over to its model's claim: by label, because its volumes are trimmed."""
    digest = label_of(pod, names.LABEL_CLAIM)
    if digest is not None and not is_over(pod):
        yield "mounts claim", namespace, digest


def _mounts_of_workload(namespace: str, workload: Manifest) -> Iterator[tuple[Any, ...]]:
    templates = (template for _, template in pod_templates_of(workload))
    volumes = [volume for template in templates for volume in (template.get("spec") or {}).get("volumes") or ()]
    claims = {name for volume in volumes if (name := (volume.get("persistentVolumeClaim") or {}).get("claimName"))}
    for claim in sorted(claims):
        yield _mounts(namespace, claim)


def _mounts(namespace: str, claim: str) -> tuple[Any, ...]:
    return "mounts claim", namespace, names.claim_digest(claim)


def _ref_about(event: Manifest) -> Ref | None:
    """Return what an Event is about, where that is a kind of ours."""
    about = event.get("involvedObject") or {}
    try:
        return ref_of({"metadata": about, **about})
    except KeyError:
        return None


def _key_of(ref: Ref) -> Key:
    return Key(namespace=ref.namespace, name=ref.name)


def _version(metadata: Mapping[str, Any]) -> int:
    """Read a resource version; -1 where it cannot be compared, so that what comes is taken."""
    text = metadata.get("resourceVersion", "")
    return int(text) if text.isdigit() else -1

"""An API server in memory: enough of its semantics for the operator's client side to be tested against.

Server-side apply with field ownership, uid, resourceVersion, generation, the status subresource, conflicts, finalizers,
garbage collection by owner, terminating namespaces, and a log of watch events that a test delivers when it likes.
"""

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from quire_contract import names
from quire_contract.crd import load_schema
from quire_kube.api import (
    AlreadyExistsError,
    ConflictError,
    InvalidError,
    KubeError,
    Manifests,
    NamespaceTerminatingError,
    NotFoundError,
    UnavailableError,
)
from quire_kube.objects import Kind, Manifest, Ref
from quire_operator.spec.kinds import LLM_DEPLOYMENT, ref_of
from quire_operator.spec.schema import with_defaults

_LIST_KEYS = ("name", "type", "uid", "mountPath", "containerPort", "port", "topologyKey")
_BY_SERVER = ("uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")
CREATED = "2026-01-31T12:00:00Z"


class FakeKube:
    """See `quire_kube.api.Kube`. `now_text` is the time of the server's clock."""

    def __init__(self) -> None:
        self.objects: dict[Ref, Manifest] = {}
        self.events: list[tuple[str, Manifest]] = []
        """What a watch would have brought so far: ADDED, MODIFIED or DELETED, and the object."""
        self.calls: list[tuple[str, str]] = []
        """Verb and object, failed ones too."""
        self.terminating: set[str] = set()
        self.refuse: Callable[[str, Ref], KubeError | None] = lambda verb, ref: None
        self.now_text = CREATED
        self.raw: dict[str, Any] = {}
        self._owned: dict[tuple[Ref, str], Manifest] = {}
        self._counter = itertools.count(1)
        self._fail_at: tuple[int, bool] | None = None

    @property
    def writes(self) -> list[tuple[str, str]]:
        """Calls that ask for a change, but for those that find the name taken."""
        return [call for call in self.calls if call[0] not in ("get", "list", "create, taken")]

    def fail_at(self, num_call: int, *, after: bool) -> None:
        """Fail the call of this number, counted from 0 and from now: before it does anything, or after (no answer)."""
        self._fail_at = (len(self.calls) + num_call, after)

    # What other people and controllers do.

    def put(self, manifest: Manifest) -> Manifest:
        """Create or change an object as somebody else: everything but what the server itself sets is taken."""
        ref = ref_of(manifest)
        live = self.objects.get(ref)
        wanted = copy.deepcopy(manifest)
        if live is None:
            return self._create(ref, wanted)
        for name in _BY_SERVER:
            if name in live["metadata"]:
                wanted["metadata"][name] = live["metadata"][name]
        return self._save(ref, wanted)

    def edit(self, ref: Ref, patch: Mapping[str, Any]) -> Manifest:
        """JSON merge patch as somebody else."""
        return self._save(ref, _merge_patched(self.objects[ref], patch))

    def remove(self, ref: Ref) -> None:
        """Delete as somebody else, finalizers or not."""
        self._erase(ref)

    def of_kind(self, kind: Kind) -> list[Manifest]:
        return [copy.deepcopy(manifest) for ref, manifest in sorted(self.objects.items()) if ref.kind == kind]

    # Kube.

    async def apply(self, manifest: Manifest) -> Manifest:
        with_main = {key: value for key, value in manifest.items() if key != "status"}
        return self._call("apply", ref_of(manifest), lambda ref: self._apply(ref, with_main, "main"))

    async def apply_status(self, manifest: Manifest) -> Manifest:
        def work(ref: Ref) -> Manifest:
            live = self._find(ref)
            uid = manifest["metadata"].get("uid")
            if uid is not None and uid != live["metadata"]["uid"]:
                raise ConflictError(f"uid of {ref}")
            return self._apply(ref, {"status": manifest["status"]}, "status")

        return self._call("apply_status", ref_of(manifest), work)

    async def merge_patch(self, ref: Ref, patch: Mapping[str, Any], *, subresource: str | None = None) -> Manifest:
        def work(ref: Ref) -> Manifest:
            live = self._find(ref)
            metadata, version = patch.get("metadata") or {}, live["metadata"]["resourceVersion"]
            if metadata.get("resourceVersion", version) != version:
                raise ConflictError(f"{ref} has changed")
            patched = _merge_patched(live, patch)
            for entry in metadata.get("managedFields") or ():
                if entry["operation"] == "Apply":
                    self._owned[ref, "main"] = copy.deepcopy(entry["fieldsV1"])
                    patched["metadata"]["managedFields"].remove(entry)
            return self._save(ref, patched)

        return self._call("patch", ref, work)

    async def create(self, manifest: Manifest, *, manager: str = names.FIELD_MANAGER) -> Manifest:
        def work(ref: Ref) -> Manifest:
            if ref in self.objects:
                self.calls[-1] = ("create, taken", str(ref))
                raise AlreadyExistsError(str(ref))
            wanted = copy.deepcopy(manifest)
            wanted["metadata"]["managedFields"] = [_update_entry(manager, manifest)]
            return self._create(ref, wanted)

        return self._call("create", ref_of(manifest), work)

    async def replace(self, manifest: Manifest, *, manager: str = names.FIELD_MANAGER) -> Manifest:
        def work(ref: Ref) -> Manifest:
            live = self._find(ref)
            if live["metadata"]["resourceVersion"] != manifest["metadata"].get("resourceVersion"):
                raise ConflictError(f"{ref} has changed")
            wanted = copy.deepcopy(manifest)
            wanted["metadata"] |= {name: live["metadata"][name] for name in _BY_SERVER if name in live["metadata"]}
            managed = live["metadata"].get("managedFields", ())
            others = [entry for entry in managed if entry["manager"] != manager]
            before = next((entry["fieldsV1"] for entry in managed if entry["manager"] == manager), {})
            written = _merged(before, _changed(live, manifest))
            wanted["metadata"]["managedFields"] = [*others, _update_entry(manager, written)]
            return self._save(ref, wanted)

        return self._call("update", ref_of(manifest), work)

    async def get(self, ref: Ref) -> Manifest | None:
        def work(ref: Ref) -> Manifest | None:
            live = copy.deepcopy(self.objects.get(ref))
            applied = self._owned.get((ref, "main"))
            if live is not None and applied is not None:
                entry = {"manager": names.FIELD_MANAGER, "operation": "Apply", "fieldsV1": copy.deepcopy(applied)}
                live["metadata"].setdefault("managedFields", []).append(entry)
            return live

        return self._call("get", ref, work)

    async def list(
        self,
        kind: Kind,
        namespace: str | None = None,
        label_selector: str | None = None,
        field_selector: str | None = None,
    ) -> Manifests:
        def work(_: Ref) -> Manifests:
            wanted = dict(part.split("=", 1) for part in (label_selector or "").split(",") if part)
            fields = dict(part.split("=", 1) for part in (field_selector or "").split(",") if part)
            return [
                manifest
                for manifest in self.of_kind(kind)
                if namespace in (None, manifest["metadata"].get("namespace"))
                and wanted.items() <= (manifest["metadata"].get("labels") or {}).items()
                and all(_at(manifest, path) == value for path, value in fields.items())
            ]

        return self._call("list", Ref(kind=kind, namespace=namespace or "", name="*"), work)

    async def delete(self, ref: Ref, uid: str) -> None:
        def work(ref: Ref) -> None:
            live = self.objects.get(ref)
            if live is None or live["metadata"]["uid"] != uid:
                return
            if live["metadata"].get("finalizers"):
                ending = copy.deepcopy(live)
                ending["metadata"]["deletionTimestamp"] = self.now_text
                self._save(ref, ending)
            else:
                self._erase(ref)

        self._call("delete", ref, work)

    async def raw_get(self, path: str) -> Any:
        if path not in self.raw:
            raise NotFoundError(path)
        return self.raw[path]

    def _call(self, verb: str, ref: Ref, work: Callable[[Ref], Any]) -> Any:
        num = len(self.calls)
        self.calls.append((verb, str(ref)))
        is_lost = self._fail_at is not None and self._fail_at[0] == num
        if is_lost and self._fail_at is not None and not self._fail_at[1]:
            raise UnavailableError("injected, before")
        refusal = self.refuse(verb, ref)
        if refusal is not None:
            raise refusal
        result = work(ref)
        if is_lost:
            raise UnavailableError("injected, after")
        return result

    def _find(self, ref: Ref) -> Manifest:
        if ref not in self.objects:
            raise NotFoundError(str(ref))
        return self.objects[ref]

    def _apply(self, ref: Ref, document: Manifest, part: str) -> Manifest:
        live = self.objects.get(ref)
        owned_before = self._owned.get((ref, part))
        if live is None:
            saved = self._create(ref, copy.deepcopy(document))
        else:
            # Whoever has put the whole object owns every field of it as well, until its entry is taken out.
            managed = live["metadata"].get("managedFields") or ()
            is_shared = any(entry["operation"] == "Update" for entry in managed)
            is_owned = owned_before is not None and not is_shared
            without = _removed(live, owned_before, document) if is_owned else live
            saved = self._save(ref, _merged(without, document))
        self._owned[ref, part] = copy.deepcopy(document)
        return saved

    def _create(self, ref: Ref, manifest: Manifest) -> Manifest:
        if ref.namespace in self.terminating:
            raise NamespaceTerminatingError(f"{ref}: namespace {ref.namespace} is being terminated")
        metadata = manifest["metadata"]
        metadata["uid"] = f"uid-{next(self._counter)}"
        metadata["creationTimestamp"] = self.now_text
        metadata["generation"] = 1
        metadata.pop("resourceVersion", None)
        return self._store(ref, manifest, "ADDED")

    def _save(self, ref: Ref, manifest: Manifest) -> Manifest:
        live = self.objects[ref]
        manifest = self._defaulted(ref, copy.deepcopy(manifest))
        if manifest == live:
            return copy.deepcopy(live)
        if _desired_part(manifest) != _desired_part(live):
            manifest["metadata"]["generation"] = live["metadata"]["generation"] + 1
        if "deletionTimestamp" in manifest["metadata"] and not manifest["metadata"].get("finalizers"):
            self._erase(ref)
            return manifest
        return self._store(ref, manifest, "MODIFIED")

    def _store(self, ref: Ref, manifest: Manifest, event: str) -> Manifest:
        manifest = self._defaulted(ref, manifest)
        controllers = [o for o in manifest["metadata"].get("ownerReferences", ()) if o.get("controller")]
        if len(controllers) > 1:
            field = "metadata.ownerReferences"
            raise InvalidError(f"{ref}: {field}", ((field, "Only one reference can have Controller set to true"),))
        manifest["metadata"]["resourceVersion"] = str(next(self._counter))
        self.objects[ref] = manifest
        self.events.append((event, copy.deepcopy(manifest)))
        return copy.deepcopy(manifest)

    def _defaulted(self, ref: Ref, manifest: Manifest) -> Manifest:
        if ref.kind == LLM_DEPLOYMENT and "spec" in manifest:
            schema = load_schema()["properties"]["spec"]
            return {**manifest, "spec": with_defaults(manifest["spec"], schema)}
        return manifest

    def _erase(self, ref: Ref) -> None:
        gone = self.objects.pop(ref)
        for part in ("main", "status"):
            self._owned.pop((ref, part), None)
        gone["metadata"]["resourceVersion"] = str(next(self._counter))
        self.events.append(("DELETED", copy.deepcopy(gone)))
        uid = gone["metadata"]["uid"]
        for other in [o for o, m in self.objects.items() if uid in _owner_uids(m)]:
            if other in self.objects:
                self._erase(other)


def _update_entry(manager: str, written: Manifest) -> Manifest:
    """Managed fields of whoever writes a whole object; what it wrote stands for the set of its fields."""
    return {"manager": manager, "operation": "Update", "fieldsV1": copy.deepcopy(written)}


def _changed(live: Any, wanted: Any) -> Any:
    """Return what of a document differs from the live object."""
    if not isinstance(live, dict) or not isinstance(wanted, dict):
        return wanted
    return {key: _changed(live.get(key), value) for key, value in wanted.items() if live.get(key) != value}


def _owner_uids(manifest: Manifest) -> set[str]:
    return {owner["uid"] for owner in manifest["metadata"].get("ownerReferences") or ()}


def _desired_part(manifest: Manifest) -> Manifest:
    return {key: value for key, value in manifest.items() if key not in ("metadata", "status")}


def _merge_patched(live: Any, patch: Any) -> Any:
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    merged = dict(copy.deepcopy(live)) if isinstance(live, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge_patched(merged.get(key), value)
    return merged


def _key_in(items: list[Any]) -> str | None:
    """The field by which a list's items are merged; None where the list is one value."""
    if not items or not all(isinstance(item, dict) for item in items):
        return None
    return next((key for key in _LIST_KEYS if all(key in item for item in items)), None)


def _merged(live: Any, wanted: Any) -> Any:
    if isinstance(live, dict) and isinstance(wanted, dict):
        return {
            **{key: value for key, value in live.items() if key not in wanted},
            **{key: _merged(live.get(key), value) for key, value in wanted.items()},
        }
    if isinstance(live, list) and isinstance(wanted, list) and (key := _key_in(live + wanted)) is not None:
        by_key = {item[key]: item for item in live}
        named = {item[key] for item in wanted}
        kept = [item for item in live if item[key] not in named]
        return [*kept, *(_merged(by_key.get(item[key]), item) for item in wanted)]
    return copy.deepcopy(wanted)


def _removed(live: Any, before: Any, wanted: Any) -> Any:
    """Take out of the live object what the manager owned before and does not name any more."""
    if isinstance(live, dict) and isinstance(before, dict) and isinstance(wanted, dict):
        return {
            key: _removed(value, before.get(key), wanted[key]) if key in wanted else value
            for key, value in live.items()
            if key in wanted or key not in before or key in ("apiVersion", "kind", "metadata")
        }
    if isinstance(live, list) and isinstance(before, list) and isinstance(wanted, list):
        key = _key_in(live + before + wanted)
        if key is not None:
            was, still = {i[key]: i for i in before}, {i[key]: i for i in wanted}
            return [
                _removed(item, was.get(item[key]), still[item[key]]) if item[key] in still else item
                for item in live
                if item[key] in still or item[key] not in was
            ]
    return live


def _at(manifest: Manifest, path: str) -> str | None:
    value: Any = manifest
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def make_llm(name: str = "smollm2", namespace: str = "default", **spec: Any) -> Manifest:
    """A small LLMDeployment as a user writes it."""
    return {
        "apiVersion": names.GROUP_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
            "resources": {"limits": {"cpu": "2", "memory": "2Gi"}},
            **spec,
        },
    }

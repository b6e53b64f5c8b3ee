"""The client against a small HTTP server: paths, media types, errors, credentials."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from quire_kube.api import (
    AlreadyExistsError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    KubeError,
    MistypedError,
    NamespaceTerminatingError,
    NotFoundError,
    UnavailableError,
    UnreachableError,
    error_from,
)
from quire_kube.client import KubeClient, path_of
from quire_kube.connection import Connection, ConnectionSettingsError, Endpoint
from quire_kube.objects import Ref
from quire_operator.spec.kinds import DEPLOYMENT, LEASE, LLM_DEPLOYMENT, POD, SERVICE, STORAGE_CLASS, ref_of

REF = Ref(kind=SERVICE, namespace="default", name="a")
MANIFEST = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a", "namespace": "default"}, "spec": {}}


def connection(server: str, token: str = "secret", lasts_s: float = 300.0) -> Connection:
    endpoint = Endpoint(server=server.rstrip("/"))
    return Connection(endpoint=endpoint, authorization=f"Bearer {token}", lasts_s=lasts_s)


@dataclass
class Server:
    """Answers what it is told to and keeps what it was asked."""

    answers: list[tuple[int, Any]] = field(default_factory=list)
    """The last one is repeated."""
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str], dict[str, str], Any]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        text = await request.text()
        body = json.loads(text) if text else None
        self.requests.append((request.method, request.path, dict(request.query), dict(request.headers), body))
        code, answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        content = answer if isinstance(answer, str) else json.dumps(answer)
        return web.Response(status=code, text=content, headers=self.headers)


def talk(
    server: Server, ask: Callable[[KubeClient], Awaitable[Any]], tokens: list[str] | None = None
) -> tuple[Any, list[tuple[str, str, int]]]:
    """Let a client talk to the server; return what it got and the calls it counted."""
    calls: list[tuple[str, str, int]] = []

    async def main() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", server.handle)
        async with TestServer(app) as running:
            url = str(running.make_url("/"))

            async def connect() -> Connection:
                return connection(url, tokens.pop(0) if tokens else "secret")

            async with KubeClient(connect, ref_of, lambda *call: calls.append(call)) as kube:
                return await ask(kube)

    return asyncio.run(main()), calls


def test_paths() -> None:
    assert path_of(SERVICE, "default", "a") == "/api/v1/namespaces/default/services/a"
    assert path_of(DEPLOYMENT, "") == "/apis/apps/v1/deployments"
    assert path_of(STORAGE_CLASS, "ignored", "fast") == "/apis/storage.k8s.io/v1/storageclasses/fast"
    status = "/apis/quire.dev/v1alpha1/namespaces/x/llmdeployments/m/status"
    assert path_of(LLM_DEPLOYMENT, "x", "m", "status") == status


def test_apply_is_forced_server_side_apply() -> None:
    server = Server(answers=[(200, MANIFEST)])
    answer, calls = talk(server, lambda kube: kube.apply(MANIFEST))
    method, path, query, headers, body = server.requests[0]
    assert (answer, body) == (MANIFEST, MANIFEST)
    assert (method, path) == ("PATCH", "/api/v1/namespaces/default/services/a")
    assert query == {"fieldManager": "quire-operator", "force": "true"}
    assert headers["Content-Type"] == "application/apply-patch+yaml"
    assert headers["Authorization"] == "Bearer secret"
    assert calls == [("apply", "services", 200)]


def test_only_the_status_is_applied_to_the_status() -> None:
    llm = {"apiVersion": "quire.dev/v1alpha1", "kind": "LLMDeployment", "spec": {"suspend": True}}
    metadata = {"name": "m", "namespace": "x", "uid": "u"}
    manifest = {**llm, "metadata": {**metadata, "resourceVersion": "5"}, "status": {"phase": "Ready"}}
    server = Server(answers=[(200, manifest)])
    talk(server, lambda kube: kube.apply_status(manifest))
    _, path, _, _, body = server.requests[0]
    assert path.endswith("/llmdeployments/m/status")
    assert body == {
        "apiVersion": "quire.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": metadata,
        "status": {"phase": "Ready"},
    }


def test_the_other_writes() -> None:
    server = Server(answers=[(200, MANIFEST)])

    async def write(kube: KubeClient) -> None:
        await kube.merge_patch(REF, {"spec": {"a": None}})
        await kube.create(MANIFEST, manager="whole")
        await kube.replace({**MANIFEST, "apiVersion": LEASE.api_version, "kind": "Lease"})
        await kube.delete(REF, "u1")

    talk(server, write)
    service, lease = "/api/v1/namespaces/default/services", "/apis/coordination.k8s.io/v1/namespaces/default/leases"
    assert [(method, path) for method, path, *_ in server.requests] == [
        ("PATCH", f"{service}/a"),
        ("POST", service),
        ("PUT", f"{lease}/a"),
        ("DELETE", f"{service}/a"),
    ]
    assert server.requests[0][3]["Content-Type"] == "application/merge-patch+json"
    assert [query.get("fieldManager") for _, _, query, *_ in server.requests[:3]] == [
        "quire-operator",
        "whole",
        "quire-operator",
    ]
    options = server.requests[3][4]
    assert (options["propagationPolicy"], options["preconditions"]) == ("Background", {"uid": "u1"})


@pytest.mark.parametrize("code", [404, 409])
def test_deleting_what_is_gone_is_fine(code: int) -> None:
    talk(Server(answers=[(code, {})]), lambda kube: kube.delete(REF, "u1"))


def test_getting_what_is_not_there() -> None:
    assert talk(Server(answers=[(404, {})]), lambda kube: kube.get(REF))[0] is None


def test_listings_come_in_pages_and_items_learn_what_they_are() -> None:
    pages = [
        (200, {"metadata": {"continue": "next"}, "items": [{"metadata": {"name": "a"}}]}),
        (200, {"metadata": {}, "items": [{"metadata": {"name": "b"}}]}),
    ]
    server = Server(answers=list(pages))
    found, _ = talk(server, lambda kube: kube.list(POD, "x", label_selector="a=b", field_selector="type=Warning"))
    assert [(item["kind"], item["metadata"]["name"]) for item in found] == [("Pod", "a"), ("Pod", "b")]
    assert [query.get("continue") for _, _, query, _, _ in server.requests] == [None, "next"]
    assert {query["labelSelector"] for _, _, query, _, _ in server.requests} == {"a=b"}
    assert {query["fieldSelector"] for _, _, query, _, _ in server.requests} == {"type=Warning"}


def test_refused_credentials_are_read_anew_once() -> None:
    server = Server(answers=[(401, {}), (200, {"major": "1"})])
    answer, calls = talk(server, lambda kube: kube.raw_get("/version"), ["old", "new"])
    assert answer == {"major": "1"}
    assert [headers["Authorization"] for _, _, _, headers, _ in server.requests] == ["Bearer old", "Bearer new"]
    assert [code for _, _, code in calls] == [401, 200]
    with pytest.raises(UnavailableError):
        talk(Server(answers=[(401, {})]), lambda kube: kube.raw_get("/version"))


def test_nobody_there() -> None:
    calls: list[int] = []

    async def main() -> None:
        async def connect() -> Connection:
            return connection("http://127.0.0.1:9")

        async with KubeClient(connect, ref_of, lambda verb, kind, code: calls.append(code)) as kube:
            await kube.get(REF)

    with pytest.raises(UnreachableError, match=r"get Service default/a: no answer from http://127\.0\.0\.1:9"):
        asyncio.run(main())
    assert calls == [0]


def test_a_proxys_page_is_no_object() -> None:
    with pytest.raises(KubeError, match="not JSON"):
        talk(Server(answers=[(200, "<html>")]), lambda kube: kube.get(REF))
    with pytest.raises(KubeError):
        talk(Server(answers=[(200, "[" * 100_000 + "]" * 100_000)]), lambda kube: kube.get(REF))
    with pytest.raises(UnavailableError, match="HTTP 502"):
        talk(Server(answers=[(502, "<html>")]), lambda kube: kube.get(REF))


def test_retry_after_is_told() -> None:
    server = Server(answers=[(429, {})], headers={"Retry-After": "7"})
    with pytest.raises(UnavailableError) as caught:
        talk(server, lambda kube: kube.get(REF))
    assert caught.value.retry_after_s == 7


TERMINATING = {
    "details": {"causes": [{"reason": "NamespaceTerminating", "message": "…", "field": "metadata.namespace"}]}
}


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        (404, {}, NotFoundError),
        (404, {"details": {"kind": "namespaces"}}, NamespaceTerminatingError),
        (403, TERMINATING, NamespaceTerminatingError),
        (403, {}, ForbiddenError),
        (409, {"reason": "Conflict"}, ConflictError),
        (409, {"reason": "AlreadyExists"}, AlreadyExistsError),
        (400, {}, InvalidError),
        (422, {}, InvalidError),
        (429, {}, UnavailableError),
        (500, {}, UnavailableError),
        (504, {}, UnavailableError),
        (405, {}, KubeError),
    ],
)
def test_answers_become_errors(code: int, status: dict[str, Any], expected: type[KubeError]) -> None:
    assert type(error_from(code, status, "apply", "Service default/a")) is expected


def test_a_missing_right_names_the_rule() -> None:
    message = (
        'services "a" is forbidden: User "system:serviceaccount:quire-system:quire-operator" cannot patch resource '
        '"services" in API group "" in the namespace "default"'
    )
    error = error_from(403, {"message": message}, "apply", "Service default/a")
    assert str(error).endswith('lacks the rule {apiGroups: [""], resources: [services], verbs: [patch]}')
    quota = error_from(403, {"message": 'pods "a" is forbidden: exceeded quota: small'}, "apply", "Pod default/a")
    assert str(quota).endswith("exceeded quota: small")


def test_invalid_names_the_fields() -> None:
    causes = [{"reason": "FieldValueInvalid", "message": "Invalid value: 99999", "field": "spec.ports[0].port"}]
    error = error_from(422, {"message": "Service is invalid", "details": {"causes": causes}}, "apply", "Service a")
    assert isinstance(error, InvalidError)
    assert error.fields == (("spec.ports[0].port", "Invalid value: 99999"),)


MISTYPED = "failed to create typed patch object (default/a; apps/v1, Kind=Deployment): "
CONTAINER = '.spec.template.spec.containers[name="server"]'


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (
            ".spec.template.spec.nodeSelecter: field not declared in schema",
            [("spec.template.spec.nodeSelecter", "field not declared in schema")],
        ),
        (
            ".spec.template.spec.nodeSelector: expected map, got &{hello}",
            [("spec.template.spec.nodeSelector", "expected map, got hello")],
        ),
        (
            f'errors:\n  {CONTAINER}.env: duplicate entries for key [name="A"]\n'
            f'  {CONTAINER}.env[name="A"].value: expected string, got &value.valueUnstructured{{Value:true}}',
            [
                (f"{CONTAINER[1:]}.env", 'duplicate entries for key [name="A"]'),
                (f'{CONTAINER[1:]}.env[name="A"].value', "expected string, got true"),
            ],
        ),
        ("something else", []),
    ],
)
def test_a_mistyped_document_is_no_failure_of_the_server(text: str, fields: list[tuple[str, str]]) -> None:
    """Messages as Kubernetes 1.34 writes them, with code 500."""
    error = error_from(500, {"message": MISTYPED + text}, "apply", "Deployment default/a")
    assert isinstance(error, MistypedError)
    assert list(error.fields) == fields
    assert text in str(error)


def test_whoever_puts_an_object_can_have_another_name() -> None:
    server = Server(answers=[(200, MANIFEST)])
    talk(server, lambda kube: kube.replace(MANIFEST, manager="quire-operator-replace"))
    assert server.requests[0][2] == {"fieldManager": "quire-operator-replace"}


def test_a_retry_after_that_is_a_date_is_left_out() -> None:
    error = error_from(503, {}, "get", "x", "Wed, 21 Oct 2026 07:28:00 GMT")
    assert isinstance(error, UnavailableError)
    assert error.retry_after_s is None


def test_a_proxy_is_gone_through() -> None:
    server = Server(answers=[(200, {"major": "1"})])

    async def main() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", server.handle)
        async with TestServer(app) as proxy:

            async def connect() -> Connection:
                return Connection(
                    endpoint=Endpoint(server="http://cluster.invalid:6443", proxy_url=str(proxy.make_url("/")))
                )

            async with KubeClient(connect, ref_of, lambda *_: None) as kube:
                return await kube.raw_get("/version")

    assert asyncio.run(main()) == {"major": "1"}
    assert server.requests[0][3]["Host"] == "cluster.invalid:6443"


def test_credentials_that_cannot_be_read_are_no_answer() -> None:
    """A plugin that fails for a while is nothing to end for."""

    async def connect() -> Connection:
        raise ConnectionSettingsError("the plugin failed")

    async def main() -> None:
        async with KubeClient(connect, ref_of, lambda *_: None) as kube:
            await kube.get(REF)

    with pytest.raises(UnreachableError, match="no credentials: the plugin failed"):
        asyncio.run(main())

"""OIDC as a kubeconfig has it, against a small issuer. The judge is client-go's provider and RFC 6749."""

import asyncio
import base64
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from quire_kube.connection import Connection, ConnectionSettingsError, load_connection
from quire_kube.oidc import expires_at


def jwt(expiration: float) -> str:
    # Claims whose text needs the characters in which base64url differs.
    claims = json.dumps({"exp": expiration, "name": "ÿ?>>>~~~"}, ensure_ascii=False).encode()
    return f"h.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.s"


class Issuer:
    """Gives what it is told to; keeps what it was asked."""

    def __init__(self, answer: Mapping[str, Any], status: int = 200) -> None:
        self._answer, self._status = answer, status
        self.asked: list[tuple[dict[str, str], str | None]] = []

    async def token(self, request: web.Request) -> web.Response:
        form = {name: str(value) for name, value in (await request.post()).items()}
        self.asked.append((form, request.headers.get("Authorization")))
        return web.json_response(dict(self._answer), status=self._status)

    async def discovery(self, request: web.Request) -> web.Response:
        return web.json_response({"token_endpoint": str(request.url.origin()) + "/token"})


def load(issuer: Issuer, path: Path, **config: str) -> Connection:
    async def main() -> Connection:
        app = web.Application()
        app.router.add_get("/.well-known/openid-configuration", issuer.discovery)
        app.router.add_post("/token", issuer.token)
        async with TestServer(app) as running:
            write(
                path, {"idp-issuer-url": str(running.make_url("/")), "client-id": "c", "client-secret": "s", **config}
            )
            return await load_connection()

    return asyncio.run(main())


def write(path: Path, config: dict[str, str]) -> None:
    user = {"auth-provider": {"name": "oidc", "config": config}}
    content = {
        "clusters": [{"name": "x", "cluster": {"server": "https://192.0.2.1"}}],
        "users": [{"name": "x", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(content))


def kept(path: Path) -> dict[str, str]:
    found: dict[str, str] = yaml.safe_load(path.read_text())["users"][0]["user"]["auth-provider"]["config"]
    return found


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(found))
    return found


def test_a_token_says_when_it_expires() -> None:
    assert expires_at(jwt(1234.0)) == 1234.0
    assert [expires_at(text) for text in ("", "a.b", "a.b.c", "a.e30.c")] == [0.0] * 4


def test_a_token_that_lasts_is_taken_and_nobody_is_asked(path: Path) -> None:
    token, issuer = jwt(time.time() + 1000), Issuer({})
    connection = load(issuer, path, **{"id-token": token})
    assert connection.authorization == f"Bearer {token}"
    assert 700 < connection.lasts_s < 900
    assert issuer.asked == []


@pytest.mark.parametrize("rotated", [{}, {"refresh_token": "second"}], ids=["kept", "rotated"])
def test_an_expired_token_is_refreshed_and_kept(path: Path, rotated: dict[str, str]) -> None:
    new = jwt(time.time() + 1000)
    issuer = Issuer({"id_token": new, **rotated})
    connection = load(issuer, path, **{"id-token": jwt(time.time() - 1), "refresh-token": "first"})
    assert connection.authorization == f"Bearer {new}"
    basic = f"Basic {base64.b64encode(b'c:s').decode()}"
    assert issuer.asked == [({"grant_type": "refresh_token", "refresh_token": "first"}, basic)]
    assert (kept(path)["id-token"], kept(path)["refresh-token"]) == (new, rotated.get("refresh_token", "first"))


def test_an_issuer_that_refuses_is_told_in_its_words(path: Path) -> None:
    issuer = Issuer({"error": "invalid_grant", "error_description": "session ended"}, 400)
    with pytest.raises(ConnectionSettingsError, match="session ended: log in again"):
        load(issuer, path, **{"refresh-token": "first"})


def test_without_a_refresh_token_one_has_to_log_in_again(path: Path) -> None:
    with pytest.raises(ConnectionSettingsError, match="no refresh-token"):
        load(Issuer({}), path, **{"id-token": jwt(time.time() - 1)})

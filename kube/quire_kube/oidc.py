"""The OIDC provider of a kubeconfig: its id token while it lasts, else a new one from the issuer.

As client-go does it. (The official package trusts any certificate of the issuer's where the kubeconfig names no
authority, and fails where it does.) Knows no file.
"""

import base64
import json
import ssl
import time
from collections.abc import Mapping
from typing import Any, Final

import aiohttp

from quire_contract.nesting import bounded_nesting

_LEEWAY_S: Final = 10.0
_TIMEOUT: Final = aiohttp.ClientTimeout(total=30.0)
Tokens = dict[str, str]


class OidcError(Exception):
    """There is no id token that lasts, and none can be had."""


def expires_at(id_token: str) -> float:
    """Return Unix seconds; 0 for what is no token, or says nothing of that."""
    parts = id_token.split(".")
    if len(parts) != 3:
        return 0.0
    try:
        with bounded_nesting():
            claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        return float(claims["exp"])
    except (ValueError, KeyError, TypeError):
        return 0.0


async def current_tokens(config: Mapping[str, Any]) -> Tokens:
    """Return what of a provider's config is new: nothing while its id token lasts.

    Raises:
        OidcError: see there.
        aiohttp.ClientError: the issuer cannot be asked.
    """
    if expires_at(config.get("id-token") or "") > time.time() + _LEEWAY_S:
        return {}
    for name in ("idp-issuer-url", "client-id", "refresh-token"):
        if not config.get(name):
            raise OidcError(f"the id-token has expired and there is no {name} to get another by: log in again")
    return await _refresh(config)


async def _refresh(config: Mapping[str, Any]) -> Tokens:
    connector = aiohttp.TCPConnector(ssl=_trust(config))
    async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, trust_env=True) as session:
        issuer = config["idp-issuer-url"].rstrip("/")
        async with session.get(f"{issuer}/.well-known/openid-configuration", raise_for_status=True) as response:
            found = await response.json()
        form = {"grant_type": "refresh_token", "refresh_token": config["refresh-token"]}
        who = aiohttp.encode_basic_auth(config["client-id"], config.get("client-secret") or "")
        asking = session.post(found["token_endpoint"], data=form, headers={"Authorization": who})
        async with asking as response:
            answer = await response.json()
            if response.status != 200 or "id_token" not in answer:
                said = answer.get("error_description") or answer.get("error") or f"HTTP {response.status}"
                raise OidcError(f"{issuer} gave no new id-token: {said}: log in again")
    # An issuer that does not rotate refresh tokens says nothing of them.
    return {"id-token": answer["id_token"], "refresh-token": answer.get("refresh_token") or config["refresh-token"]}


def _trust(config: Mapping[str, Any]) -> ssl.SSLContext:
    data = config.get("idp-certificate-authority-data")
    pem = base64.b64decode(data).decode() if data else None
    return ssl.create_default_context(cafile=config.get("idp-certificate-authority"), cadata=pem)

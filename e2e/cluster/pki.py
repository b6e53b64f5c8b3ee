"""Certificates and kubeconfigs of one control plane, made by openssl. A new one for each life of a cluster."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.shell import run

_DAYS = "3650"
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pki:
    """A certificate authority in a directory, and what it signs."""

    directory: Path

    @property
    def ca(self) -> Path:
        return self.directory / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.directory / "ca.key"

    @property
    def service_account_key(self) -> Path:
        return self.directory / "service-account.key"

    @property
    def service_account_public_key(self) -> Path:
        return self.directory / "service-account.pub"

    def certificate(self, name: str) -> Path:
        return self.directory / f"{name}.crt"

    def key(self, name: str) -> Path:
        return self.directory / f"{name}.key"

    def kubeconfig(self, name: str) -> Path:
        return self.directory / f"{name}.kubeconfig"

    def create_authority(self) -> None:
        """Make the authority and the key that signs service account tokens."""
        self.directory.mkdir(parents=True, mode=0o700)
        subject = ("-subj", "/CN=quire-cluster", "-days", _DAYS)
        usage = ("-addext", "keyUsage=critical,digitalSignature,keyCertSign,cRLSign")
        run(["openssl", "req", "-x509", *_NEW_KEY, "-keyout", self.ca_key, "-out", self.ca, *subject, *usage])
        run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", self.service_account_key])
        run(["openssl", "ec", "-in", self.service_account_key, "-pubout", "-out", self.service_account_public_key])

    def issue(self, name: str, *, user: str, groups: Sequence[str] = (), hosts: Sequence[str] = ()) -> None:
        """Sign a certificate for a user and its groups; `hosts` (IP:… or DNS:…) are for one that serves."""
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={user}"
        request = self.directory / f"{name}.csr"
        run(["openssl", "req", *_NEW_KEY, "-keyout", self.key(name), "-out", request, "-subj", subject])
        extensions = self.directory / f"{name}.ext"
        extensions.write_text(
            f"subjectAltName={','.join(hosts) or f'DNS:{name}'}\n"
            "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
            "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n"
        )
        run(
            [
                *("openssl", "x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self.ca_key, "-CAcreateserial"),
                *("-out", self.certificate(name), "-days", _DAYS, "-extfile", extensions),
            ]
        )

    def write_kubeconfig(self, name: str, server: str, path: Path | None = None) -> Path:
        """Write how the holder of a certificate reaches a server, everything within the file; return its path."""
        user = {
            "client-certificate-data": _encode(self.certificate(name).read_bytes()),
            "client-key-data": _encode(self.key(name).read_bytes()),
        }
        return self._write_kubeconfig(path or self.kubeconfig(name), server, user)

    def write_token_kubeconfig(self, name: str, server: str, token: str) -> Path:
        """The same for the holder of a token."""
        return self._write_kubeconfig(self.kubeconfig(name), server, {"token": token})

    def _write_kubeconfig(self, path: Path, server: str, user: Mapping[str, str]) -> Path:
        content = build_kubeconfig(server=server, authority=self.ca.read_bytes(), user=user)
        path.touch(mode=0o600)
        path.write_text(json.dumps(content, indent=2))
        return path


def build_kubeconfig(*, server: str, authority: bytes, user: Mapping[str, str]) -> dict[str, object]:
    """Return a kubeconfig with one cluster, one user and one context, all named "quire"."""
    cluster = {"server": server, "certificate-authority-data": _encode(authority)}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "quire", "cluster": cluster}],
        "users": [{"name": "quire", "user": dict(user)}],
        "contexts": [{"name": "quire", "context": {"cluster": "quire", "user": "quire"}}],
        "current-context": "quire",
    }


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()

"""Private authorities: by the variables that a download's `caBundle` sets, every client trusts them, and no other does.

The judge is TLS itself: a server whose certificate an authority of this test's own has signed.
"""

import datetime
import ipaddress
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from small_gguf import gguf_bytes

from quire_contract.model_facts import SOURCE_UNREACHABLE
from quire_operator.plan.resources.download.options import CA_VARIABLES

NOW = datetime.datetime.now(datetime.UTC)


def sign(name: str, key: Any, issuer: str, issuers_key: Any, extensions: list[tuple[Any, bool]]) -> x509.Certificate:
    def as_name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(as_name(name))
        .issuer_name(as_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=1))
        .not_valid_after(NOW + datetime.timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuers_key.public_key()), critical=False)
    )
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, critical=is_critical)
    return builder.sign(issuers_key, hashes.SHA256())


def key_usage(*, signs: bool) -> x509.KeyUsage:
    others = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    return x509.KeyUsage(digital_signature=True, key_cert_sign=signs, crl_sign=signs, decipher_only=False, **others)


@pytest.fixture
def authority(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """The file of an authority, and how a server shows a certificate of it."""
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    is_ca = [(x509.BasicConstraints(ca=True, path_length=None), True), (key_usage(signs=True), True)]
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    ca = sign("our authority", ca_key, "our authority", ca_key, is_ca)
    certificate = sign("store", key, "our authority", ca_key, [(names, False), (key_usage(signs=False), True)])
    pem, der = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "ca.crt").write_bytes(ca.public_bytes(pem))
    (tmp_path / "tls.crt").write_bytes(certificate.public_bytes(pem))
    (tmp_path / "tls.key").write_bytes(key.private_bytes(pem, der, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    return tmp_path / "ca.crt", context


@pytest.fixture
def trusting(authority: tuple[Path, ssl.SSLContext]) -> dict[str, str]:
    """The variables of a download that has a bundle, and what keeps clients from asking elsewhere for credentials."""
    quiet = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null", "NO_GCE_CHECK": "true"}
    return {**quiet, **dict.fromkeys(CA_VARIABLES, str(authority[0]))}


@pytest.mark.parametrize(
    ("uri", "variable"),
    [
        ("{url}/files/m.gguf", None),
        ("s3://files/m.gguf", "AWS_ENDPOINT_URL"),
        ("gs://files/m.gguf", "STORAGE_EMULATOR_HOST"),
    ],
)
def test_a_file_comes_from_whom_the_bundle_vouches_for(
    authority: Any, trusting: Any, running_store: Any, start_job: Any, uri: str, variable: str | None
) -> None:
    with running_store(authority[1]) as store:
        store.objects["files/m.gguf"] = gguf_bytes()
        endpoint = {} if variable is None else {variable: store.url}
        facts = start_job(uri.format(url=store.url), **trusting, **endpoint).facts()
        assert facts.bytes == len(store.objects["files/m.gguf"])


def test_the_hubs_client_asks_whom_the_bundle_vouches_for(
    authority: Any, trusting: Any, running_store: Any, start_job: Any
) -> None:
    """A client that does not trust goes on trying; this one hears that there is no such model."""
    with running_store(authority[1]) as store:
        failure = start_job("hf://org/model", **trusting, HF_ENDPOINT=store.url).failure()
        assert failure.code != SOURCE_UNREACHABLE

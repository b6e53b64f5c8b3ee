"""`quire download` as a process, over plain HTTP and from buckets, with the real clients of S3 and Google."""

import base64
import hashlib
from pathlib import Path

import pytest
from small_gguf import gguf_bytes

from quire_contract.model_uri import parse_model_uri

BUCKET_ENVIRONMENT = {
    "s3": {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null"},
    "gs": {"NO_GCE_CHECK": "true"},
}

GGUF = gguf_bytes()
SHA256 = base64.b64encode(hashlib.sha256(GGUF).digest()).decode()


@pytest.fixture
def url(store) -> str:
    store.objects["files/m.gguf"] = GGUF
    return f"{store.url}/files/m.gguf"


@pytest.mark.parametrize(
    "headers", [{}, {"Repr-Digest": f"sha-256=:{SHA256}:"}, {"Digest": f"sha-256={SHA256}"}], ids=str
)
def test_one_gguf_file_over_http(store, start_job, volume, url, headers) -> None:
    store.headers = headers
    job = start_job(url)
    facts = job.facts()
    key = parse_model_uri(url).cache_key(None)
    assert facts.path == f"{key}/m.gguf"
    assert (volume / facts.path).read_bytes() == GGUF
    assert facts.revision == store.tag("files/m.gguf")
    assert (facts.shape, facts.bytes) == (None, len(GGUF))
    assert ("sha256 verified" in job.log) == bool(headers)
    assert start_job(url).facts() == facts


def test_a_signature_is_shown_nowhere(store, start_job, url) -> None:
    signed = f"{url}?X-Amz-Signature=5ec2e7"
    job = start_job(signed)
    facts = job.facts()
    assert facts.bytes == len(GGUF)
    assert f"{url} at" in job.log
    shown = [job.log, str(facts)]
    for broken in (signed.replace("m.gguf", "n.gguf"), f"{signed} ", signed.replace("//", "//_")):
        job = start_job(broken)
        assert job.wait() in (1, 2)
        shown += [job.log, str(job.end())]
    assert not [text for text in shown if "5ec2e7" in text]


def test_a_broken_connection_is_continued_by_range(store, start_job, volume, url) -> None:
    store.break_after = 100_000
    facts = start_job(url).facts()
    assert (volume / facts.path).read_bytes() == GGUF
    assert store.ranges == ["bytes=0-0", "bytes=100000-"]


@pytest.mark.parametrize("lacking", ["has_ranges", "has_tags"])
def test_without_ranges_or_tags_a_file_is_fetched_from_the_start(store, start_job, volume, url, lacking) -> None:
    setattr(store, lacking, False)
    store.break_after = 100_000 + len(GGUF) * (lacking == "has_ranges")
    facts = start_job(url).facts()
    assert (volume / facts.path).read_bytes() == GGUF


def test_a_checksum_that_does_not_match(store, start_job, url) -> None:
    store.headers = {"Repr-Digest": f"sha-256=:{SHA256}:"}
    store.wrong = {"files/m.gguf"}
    failure = start_job(url).failure()
    assert failure.code == "ChecksumMismatch"
    assert failure.message.startswith("m.gguf: ")


def test_a_url_that_asks_for_a_token(store, start_job, url) -> None:
    store.secret = "Bearer right"
    failure = start_job(url, HF_TOKEN="right").failure()  # the Hub's token is not for other hosts
    assert failure.code == "ModelGated"
    assert "none was given" in failure.message
    assert "spec.model.tokenSecretRef" in failure.hint
    assert "refused the token" in start_job(url, QUIRE_HTTP_TOKEN="wrong").failure().message
    assert start_job(url, QUIRE_HTTP_TOKEN="right").facts().bytes == len(GGUF)


def test_a_url_without_a_file(start_job, url) -> None:
    failure = start_job(url.replace("m.gguf", "n.gguf")).failure()
    assert failure.code == "ModelNotFound"


@pytest.mark.parametrize("scheme", ["s3", "gs"])
class TestBuckets:
    @pytest.fixture
    def run(self, store, start_job, scheme):
        variable = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}[scheme]
        environment = {variable: store.url, **BUCKET_ENVIRONMENT[scheme]}
        return lambda path, **more: start_job(f"{scheme}://{path}", **environment, **more)

    @pytest.fixture
    def model(self, store, tmp_path, support) -> Path:
        model = support.write_model(tmp_path / "model")
        for file in model.iterdir():
            store.objects[f"bucket/models/tiny/{file.name}"] = file.read_bytes()
        store.objects["bucket/models/tiny-2/config.json"] = b"{}"
        return model

    def test_what_is_below_a_prefix(self, run, model, volume, store, support) -> None:
        job = run("bucket/models/tiny")
        facts = job.facts()
        assert facts.bytes == support.needed_bytes(model)
        assert facts.shape is not None
        for file in (volume / facts.path).glob("*.*"):
            if not file.name.startswith("."):
                assert file.read_bytes() == (model / file.name).read_bytes()
        assert "model-1.safetensors: 293 KiB, md5 verified" in job.log

    def test_one_object(self, run, store, volume) -> None:
        store.objects["bucket/dir/m.gguf"] = GGUF
        facts = run("bucket/dir/m.gguf").facts()
        assert (volume / facts.path).read_bytes() == GGUF
        assert facts.path.endswith("/m.gguf")

    @pytest.mark.parametrize("name", ["/x.json", "sub/../../../other/config.json"])
    def test_a_name_that_leads_out_of_the_model(self, run, store, model, volume, name) -> None:
        store.objects[f"bucket/models/tiny/{name}"] = b"{}"
        failure = run("bucket/models/tiny").failure()
        assert failure.code == "ModelInvalid"
        assert repr(name) in failure.message
        assert not list(volume.rglob("*.json"))

    def test_a_download_that_was_killed_goes_on_by_range(self, run, store, volume, support) -> None:
        store.objects["bucket/dir/m.gguf"] = GGUF
        store.wrong = {"bucket/dir/m.gguf"}
        assert run("bucket/dir/m.gguf").failure().code == "ChecksumMismatch"
        store.wrong = set()
        store.break_after = 150_000
        facts = run("bucket/dir/m.gguf").facts()
        assert (volume / facts.path).read_bytes() == GGUF

    @pytest.mark.parametrize("path", ["bucket/models/none", "nowhere/models"])
    def test_nothing_there(self, run, model, path) -> None:
        assert run(path).failure().code == "ModelNotFound"

    def test_access_denied(self, run, model, store, scheme) -> None:
        store.secret = "something else"
        failure = run("bucket/models/tiny").failure()
        assert failure.code == "ModelGated"
        assert {"s3": "AWS_ACCESS_KEY_ID", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}[scheme] in failure.hint


def test_credentials_of_s3_are_used(store, start_job, tmp_path, support) -> None:
    model = support.write_model(tmp_path / "model")
    for file in model.iterdir():
        store.objects[f"bucket/tiny/{file.name}"] = file.read_bytes()
    store.secret = "Credential=AKIDEXAMPLE/"
    keys = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret"}
    facts = start_job("s3://bucket/tiny", AWS_ENDPOINT_URL=store.url, **BUCKET_ENVIRONMENT["s3"], **keys).facts()
    assert facts.bytes == support.needed_bytes(model)

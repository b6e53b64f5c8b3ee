"""Model URIs: what each scheme takes, what it refuses and how it says so, and the cache directory's name."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_contract.crd import load_schema
from quire_contract.model_uri import ModelUriError, Scheme, parse_model_uri

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "scheme", "authority", "path"),
    [
        ("hf://Qwen/Qwen3-8B", Scheme.HF, "Qwen", "Qwen3-8B"),
        ("hf://gpt2", Scheme.HF, "", "gpt2"),
        ("hf://org/name/m-Q4_K_M.gguf", Scheme.HF, "org", "name/m-Q4_K_M.gguf"),
        ("hf://org/name/Q8/m-00001-of-00002.gguf", Scheme.HF, "org", "name/Q8/m-00001-of-00002.gguf"),
        ("s3://bucket/models/qwen", Scheme.S3, "bucket", "models/qwen"),
        ("s3://bucket", Scheme.S3, "bucket", ""),
        ("gs://my.bucket_1/qwen", Scheme.GS, "my.bucket_1", "qwen"),
        ("http://localhost:9000/m.gguf", Scheme.HTTP, "localhost:9000", "m.gguf"),
        ("http://[::1]:9000/m.gguf", Scheme.HTTP, "[::1]:9000", "m.gguf"),
        ("https://example.com/a/m.gguf?x=1&y=2", Scheme.HTTPS, "example.com", "a/m.gguf?x=1&y=2"),
        ("pvc://claim/a/b", Scheme.PVC, "claim", "a/b"),
        ("pvc://claim.part", Scheme.PVC, "claim.part", ""),
        ("oci://registry.example/acme/qwen3:8b", Scheme.OCI, "registry.example", "acme/qwen3:8b"),
        (f"oci://localhost:5000/qwen3@{DIGEST}", Scheme.OCI, "localhost:5000", f"qwen3@{DIGEST}"),
        ("file:///models/m.gguf", Scheme.FILE, "", "/models/m.gguf"),
        ("file://../m.gguf", Scheme.FILE, "", "../m.gguf"),
        ("file:///", Scheme.FILE, "", "/"),
    ],
)
def test_each_scheme_is_taken_apart_and_put_together(text: str, scheme: Scheme, authority: str, path: str) -> None:
    uri = parse_model_uri(text)
    assert (uri.scheme, uri.authority, uri.path) == (scheme, authority, path)
    assert str(uri) == text
    assert parse_model_uri(str(uri)) == uri


@pytest.mark.parametrize("text", ["hf://Qwen/Qwen3-8B/", "s3://bucket/a/", "pvc://claim/a/", "file:///a/"])
def test_a_slash_at_the_end_makes_no_difference(text: str) -> None:
    assert parse_model_uri(text) == parse_model_uri(text.rstrip("/"))


@pytest.mark.parametrize("text", ["", "Qwen/Qwen3-8B", "/models/m.gguf", "ftp://host/m", "HF://a/b", "hf:/a/b"])
def test_without_a_known_scheme_every_scheme_is_listed(text: str) -> None:
    with pytest.raises(ModelUriError) as caught:
        parse_model_uri(text)
    assert repr(text) in str(caught.value)
    for scheme in Scheme:
        assert f"{scheme}://" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf://", "'' cannot be part of a model's name on the Hub; write hf://organisation/name"),
        ("hf:///name", "'' cannot be part"),
        ("hf://org/name/folder", "a subfolder is not served: name one GGUF file, or bring the folder into a bucket"),
        ("hf://org/name/tree/main/folder", "a page of the Hub: leave out /tree and the revision behind it"),
        ("hf://org/name/blob/main/m.gguf", "a page of the Hub: leave out /blob and the revision behind it"),
        ("hf://org/name/../m.gguf", "'..' cannot be part of a file's name"),
        ("hf://org/name//m.gguf", "'' cannot be part of a file's name"),
        ("hf://org/name@main", "a branch, tag or commit is given by model.revision (--revision), not behind an @"),
        ("hf://org/name:Q4_K_M", "a quantisation is chosen by the name of its file; write hf://organisation/name"),
        ("hf://org/na me", "white space"),
        ("hf://org/..", "'..' cannot be part"),
        ("hf://org/a..b", "'a..b' cannot be part"),
        ("s3://Bucket/x", "'Bucket' is not a bucket; write s3://bucket/prefix"),
        ("s3://ab/x", "'ab' is not a bucket"),
        ("gs://bucket/../x", "must not contain '..'"),
        ("http://host", "the URL of a file is needed, not of a host; write http://host/path"),
        ("https://user:secret@host/m", "credentials do not belong in a URI; name a Secret in model.tokenSecretRef"),
        ("https://ho_st/m", "'ho_st' is not a host"),
        ("pvc://Claim/x", "'Claim' is not the name of a PersistentVolumeClaim"),
        ("pvc:///x", "'' is not the name of a PersistentVolumeClaim"),
        ("pvc://claim/../x", "must stay inside the volume; write pvc://claim/path"),
        ("oci://registry.example", "not an image reference with its registry; write oci://registry/image:tag"),
        ("oci://registry.example/Acme/x", "not an image reference"),
        ("oci://registry.example/acme/x@sha256:12", "not an image reference"),
        ("file://", "no path is given; write file:///absolute/path or file://relative/path"),
    ],
)
def test_what_a_scheme_cannot_have_is_refused_with_its_form(text: str, message: str) -> None:
    with pytest.raises(ModelUriError, match=re.escape(message)):
        parse_model_uri(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://user:secret@host/m",
        "https://user:secret@ho_st/m?x",
        "https://user:x#secret@host/m",
        "https://secret:x/secret@host/m",
        "https:/user:secret@host/m",
        "user:secret@host",
        "https://host?X-Amz-Signature=secret",
        "https://host/../m?X-Amz-Signature=secret",
        "https://host/m m?X-Amz-Signature=secret@a",
        "https://host#sig=secret",
        "ftp://user:secret@host/m?X-Amz-Signature=secret",
        "hf://user:secret@org/m",
        "hf://org/m?token=secret",
        "pvc://user:secret@claim/x",
        "s3://user:secret@bucket/x",
    ],
)
def test_no_error_repeats_a_password_or_a_signature(text: str) -> None:
    with pytest.raises(ModelUriError) as caught:
        parse_model_uri(text)
    assert "secret" not in str(caught.value)
    assert "…" in str(caught.value)


def test_an_error_shows_what_holds_no_secret() -> None:
    for text in ("oci://registry.example/acme/x@sha256:12", "https://ho_st/m", "hf://a/b/c"):
        with pytest.raises(ModelUriError, match=re.escape(text)):
            parse_model_uri(text)


def test_only_what_lies_elsewhere_is_downloaded() -> None:
    texts = ["hf://a/b", "s3://bucket/x", "gs://bucket/x", "http://h/x", "https://h/x"]
    assert all(parse_model_uri(text).is_downloaded for text in texts)
    assert not any(parse_model_uri(text).is_downloaded for text in ["pvc://c/x", "oci://h/x", "file://x"])


def test_the_hub_knows_a_model_by_its_repo_id() -> None:
    assert parse_model_uri("hf://Qwen/Qwen3-8B").repo_id == "Qwen/Qwen3-8B"
    assert parse_model_uri("hf://gpt2").repo_id == "gpt2"
    chosen = parse_model_uri("hf://org/name/Q8/m.gguf")
    assert (chosen.repo_id, chosen.repo_file) == ("org/name", "Q8/m.gguf")
    assert parse_model_uri("hf://org/name").repo_file is None


class TestLocalPath:
    @pytest.mark.parametrize("text", ["file://models/m.gguf", "file://./models/m.gguf", "file://x/../models/m.gguf"])
    def test_a_relative_one_starts_at_the_base(self, tmp_path: Path, text: str) -> None:
        assert parse_model_uri(text).local_path(tmp_path) == tmp_path / "models" / "m.gguf"

    def test_it_may_climb(self, tmp_path: Path) -> None:
        assert parse_model_uri("file://../m").local_path(tmp_path / "a") == tmp_path / "m"
        assert parse_model_uri("file://..").local_path(tmp_path / "a") == tmp_path

    def test_an_absolute_one_does_not_care(self, tmp_path: Path) -> None:
        assert parse_model_uri(f"file://{tmp_path}/m").local_path(Path("/elsewhere")) == tmp_path / "m"

    def test_a_link_keeps_its_own_name(self, tmp_path: Path) -> None:
        (tmp_path / "blob").touch()
        (tmp_path / "m.gguf").symlink_to(tmp_path / "blob")
        assert parse_model_uri("file://m.gguf").local_path(tmp_path).name == "m.gguf"


class TestCacheKey:
    @pytest.mark.parametrize(
        ("text", "revision", "key"),
        [
            ("hf://Qwen/Qwen3-8B", "main", "Qwen3-8B-228afd81"),
            ("hf://gpt2", None, "gpt2-fe0b4241"),
            ("https://h/a/m.gguf?token=1", None, "m.gguf-e6e9baaa"),
            ("s3://bucket", None, "bucket-378b7b93"),
        ],
    )
    def test_it_never_changes(self, text: str, revision: str | None, key: str) -> None:
        """A changed key would make every filled cache empty."""
        assert parse_model_uri(text).cache_key(revision) == key

    @given(st.from_regex(r"(hf|s3|gs|http|https|pvc|oci|file)://[!-~]{1,80}", fullmatch=True), st.text(max_size=40))
    def test_it_is_one_safe_path_component(self, text: str, revision: str) -> None:
        try:
            uri = parse_model_uri(text)
        except ModelUriError:
            return
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", uri.cache_key(revision))

    def test_another_revision_is_another_directory(self) -> None:
        uri = parse_model_uri("hf://a/b")
        assert len({uri.cache_key(None), uri.cache_key("main"), uri.cache_key("v2")}) == 3


def _patterns_of_the_crd() -> list[tuple[str, str]]:
    """(prefix that the rule is about, pattern) of the CRD's rules for URIs, which are CEL of one simple form."""
    schema = load_schema()["properties"]["spec"]["properties"]["model"]["properties"]["uri"]
    found = []
    for rule in schema["x-kubernetes-validations"]:
        prefix = re.search(r"startsWith\('([^']+)'\)", rule["rule"])
        pattern = re.search(r"matches\('([^']+)'\)", rule["rule"])
        assert pattern is not None
        found.append((prefix[1] if prefix else "", pattern[1].replace("\\\\", "\\")))
    return found


@given(st.from_regex(r"(hf|s3|gs|http|https|pvc|oci|file)://[ -~]{0,40}", fullmatch=True))
def test_what_we_take_the_api_server_takes(text: str) -> None:
    try:
        uri = parse_model_uri(text)
    except ModelUriError:
        return
    for prefix, pattern in _patterns_of_the_crd():
        if str(uri).startswith(prefix):
            assert re.search(pattern, str(uri)), (str(uri), pattern)

"""`quire download` as a process, with the real Hub library, against a mirror that is a process too."""

import filecmp
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from small_gguf import LLAMA, write_gguf

from quire_contract.model_facts import decode_facts
from quire_contract.model_uri import parse_model_uri
from quire_contract.paths import COMPLETE_MARKER
from quire_server.download.errors import DownloadError
from quire_server.download.hub import HubSource

URI = "hf://org/tiny"
REPOSITORY = "org/tiny"
KEY = parse_model_uri(URI).cache_key(None)


@pytest.fixture
def model(tmp_path, support):
    return support.write_model(tmp_path / "repository")


def test_a_model_arrives_and_only_what_is_needed_of_it(mirror, start_job, volume, model, support) -> None:
    mirror.serve(REPOSITORY, model)
    facts = start_job(URI).facts()
    assert facts.path == KEY
    assert facts.bytes == support.needed_bytes(model)
    assert facts.shape is not None
    assert (facts.shape.architecture, facts.shape.num_layers) == ("LlamaForCausalLM", 2)
    assert facts.revision is not None
    assert len(facts.revision) == 40
    arrived = sorted(path.name for path in (volume / KEY).iterdir())
    names = ["config.json", "model-0.safetensors", "model-1.safetensors", "model.safetensors.index.json"]
    assert arrived == [COMPLETE_MARKER, *names, "tokenizer.json"]
    assert filecmp.cmpfiles(model, volume / KEY, names, shallow=False)[0] == names
    assert decode_facts((volume / KEY / COMPLETE_MARKER).read_bytes()) == facts
    assert sorted(path.name for path in volume.iterdir()) == [f".{KEY}.lock", KEY]


def test_a_complete_model_needs_no_network(mirror, start_job, model) -> None:
    mirror.serve(REPOSITORY, model)
    facts = start_job(URI).facts()
    mirror.stop()
    assert start_job(URI).facts() == facts


def test_a_damaged_model_is_mended_with_what_is_good_of_it(mirror, start_job, volume, model, support) -> None:
    mirror.serve(REPOSITORY, model)
    facts = start_job(URI).facts()
    served = mirror.bytes_served()
    (volume / KEY / "model-0.safetensors").unlink()
    assert start_job(URI).facts() == facts
    assert mirror.bytes_served() - served == (model / "model-0.safetensors").stat().st_size
    assert (volume / KEY / "model-0.safetensors").read_bytes() == (model / "model-0.safetensors").read_bytes()


def test_facts_are_made_for_a_model_that_was_fetched_without_a_cluster(start_job, volume, support) -> None:
    model = support.write_model(volume / KEY)
    (model / COMPLETE_MARKER).touch()
    facts = start_job(URI).facts()
    assert facts.shape is not None
    assert decode_facts((model / COMPLETE_MARKER).read_bytes()) == facts
    assert start_job(URI).facts() == facts


def test_a_shape_that_another_version_wrote_is_read_anew(mirror, start_job, volume, model) -> None:
    mirror.serve(REPOSITORY, model)
    facts = start_job(URI).facts()
    marker = volume / KEY / COMPLETE_MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_bytes()), "shape": {"family": "llama", "num_layers": 2}}))
    mirror.stop()
    assert start_job(URI).facts() == facts
    assert decode_facts(marker.read_bytes()) == facts


def test_a_model_of_an_unknown_family_is_looked_at_each_time_and_its_marker_left_alone(
    mirror, start_job, volume, model
) -> None:
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyKnowsForCausalLM"]}))
    mirror.serve(REPOSITORY, model)
    facts = start_job(URI).facts()
    assert facts.shape is None
    before = (volume / KEY / COMPLETE_MARKER).stat()
    mirror.stop()
    assert start_job(URI).facts() == facts
    after = (volume / KEY / COMPLETE_MARKER).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_download_goes_on_where_it_was(mirror, start_job, volume, tmp_path, support, how) -> None:
    model = support.write_model(tmp_path / "repository", num_files=2, size=2_000_000)
    total = support.needed_bytes(model)
    mirror.serve(REPOSITORY, model, bytes_per_second=800_000)
    job = start_job(URI)
    progress = support.wait_until(
        lambda: (seen := job.progress()) and seen.done_bytes > total // 3 and seen, "a third of it has arrived"
    )
    job.pause()
    assert progress.total_bytes == total
    assert progress.bytes_per_second is not None
    assert progress.eta_seconds is not None
    job.kill(how)
    if how == signal.SIGTERM:
        assert job.process.returncode == 128 + how
        assert "Stopped by SIGTERM" in job.end().message
    assert not (volume / KEY).exists()
    served = mirror.bytes_served()
    mirror.serve(REPOSITORY, model)
    assert start_job(URI).facts().bytes == total
    assert mirror.bytes_served() - served < total - progress.done_bytes + 200_000
    names = ["model-0.safetensors", "model-1.safetensors"]
    assert filecmp.cmpfiles(model, volume / KEY, names, shallow=False)[0] == names


def test_two_jobs_fetch_one_model_once(mirror, start_job, model, support) -> None:
    mirror.serve(REPOSITORY, model, bytes_per_second=400_000)
    first = start_job(URI)
    support.wait_until(lambda: mirror.bytes_served() > 0, "the first has begun")
    first.pause()
    second = start_job(URI)
    support.wait_until(
        lambda: (seen := second.progress()) and "waiting for another download" in seen.message, "the second waits"
    )
    first.go_on()
    assert first.facts() == second.facts()
    assert mirror.bytes_served() == support.needed_bytes(model)


def test_the_holder_of_the_lock_is_killed(mirror, start_job, model, support) -> None:
    mirror.serve(REPOSITORY, model, bytes_per_second=200_000)
    first = start_job(URI)
    support.wait_until(lambda: mirror.bytes_served() > 0, "the first has begun")
    first.pause()
    second = start_job(URI)
    support.wait_until(lambda: (seen := second.progress()) and seen.message, "the second waits")
    mirror.serve(REPOSITORY, model)
    first.kill()
    assert second.facts().bytes == support.needed_bytes(model)


def test_a_branch_that_moves_between_two_tries(mirror, start_job, volume, tmp_path, support) -> None:
    model = support.write_model(tmp_path / "repository", size=1_000_000)
    mirror.serve(REPOSITORY, model, bytes_per_second=500_000)
    job = start_job(URI)
    support.wait_until(lambda: mirror.bytes_served() > 700_000, "a third of it has arrived")
    job.kill()
    (model / "model-0.safetensors").write_bytes(support.safetensors_bytes(1_000_000, seed=7))
    (model / "tokenizer.json").unlink()
    mirror.serve(REPOSITORY, model)
    start_job(URI).facts()
    names = ["model-0.safetensors", "model-1.safetensors", "config.json"]
    assert filecmp.cmpfiles(model, volume / KEY, names, shallow=False)[0] == names
    assert not (volume / KEY / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("token", "says", "cure"),
    [("", "no token was given", "Set spec.model.tokenSecretRef"), ("hf_other", "is refused", "Accept the licence")],
)
def test_a_gated_model(mirror, start_job, model, token, says, cure) -> None:
    mirror.serve(REPOSITORY, model, gated_token="hf_right")
    failure = start_job(URI, HF_TOKEN=token).failure()
    assert failure.code == "ModelGated"
    assert says in failure.message
    assert cure in failure.hint
    assert start_job(URI, HF_TOKEN="hf_right").facts().path == KEY


@pytest.mark.parametrize(
    ("words", "says"),
    [(["hf://org/none"], "does not exist, or is private"), ([URI, "--revision", "v9"], "no revision 'v9'")],
)
def test_what_does_not_exist(mirror, start_job, model, words, says) -> None:
    mirror.serve(REPOSITORY, model)
    failure = start_job(*words, HF_TOKEN="hf_any").failure()
    assert failure.code == "ModelNotFound"
    assert says in failure.message


def test_a_corrupt_file_is_fetched_twice_and_named(mirror, start_job, volume, model, support) -> None:
    mirror.serve(REPOSITORY, model, corrupt=["model-1.safetensors"])
    failure = start_job(URI).failure()
    assert failure.code == "ChecksumMismatch"
    assert failure.message.startswith("model-1.safetensors: the sha256 checksum")
    assert not (volume / KEY).exists()
    mirror.serve(REPOSITORY, model)
    served = mirror.bytes_served()
    start_job(URI).facts()
    assert mirror.bytes_served() - served <= support.needed_bytes(model) - 300_000  # the good file was kept


def test_a_corrupt_small_file_is_noticed_too(mirror, start_job, model) -> None:
    mirror.serve(REPOSITORY, model, corrupt=["tokenizer.json"])
    assert "tokenizer.json: the git checksum" in start_job(URI).failure().message


def test_broken_connections_are_taken_up_again(mirror, start_job, model) -> None:
    mirror.serve(REPOSITORY, model, drop_after_bytes=200_000)
    job = start_job(URI)
    job.facts()
    assert "retrying" in job.log


def test_a_hub_that_is_down_for_a_while(mirror, start_job, model, support) -> None:
    mirror.serve(REPOSITORY, model, is_unavailable=True)
    job = start_job(URI)
    support.wait_until(
        lambda: (seen := job.progress()) and "retrying" in seen.message and "503" in seen.message,
        "it says why it waits",
    )
    mirror.serve(REPOSITORY, model)
    job.facts()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"model.bin": b"x"}, "holds no safetensors and no GGUF files"),
        ({"a.gguf": b"x", "b.gguf": b"x"}, "several GGUF models (a.gguf, b.gguf)"),
        ({"model.safetensors": b"x"}, "no config.json"),
        ({"config.json": b"{", "model.safetensors": b"x" * 20}, "not valid JSON"),
        ({"config.json": b"{}", "model.safetensors": b"x" * 20}, "not a safetensors file"),
        ({"m.gguf": b"GGUX1234"}, "does not begin with GGUF"),
    ],
)
def test_what_is_no_model(mirror, start_job, tmp_path, files, says) -> None:
    (tmp_path / "bad").mkdir()
    for name, content in files.items():
        (tmp_path / "bad" / name).write_bytes(content)
    mirror.serve(REPOSITORY, tmp_path / "bad")
    failure = start_job(URI).failure()
    assert failure.code == "ModelInvalid"
    assert says in failure.message


def test_one_of_several_gguf_models_is_fetched_by_the_name_in_the_hint(mirror, start_job, tmp_path) -> None:
    (tmp_path / "several").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "several" / name).write_bytes(b"GGUF")
    mirror.serve(REPOSITORY, tmp_path / "several")
    hint = start_job(URI).failure().hint
    assert hint == f"Name one of them in spec.model.uri, such as {URI}/a.gguf."
    job = start_job(f"{URI}/a.gguf")
    assert job.wait() == 1
    assert "a.gguf: 4 B" in job.log  # it has come, and is then found to be none


def test_an_unknown_architecture_is_no_failure(mirror, start_job, model, support) -> None:
    (model / "config.json").write_text(json.dumps({**support.CONFIG, "architectures": ["UnheardOfForCausalLM"]}))
    mirror.serve(REPOSITORY, model)
    facts = start_job(URI).facts()
    assert facts.shape is None
    assert "UnheardOfForCausalLM" in facts.shape_error


@pytest.mark.parametrize(
    ("uri", "exit_code", "says"),
    [
        ("file:///model", 1, "names files of this machine"),
        ("oci://host/image:1", 1, "mounted as an image volume"),
        ("https://host/model.tar", 1, "one .gguf file"),
        ("nonsense", 2, "is not a model URI"),
    ],
)
def test_what_is_not_downloaded(start_job, uri, exit_code, says) -> None:
    job = start_job(uri)
    assert job.wait() == exit_code
    assert says in job.end().message


def test_a_volume_that_cannot_be_written_to(mirror, start_job, volume, model) -> None:
    mirror.serve(REPOSITORY, model)
    volume.write_text("a file where the volume should be")
    assert start_job(URI).failure().code == "DownloadFailed"


def test_torch_is_not_loaded(mirror, volume, model) -> None:
    mirror.serve(REPOSITORY, model)
    script = f"""
import sys
from quire_cli.__main__ import main
assert main(["download", "{URI}", "--directory", "{volume}", "--progress-port", "0"]) == 0
print(sorted({{"torch", "transformers", "quire_kernels", "s3fs", "gcsfs"}} & sys.modules.keys()))
"""
    environment = {**os.environ, "HF_ENDPOINT": mirror.url}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert ended.stdout.endswith("[]\n")


def test_the_mirror_serves_the_hub_library_too(mirror, model, tmp_path) -> None:
    mirror.serve(REPOSITORY, model)
    script = f"""
from pathlib import Path
from quire_server.download.model_source import ModelSource, resolve_model
path = resolve_model(ModelSource(repo_id="{REPOSITORY}", cache_dir=Path("{tmp_path}/hub")), lambda readiness: None)
print(sorted(file.name for file in path.iterdir()))
"""
    environment = {**os.environ, "HF_ENDPOINT": mirror.url, "HF_HOME": str(tmp_path / "home")}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert "model-1.safetensors" in ended.stdout
    assert "pytorch_model.bin" not in ended.stdout


def test_one_gguf_file_of_a_repository_is_the_model(mirror, start_job, volume, model, tmp_path) -> None:
    """Of vLLM's two ways to say it, a file's name: `organisation/name/file.gguf`."""
    for name in ("a-Q4_K_M.gguf", "a-Q8_0.gguf"):
        write_gguf(model / name, {**LLAMA, "general.name": name})
    mirror.serve(REPOSITORY, model)
    uri = f"{URI}/a-Q8_0.gguf"
    facts = start_job(uri).facts()
    assert facts.path == f"{parse_model_uri(uri).cache_key()}/a-Q8_0.gguf"
    assert filecmp.cmp(model / "a-Q8_0.gguf", volume / facts.path, shallow=False)
    assert facts.bytes == (model / "a-Q8_0.gguf").stat().st_size, "and nothing else was fetched"
    script = f"""
from quire_server.download.model_source import parse_model_source, resolve_model
print(resolve_model(parse_model_source("{uri}"), lambda readiness: None))
"""
    environment = {**os.environ, "HF_ENDPOINT": mirror.url, "HF_HOME": str(tmp_path / "home")}
    for offline in ("0", "1"):
        words = [sys.executable, "-c", script]
        environment["HF_HUB_OFFLINE"] = offline
        ended = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
        path = Path(ended.stdout.strip())
        assert filecmp.cmp(model / "a-Q8_0.gguf", path, shallow=False)
        assert sorted(file.name for file in path.parent.iterdir()) == ["a-Q8_0.gguf"]


def test_the_volume_may_lie_below_a_link(mirror, start_job, volume, model, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    volume.symlink_to(tmp_path / "real")
    mirror.serve(REPOSITORY, model)
    assert (volume / start_job(URI).facts().path / "config.json").is_file()


@pytest.mark.parametrize("text", ["<html>", "[" * 100_000 + "]" * 100_000])
def test_an_answer_of_the_hub_that_is_no_json_is_told(monkeypatch, text) -> None:
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: json.loads(text))
    with pytest.raises(DownloadError, match=r"org/tiny: the Hub's answer is not the JSON"):
        HubSource(parse_model_uri("hf://org/tiny"), None, None).list_files()

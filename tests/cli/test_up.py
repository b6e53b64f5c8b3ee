"""`quire up` as a person uses it: real processes, a tiny model, the real `openai` client."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

MANIFEST = """
apiVersion: quire.dev/v1alpha1
kind: LLMDeployment
metadata: {{name: {name}}}
spec:
  model: {{uri: "file://{path}", servedNames: [{served}]}}
  engine: {{maxModelLen: 256, maxNumSeqs: 4, extraArgs: [--kv-cache-memory-bytes, 8M]}}
  resources: {{limits: {{cpu: 1}}}}
  replicas: {replicas}
  scaling: {scaling}
"""


def manifest(path: Path, name: str, *, served: str = "", replicas: int = 1, scaling: str = '{mode: "Off"}') -> str:
    return MANIFEST.format(name=name, path=path, served=served or name, replicas=replicas, scaling=scaling)


def client_of(up: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(up: Any, model: str) -> str:
    with client_of(up) as client:
        return client.completions.create(model=model, prompt="hello", max_tokens=4, temperature=0).choices[0].text


@pytest.fixture(scope="module")
def two_models(start_up: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`pair` with two replicas, and `sleeper`, which starts at zero."""
    file = tmp_path_factory.mktemp("manifests") / "two.yaml"
    sleeper = manifest(tiny_checkpoint, "sleeper", replicas=0, scaling="{min: 0, max: 1, idleToZeroAfter: 1s}")
    file.write_text(manifest(tiny_checkpoint, "pair", replicas=2) + "---" + sleeper)
    with start_up(file) as up:
        yield up


def test_several_documents_and_replicas_come_up_and_answer(two_models: Any) -> None:
    two_models.wait_for(r"pair-1 Ready")
    two_models.wait_for(r"pair-2 Ready")
    assert ask(two_models, "pair")
    with client_of(two_models) as client:
        assert [m.id for m in client.models.list()] == ["pair", "sleeper"]


def test_a_model_at_zero_wakes_for_a_request_and_goes_back_to_sleep(two_models: Any) -> None:
    assert not any("sleeper-1 " in line for line in two_models.lines)
    with client_of(two_models) as client:
        stream = client.completions.create(model="sleeper", prompt="hi", max_tokens=3, temperature=0, stream=True)
        text = "".join(chunk.choices[0].text for chunk in stream)
    assert text
    assert two_models.wait_for(r"sleeper: replicas → 1: (.+)").group(1) == "woken by 1 request"
    two_models.wait_for(r"sleeper: replicas → 0: idle for")
    two_models.wait_for(r"sleeper-1 stopped")


def test_a_replica_that_is_killed_is_started_again(two_models: Any) -> None:
    two_models.wait_for(r"pair-2 Ready")
    seen = len(two_models.lines)
    children = subprocess.run(
        ["pgrep", "-P", str(two_models.process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert two_models.wait_for(r"pair-\d (killed by \w+)", seen).group(1) == "killed by SIGKILL"
    two_models.wait_for(r"pair-3 Ready", seen)
    assert ask(two_models, "pair")


def test_ctrl_c_stops_everything(start_up: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(manifest(tiny_checkpoint, "one"))
    with start_up(file) as up:
        port = int(up.wait_for(r"one-1 starts on port (\d+)").group(1))
        up.wait_for("one-1 Ready")
        assert up.interrupt() == 0
        assert up.lines[-1].endswith("quire: stopped")
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/livez", trust_env=False)


def test_watch_applies_an_edit_and_refuses_a_bad_one(start_up: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "edited.yaml"

    def edit(text: str) -> None:
        """In one piece, as editors do it: half a file would be read, and said to be wrong."""
        draft = file.with_suffix(".draft")
        draft.write_text(text)
        draft.replace(file)

    edit(manifest(tiny_checkpoint, "edited"))
    with start_up(file, "--watch") as up:
        up.wait_for("edited-1 Ready")
        edit(manifest(tiny_checkpoint, "edited", replicas=-1))
        assert "spec.replicas" in up.wait_for(r"watch: not applied: (.+)").group(1)
        edit(manifest(tiny_checkpoint, "edited", served="renamed"))
        up.wait_for("edited-2 Ready")
        up.wait_for("edited-1 stopped")
        assert ask(up, "renamed")
        with pytest.raises(openai.NotFoundError):
            ask(up, "edited")
        edit(manifest(tiny_checkpoint, "edited", served="renamed").replace("cpu: 1", "cpu: 2"))
        up.wait_for("edited-3 starts")


def test_ctrl_c_does_not_wait_for_a_download(start_up: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "remote.yaml"
    file.write_text(manifest(Path("/m"), "remote").replace("file:///m", "hf://org/name"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        with start_up(file) as up:
            up.wait_for("remote: fetching hf://org/name")
            connection, _ = silent.accept()  # the question is asked, and never answered
            with connection:
                assert up.interrupt() == 0
            assert up.lines[-1].endswith("quire: stopped")


def test_a_model_that_cannot_be_found_is_named_to_the_person_and_to_the_client(start_up: Any, tmp_path: Path) -> None:
    file = tmp_path / "missing.yaml"
    scaling = "{min: 1, max: 1, coldStartTimeout: 1s}"
    file.write_text(manifest(tmp_path / "nothing.gguf", "missing", scaling=scaling))
    with start_up(file) as up:
        up.wait_for(r"missing: .*nothing\.gguf.*trying again in \d+ s")
        with pytest.raises(openai.InternalServerError) as caught:
            ask(up, "missing")
        assert caught.value.status_code == 503
        assert caught.value.body["reason"] == "model_loading"
        assert "nothing.gguf" in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spec: [", "bad.yaml:2: did not find expected node content"),
        ("# nothing", "holds no LLMDeployment"),
        (
            "apiVersion: quire.dev/v1alpha1\nkind: LLMDeployment\nmetadata: tiny\nspec: {}",
            "metadata: must be a mapping",
        ),
        (manifest(Path("/m"), "a") + "---" + manifest(Path("/m"), "a"), "default/a is defined twice"),
        (
            manifest(Path("/m"), "a", scaling="{min: 5, max: 4}"),
            "spec.scaling.min: must be ≤ spec.scaling.max (5 > 4)",
        ),
    ],
)
def test_a_bad_manifest_is_refused_with_the_field(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    command = [sys.executable, "-m", "quire_cli", "up", "-f", str(file), "--cache-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert message in ended.stderr

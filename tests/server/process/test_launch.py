import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quire_server.engine.border.launch import EngineLaunch, EngineProcess, decode_launch, encode_launch
from quire_server.shared.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from quire_server.shared.errors import ConfigError

PARENT = """
import sys, time
from pathlib import Path
from quire_server.shared.config import EngineConfig, ModelConfig
from quire_server.engine.border.launch import EngineProcess
process = EngineProcess(tuple(sys.argv[2:]))
print(process.to_engine, flush=True)
if sys.argv[1] == "configured":
    model = ModelConfig(model="m", path=Path("m"), served_model_names=("m",))
    process.configure(EngineConfig(model=model))
print(process.pid, flush=True)
time.sleep(60)
"""


def test_a_configuration_arrives_as_it_was() -> None:
    config = EngineConfig(
        model=ModelConfig(
            model="org/name", path=Path("/a b/c"), served_model_names=("x", "y"), tokenizer=Path("t"), max_model_len=9
        ),
        cache=CacheConfig(block_size=32, kv_cache_memory_bytes=1 << 40),
        scheduler=SchedulerConfig(policy="priority"),
        device="cpu",
        num_threads=3,
        log_format="json",
    )
    launch = EngineLaunch(config=config, to_engine="ipc://a", from_engine="ipc://b")
    line = encode_launch(launch)
    assert line.count(b"\n") == 1
    assert decode_launch(line) == launch


@pytest.mark.parametrize("state", ["configured", "waiting"])
def test_the_engine_does_not_outlive_a_killed_parent(engine_command: Any, state: str) -> None:
    command = [sys.executable, "-c", PARENT, state, *engine_command("never-ready")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        socket = Path(parent.stdout.readline().strip().removeprefix("ipc://"))
        engine = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            ended, _, _ = select.select([engine], [], [], 20)
            assert ended
            assert state == "waiting" or not socket.parent.exists()
        finally:
            os.close(engine)
            shutil.rmtree(socket.parent, ignore_errors=True)


def test_a_process_that_died_before_its_configuration_is_no_error(engine_config: EngineConfig) -> None:
    process = EngineProcess((sys.executable, "-c", ""))
    assert process.wait(20)
    process.configure(engine_config)
    process.configure(engine_config)
    assert process.exit_code == 0
    process.close()


def test_sockets_have_short_paths_in_a_private_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine_command: Any
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    process = EngineProcess(engine_command("never-ready"))
    try:
        directory = Path(process.to_engine.removeprefix("ipc://")).parent
        assert len(str(directory)) < 100
        assert directory.stat().st_mode & 0o777 == 0o700
    finally:
        process.close()
    assert not directory.exists()


def test_no_place_for_sockets_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> str:
        raise PermissionError("read-only")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ConfigError) as caught:
        EngineProcess()
    assert "TMPDIR" in caught.value.termination.hint

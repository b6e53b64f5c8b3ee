import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quire_server.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from quire_server.engine.launch import EngineLaunch, EngineProcess, decode_launch, encode_launch

PARENT = """
import sys, time
from pathlib import Path
from quire_server.config import EngineConfig, ModelConfig
from quire_server.engine.launch import EngineProcess
process = EngineProcess(tuple(sys.argv[2:]))
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
        engine = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            ended, _, _ = select.select([engine], [], [], 20)
            assert ended
        finally:
            os.close(engine)


def test_a_process_that_died_before_its_configuration_is_no_error(engine_config: EngineConfig) -> None:
    process = EngineProcess((sys.executable, "-c", ""))
    assert process.wait(20)
    process.configure(engine_config)
    process.configure(engine_config)
    assert process.exit_code == 0
    process.close()

"""What is taken out of the images' virtual environments, and what has to stay in."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_sources_that_triton_compiles_at_run_time_stay(tmp_path: Path) -> None:
    read = [
        "triton/backends/nvidia/driver.c",
        "triton/backends/amd/driver.c",
        "yaml/loader.py",
        "kubernetes/aio/client/models/__init__.py",
    ]
    unread = [
        "yaml/_yaml.c",
        "yaml/_yaml.pxd",
        "torch/include/c.h",
        "numpy/core/tests/a.py",
        "kubernetes/aio/client/models/v1_pod.py",
    ]
    for name in (*read, *unread):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1234")
    venv = runpy.run_path(str(ROOT / "deploy" / "image" / "venv.py"))
    assert venv["remove_unread"](tmp_path) == 4 * len(unread)
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(read)

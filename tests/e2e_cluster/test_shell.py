"""A long command tells how far it is, and its failure shows the end of its log."""

import sys
from pathlib import Path

import pytest
from cluster import shell
from cluster.shell import ClusterError, run_logged

TELLS_AND_WAITS = "print('compiling k8s.io/api', flush=True); import time; time.sleep({})"


def test_progress_is_told_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shell, "_TELL_EVERY_S", 0.2)
    run_logged([sys.executable, "-c", TELLS_AND_WAITS.format(1)], tmp_path / "build.log")
    assert "compiling k8s.io/api" in capsys.readouterr().out


def test_a_failure_shows_the_end_of_the_log(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"status 3[\s\S]*no space left"):
        run_logged([sys.executable, "-c", "print('no space left'); raise SystemExit(3)"], tmp_path / "build.log")


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "_TELL_EVERY_S", 0.1)
    with pytest.raises(ClusterError, match=r"did not end within 1 s[\s\S]*compiling"):
        run_logged([sys.executable, "-c", TELLS_AND_WAITS.format(60)], tmp_path / "build.log", timeout_s=1)


def test_a_program_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="no-such-program is not installed"):
        run_logged(["no-such-program"], tmp_path / "build.log")

import json
import urllib.error
import urllib.request

import pytest

from quire_contract.model_facts import DownloadProgress
from quire_server.download.progress import Meter, describe, progress_server


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_rate_is_of_the_last_seconds_and_of_what_was_received() -> None:
    clock = Clock()
    meter = Meter(clock)
    assert meter.progress == DownloadProgress(done_bytes=0)
    meter.start(10_000, 4_000)
    assert meter.progress == DownloadProgress(done_bytes=4_000, total_bytes=10_000)
    for _ in range(20):
        clock.now += 0.5
        meter.receive(100)
    assert meter.progress.done_bytes == 6_000
    assert meter.progress.bytes_per_second == pytest.approx(200, rel=0.15)
    assert meter.progress.eta_seconds == pytest.approx(20, rel=0.15)
    clock.now += 5
    assert meter.progress.bytes_per_second == pytest.approx(0, abs=25)
    clock.now += 60
    assert meter.progress.bytes_per_second == 0
    assert meter.progress.eta_seconds is None
    meter.discard(1_000)
    assert meter.progress.done_bytes == 5_000


def test_many_small_pieces_do_not_pile_up() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.start(10**9, 0)
    for _ in range(10_000):
        clock.now += 0.001
        meter.receive(1000)
    assert meter.progress.bytes_per_second == pytest.approx(10**6, rel=0.05)
    assert len(meter._samples) < 100


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (DownloadProgress(done_bytes=0), "starting"),
        (DownloadProgress(done_bytes=0, message="listing hf://a/b"), "listing hf://a/b"),
        (DownloadProgress(done_bytes=0, total_bytes=0), "0 B of 0 B"),
        (
            DownloadProgress(done_bytes=512, total_bytes=1024, bytes_per_second=64.0, eta_seconds=8.0, message="m"),
            "512 B of 1.0 KiB (50 %), 64 B/s, 8 s left; m",
        ),
    ],
)
def test_one_line_for_the_log(progress: DownloadProgress, line: str) -> None:
    assert describe(progress) == line


def test_progress_over_http() -> None:
    meter = Meter(Clock())
    meter.start(100, 40)
    meter.say("verifying")
    with progress_server(0, meter) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=10) as answer:
            assert json.load(answer) == {"doneBytes": 40, "totalBytes": 100, "message": "verifying"}
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=10) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)
        assert refused.value.code == 404
        refused.value.close()
        with pytest.raises(OSError), progress_server(port, meter):
            pass

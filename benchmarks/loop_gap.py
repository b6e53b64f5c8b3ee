"""The worst gap of the API process's event loop while one request keeps it busy, for each kind of long input.

Another process asks for /health every millisecond, over one connection: the longest that it waits for an answer is the
gap that every other client would see. Ours and another checkout (`--checkout`) take turns where one is given.
"""

import argparse
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Row, add_output_argument, finish, row
from server import RunningServer, serving, wait_ready

MB = 1_000_000
PING_EVERY_S = 0.001
GIVEN_UP_S = 30.0
"""A freeze this long is written down as if it ended there."""
PACKAGES = ("operator", "gateway", "server", "kernels", "contract", "cli")
WORDS = "The quick brown fox jumps over 13 lazy dogs, and then some more. "


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request that may hold the loop up."""

    what: str
    path: str
    build: Callable[[], bytes]


def text(num_bytes: int) -> str:
    return (WORDS * (num_bytes // len(WORDS) + 1))[:num_bytes]


def body(**fields: Any) -> Callable[[], bytes]:
    return lambda: json.dumps({"max_tokens": 1, **fields}).encode()


def chat(content: str, count: int, **fields: Any) -> Callable[[], bytes]:
    return body(messages=[{"role": "user", "content": content}] * count, **fields)


def raw(item: bytes, count: int) -> Callable[[], bytes]:
    return lambda: b'{"prompt": "a", "max_tokens": 1, "metadata": [' + b",".join([item] * count) + b"]}"


def build_cases() -> list[Case]:
    completions, conversation = "/v1/completions", "/v1/chat/completions"
    return [
        Case(what="idle", path="/version", build=lambda: b""),
        Case(what="prompt of 1 MB", path=completions, build=body(prompt=text(MB))),
        Case(what="prompt of 1 MB, cut", path=completions, build=body(prompt=text(MB), truncate_prompt_tokens=16)),
        Case(what="prompt of 3 MB, cut", path=completions, build=body(prompt=text(3 * MB), truncate_prompt_tokens=16)),
        Case(what="chat of 1 MB, cut", path=conversation, build=chat(text(MB), 1, truncate_prompt_tokens=16)),
        Case(what="chat of 40,000 messages", path=conversation, build=chat("a", 40_000)),
        Case(what="2,000 short prompts", path=completions, build=body(prompt=["a b c d"] * 2000)),
        Case(what="100,000 stop strings", path=completions, build=body(prompt="a", stop=["abcd"] * 100_000)),
        Case(what="1,000 stop strings", path=completions, build=body(prompt="a", stop=["zyx"] * 1000, max_tokens=8)),
        Case(
            what="logit_bias of 45,000 tokens",
            path=completions,
            build=body(prompt="a", logit_bias={str(token_id): 1.5 for token_id in range(45_000)}),
        ),
        Case(what="tokenize 1 MB", path="/tokenize", build=tokenize(text(MB))),
        Case(what="detokenize 300,000 ids", path="/detokenize", build=lambda: detokenize(300_000)),
        Case(what="JSON: text of 15 MB", path=completions, build=body(prompt=text(15 * MB))),
        Case(what="JSON: 400,000 ids", path=completions, build=body(prompt=[7] * 400_000)),
        Case(what="JSON: 500,000 lists", path=completions, build=raw(b"[1]", 500_000)),
        Case(what="JSON: 20,000 hard numbers", path=completions, build=raw(b"1e300", 20_000)),
        Case(
            what="log-probabilities of 2,000 prompt tokens",
            path=completions,
            build=body(prompt=[7] * 2000, echo=True, logprobs=20),
        ),
        Case(what="prompt of 40 MB of one letter", path=completions, build=body(prompt="a" * 40 * MB)),
    ]


def tokenize(prompt: str) -> Callable[[], bytes]:
    return lambda: json.dumps({"prompt": prompt, "return_token_strs": True}).encode()


def detokenize(count: int) -> bytes:
    return json.dumps({"tokens": [index % 20_000 for index in range(count)]}).encode()


def ask(server: RunningServer, case: Case, content: bytes) -> None:
    """Send the request and read its answer, whatever it is; a server that takes too long is given up."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=GIVEN_UP_S)
    headers = {"Content-Type": "application/json"}
    try:
        connection.request("POST" if content else "GET", case.path, content or None, headers)
        connection.getresponse().read()
    except OSError:
        return  # refused in mid-body, or given up: the gap is what counts
    finally:
        connection.close()


def worst_gap(server: RunningServer, case: Case) -> float:
    """Return the longest that /health took to answer while the case's request ran. Seconds."""
    work = threading.Thread(target=ask, args=(server, case, case.build()))
    request = f"GET /health HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode()
    worst, ends = 0.0, None
    with socket.create_connection((server.host, server.port), timeout=GIVEN_UP_S) as connection:
        work.start()
        while ends is None or time.perf_counter() < ends:
            started = time.perf_counter()
            connection.sendall(request)
            try:
                connection.recv(4096)
            except TimeoutError:
                return GIVEN_UP_S
            worst = max(worst, time.perf_counter() - started)
            if ends is None and not work.is_alive():
                ends = time.perf_counter() + 0.2  # what the request left behind is freed a little later
            time.sleep(PING_EVERY_S)
    work.join()
    return worst


@contextmanager
def packages_of(checkout: Path | None) -> Iterator[None]:
    """Let processes that are started import a checkout's packages rather than the installed ones."""
    before = os.environ.get("PYTHONPATH")
    if checkout is not None:
        os.environ["PYTHONPATH"] = os.pathsep.join(str(checkout / name) for name in PACKAGES)
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH", None)
        if before is not None:
            os.environ["PYTHONPATH"] = before


def measure(provider: str, checkout: Path | None, model: str, repeats: int) -> list[Row]:
    """Measure every case on a server of its own checkout; the last case may leave it frozen, and is asked once."""
    rows: list[Row] = []
    with packages_of(checkout), serving([model, "--served-model-name", "model"]) as server:
        wait_ready(server)
        cases = build_cases()
        for case in cases:
            wait_ready(server, timeout_s=1800.0)  # again: a freeze that was given up is not the next case's
            times = 1 if case is cases[-1] else repeats
            gaps = [1e3 * worst_gap(server, case) for _ in range(times)]
            rows.append(row(case.what, provider, "ms", gaps, model=Path(model).name))
            print(f"{provider:9s} {case.what:42s} {rows[-1].p50:9.1f} ms", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkout", type=Path, help="another checkout, measured before ours")
    parser.add_argument("--repeats", type=int, default=3)
    add_output_argument(parser)
    arguments = parser.parse_args()
    rows: list[Row] = []
    if arguments.checkout is not None:
        rows += measure("reference", arguments.checkout, arguments.model, arguments.repeats)
    rows += measure("ours", None, arguments.model, arguments.repeats)
    finish("loop_gap", rows, save=arguments.save)


if __name__ == "__main__":
    main()

"""Process start → port open, ready, first answer: ours against a bare `import torch`, alternating in one run."""

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.request

from common import Row, add_output_argument, finish, row
from server import RunningServer, serving, wait_ready


def import_torch_seconds() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started


def port_open_seconds(server: RunningServer) -> float:
    while True:
        try:
            socket.create_connection((server.host, server.port), timeout=1.0).close()
            return time.perf_counter() - server.started
        except OSError:
            time.sleep(0.005)


def first_answer(server: RunningServer) -> float:
    body = json.dumps({"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4, "temperature": 0})
    request = urllib.request.Request(
        f"http://{server.host}:{server.port}/v1/chat/completions",
        data=body.encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        json.load(response)
    return time.perf_counter() - server.started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    add_output_argument(parser)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"import torch": [], "port open": [], "ready": [], "first answer": []}
    for _ in range(arguments.repeats):
        seconds["import torch"].append(import_torch_seconds())
        with serving([arguments.model]) as server:
            seconds["port open"].append(port_open_seconds(server))
            seconds["ready"].append(wait_ready(server))
            seconds["first answer"].append(first_answer(server))
    rows: list[Row] = []
    for what, values in seconds.items():
        provider = "reference" if what == "import torch" else "ours"
        rows.append(row(what, provider, "s", values, model=str(arguments.model).rsplit("/", 1)[-1]))
        print(f"{what:14s} {rows[-1].p50:6.2f} s   (p20 {rows[-1].p20:.2f}, p80 {rows[-1].p80:.2f})")
    print(f"first answer = {rows[3].p50 / rows[0].p50:.2f} × import torch")
    finish("startup", rows, save=arguments.save)


if __name__ == "__main__":
    main()

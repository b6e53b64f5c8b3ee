"""Runs inside a pod: asks without a pause until SIGUSR1 or the end of standard input. Arguments: URL, model, askers.

Every request has a connection of its own and is sent once: any answer but a whole one is a failure. Begins when one has
been answered, for kube-proxy may hear of the first endpoint a second after it is ready. Prints one JSON object: how
many were answered, and the failures.
"""

import json
import signal
import sys
import threading
import time
import urllib.error
import urllib.request

url, model, num_askers = sys.argv[1], sys.argv[2], int(sys.argv[3])
stop = threading.Event()
lock = threading.Lock()
answered = 0
failures: list[str] = []


def ask() -> None:
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 8, "ignore_eos": True, "stream": True}).encode()
    request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = [line.strip() for line in response if line.startswith(b"data: ")]
    if not lines or lines[-1] != b"data: [DONE]" or any(b'"error"' in line for line in lines):
        raise ValueError(f"incomplete: {lines[-2:]!r}")


def keep_asking() -> None:
    global answered
    while not stop.is_set():
        try:
            ask()
            with lock:
                answered += 1
        except Exception as error:  # noqa: BLE001 - every failure is counted, whatever it is
            detail = error.read()[:300] if isinstance(error, urllib.error.HTTPError) else b""
            with lock:
                failures.append(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error} {detail!r}")
            time.sleep(0.05)


def wait_reachable(until: float) -> None:
    while True:
        try:
            ask()
            return
        except urllib.error.URLError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def stop_at_end_of_input() -> None:
    sys.stdin.read()
    stop.set()


wait_reachable(until=time.monotonic() + 15)
askers = [threading.Thread(target=keep_asking) for _ in range(num_askers)]
for asker in askers:
    asker.start()
print("asking", flush=True)
signal.signal(signal.SIGUSR1, lambda *_: stop.set())
threading.Thread(target=stop_at_end_of_input, daemon=True).start()
stop.wait()
for asker in askers:
    asker.join()
print(json.dumps({"answered": answered, "num_failed": len(failures), "failures": failures[:20]}))

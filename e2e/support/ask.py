"""Runs inside a pod: one streamed chat completion. Arguments: URL, model, question. Prints one JSON object.

A connection that is not had is tried again for a while: kube-proxy tells a node of an endpoint that comes or goes up to
a second after the API knows it (until then it is refused, or leads to a pod that is gone), cluster DNS remembers a
Service's old address for some, and no operator can know when they have.
"""

import errno
import http.client
import json
import sys
import time
import urllib.error
import urllib.request

url, model, question = sys.argv[1:4]
body = {
    "model": model,
    "messages": [{"role": "user", "content": question}],
    "stream": True,
    "max_tokens": 24,
    "temperature": 0,
}
request = urllib.request.Request(
    f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
)


def connect(until: float) -> http.client.HTTPResponse:
    while True:
        try:
            answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=120)
            return answer
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError):
                sys.exit(f"HTTP {error.code}: {error.read(2000)!r}")
            number = getattr(error.reason, "errno", None)
            if number not in (errno.ECONNREFUSED, errno.EHOSTUNREACH) or time.monotonic() > until:
                raise
            time.sleep(0.1)


start = time.monotonic()
first_s = None
text = ""
num_chunks = 0
with connect(until=start + 15) as response:
    for line in response:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        delta = json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        num_chunks += bool(delta)
        text += delta
        first_s = first_s if first_s is not None or not delta else time.monotonic() - start
print(json.dumps({"text": text, "chunks": num_chunks, "first_s": first_s, "total_s": time.monotonic() - start}))

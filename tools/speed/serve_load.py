"""How does the server fare under load? Measures the bounds that `tritgguf serve` has to keep.

    python -m tools.speed.serve_load build/qwen-d2.gguf --only throughput,first-token,prefix
    python -m tools.speed.serve_load build/smollm2-d2.gguf --only soak --seconds 300

* throughput: tokens per second in total of 4 and 8 clients over those of one, each of whom streams one answer.
* first-token: forward passes until a short request's first token while a prompt of 2,000 tokens is being read.
* prefix: how much sooner the first token comes for a second prompt with the same 1,000 tokens at its beginning.
* soak: 64 clients, prompts and answers of mixed lengths, a third of the clients leave midway; errors, memory, pages.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from tools import tool_command
from tritgguf.cli import terminal

_CONTEXT = 4096
_WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"),
    *("state", "family", "student", "group", "country", "hand", "part", "place", "case", "week", "company"),
)
_UNAVAILABLE = 503


@contextmanager
def running_server(file: Path, *options: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Start a server; yield its URL, its process id, and what it says at its end, which is empty before."""
    command = [sys.executable, "-m", "tools.speed.checked_server", str(file), "--context", str(_CONTEXT), *options]
    end: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process.pid, end
        finally:
            process.send_signal(signal.SIGTERM)
            end.update(json.loads(process.stdout.readline() or '{"leaked": true, "reason": "the server has died"}'))


def words(generator: random.Random, count: int) -> str:
    """Return a text of so many words, about as many tokens."""
    return " ".join(generator.choice(_WORDS) for _ in range(count))


async def stream(client: httpx.AsyncClient, prompt: str, tokens: int) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of an answer that has exactly so many tokens."""
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


async def first_token(client: httpx.AsyncClient, prompt: str) -> tuple[float, int]:
    """Return the seconds until the first token, and how many of the prompt's were cached."""
    start, seconds, cached = time.perf_counter(), 0.0, 0
    async for chunk in stream(client, prompt, 2):
        seconds = seconds or time.perf_counter() - start
        if usage := chunk.get("usage"):
            cached = usage["prompt_tokens_details"]["cached_tokens"]
    return seconds, cached


async def passes(client: httpx.AsyncClient) -> int:
    """Return how many forward passes there were."""
    lines = (await client.get("/metrics")).text.splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("llamacpp:n_decode_total"))))


async def throughput(client: httpx.AsyncClient, clients: int, tokens: int) -> float:
    """Return the tokens per second of all clients together while all of them generate."""
    arrivals: list[list[float]] = [[] for _ in range(clients)]

    async def one(number: int) -> None:
        async for _ in stream(client, words(random.Random(number), 24), tokens):
            arrivals[number].append(time.perf_counter())

    await asyncio.gather(*map(one, range(clients)))
    start, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    count = sum(start < moment <= end for times in arrivals for moment in times)
    return count / (end - start)


async def measure_throughput(client: httpx.AsyncClient, tokens: int, turns: int) -> dict[str, Any]:
    """Measure 1, 4 and 8 clients in turns, so that a machine whose speed drifts treats them alike."""
    found: dict[int, list[float]] = {1: [], 4: [], 8: []}
    for _ in range(turns):
        for clients, rates in found.items():
            rates.append(await throughput(client, clients, tokens))
    best = {clients: sorted(rates)[len(rates) // 2] for clients, rates in found.items()}
    return {"tokens_per_second": best, "4_over_1": best[4] / best[1], "8_over_1": best[8] / best[1]}


async def measure_first_token(client: httpx.AsyncClient) -> dict[str, Any]:
    """Measure a short request while a long prompt is being read."""
    generator = random.Random(time.time_ns())
    start = await passes(client)
    long = asyncio.create_task(first_token(client, words(generator, 2000)))
    while await passes(client) == start:
        await asyncio.sleep(0.01)
    before = await passes(client)
    seconds = await first_chunk(client, words(generator, 12))
    count = (await passes(client)) - before
    was_reading = not long.done()
    long_seconds, _ = await long
    return {"passes": count, "seconds": seconds, "long_prompt_seconds": long_seconds, "was_reading": was_reading}


async def first_chunk(client: httpx.AsyncClient, prompt: str) -> float:
    """Return the seconds until the first token of an answer that nobody waits for any longer."""
    start = time.perf_counter()
    chunks = stream(client, prompt, 50)
    await anext(chunks)
    seconds = time.perf_counter() - start
    await chunks.aclose()  # type: ignore[attr-defined]  # a generator
    return seconds


async def measure_prefix(client: httpx.AsyncClient) -> dict[str, Any]:
    """Measure two prompts that begin alike."""
    generator = random.Random(time.time_ns())
    prefix = words(generator, 1000)
    first, _ = await first_token(client, f"{prefix} {words(generator, 10)}")
    second, cached = await first_token(client, f"{prefix} {words(generator, 10)}")
    return {"cached_tokens": cached, "seconds": [first, second], "sooner": first / second}


@dataclass
class Soak:
    """What 64 clients have met."""

    answers: int = 0
    left: int = 0
    unavailable: int = 0
    errors: list[str] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)


async def soak(client: httpx.AsyncClient, process: int, seconds: float, clients: int) -> dict[str, Any]:
    """Keep clients asking; note the server's memory every few seconds."""
    found, end = Soak(), time.perf_counter() + seconds

    async def one(number: int) -> None:
        generator = random.Random(number)
        while time.perf_counter() < end:
            await _ask(client, generator, found, leaves=number % 3 == 0)

    async def watch() -> None:
        while time.perf_counter() < end:
            status = Path(f"/proc/{process}/status").read_text("ascii")
            found.memory_mb.append(int(status.partition("VmRSS:")[2].split()[0]) / 1000)
            await asyncio.sleep(min(5.0, seconds / 20))

    await asyncio.gather(watch(), *map(one, range(clients)))
    return {**vars(found), "errors": found.errors[:10], "error_count": len(found.errors)}


async def _ask(client: httpx.AsyncClient, generator: random.Random, found: Soak, *, leaves: bool) -> None:
    prompt = words(generator, int(generator.choice([5, 30, 30, 100, 400])))
    patience = generator.randrange(12) if leaves else 1 << 30
    chunks = stream(client, prompt, generator.randrange(1, 60))
    try:
        async for chunk in chunks:
            if "error" in chunk:
                found.errors.append(str(chunk))
            patience -= 1
            if patience < 0:
                found.left += 1
                return
        found.answers += 1
    except httpx.HTTPStatusError as error:
        if error.response.status_code != _UNAVAILABLE:
            found.errors.append(f"status {error.response.status_code}")
        found.unavailable += 1
        await asyncio.sleep(generator.random() * 2)
    except httpx.HTTPError as error:
        found.errors.append(repr(error))
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]  # a generator


async def _measure(url: str, process: int, only: set[str], tokens: int, turns: int, seconds: float) -> dict[str, Any]:
    results: dict[str, Any] = {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await first_token(client, "warm")
        if "throughput" in only:
            results["throughput"] = await measure_throughput(client, tokens, turns)
        if "first-token" in only:
            results["first-token"] = [await measure_first_token(client) for _ in range(turns)]
        if "prefix" in only:
            results["prefix"] = await measure_prefix(client)
        if "soak" in only:
            results["soak"] = await soak(client, process, seconds, 64)
    return results


def main(
    file: Annotated[Path, typer.Argument(help="A trit file.")],
    only: Annotated[str, typer.Option(help="What to measure.")] = "throughput,first-token,prefix",
    tokens: Annotated[int, typer.Option(help="Tokens of each answer in throughput.", min=8)] = 32,
    turns: Annotated[int, typer.Option(help="How often throughput and first-token are measured.", min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="How long soak lasts.")] = 300.0,
    parallel: Annotated[int, typer.Option(help="Answers that the server generates at once.", min=1)] = 8,
    queue: Annotated[int, typer.Option(help="Requests that may wait.", min=0)] = 64,
    decode_bits: Annotated[int, typer.Option(help="Bits of generated tokens' activations, 8 or 16.")] = 16,
) -> None:
    """Measure a server under load; print one JSON object."""
    options = ("--parallel", str(parallel), "--queue", str(queue), "--decode-bits", str(decode_bits))
    with running_server(file, *options) as (url, process, end):
        results = asyncio.run(_measure(url, process, set(only.split(",")), tokens, turns, seconds))
    terminal.print_json({**results, "pages": end})


if __name__ == "__main__":
    tool_command.run(main)

"""What our sampler costs the engine: tokens per second with the plugin against the same vLLM sampling natively.

One server, one process, three arms in turn, so that the machine's load strikes all alike:

    native   request temperature 0.7 and `seed`, sampled by vLLM
    plugin   the same request through our logits processor (normative sampler, input check)
    client   as `plugin`, read through EngineClient, which checks every token: what a node adds on its side

All ask for the same log-probabilities, ignore end tokens and stream. Rates are medians over rounds; a ratio is the median
of the rounds' own ratios. Also: the sampler's CPU time per token, apart from any engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from benchmarks.rows import Row
from poip_chain.service.engine.client import TOP_LOGPROBS, EngineClient
from poip_chain.service.engine.server import EngineOptions, EngineServer
from poip_chain.spec import sampler
from poip_chain.spec.transcript import prompt_root

Progress = Callable[[str], None]

ROUNDS = 7
TEMPERATURE_MILLI = 700
PROMPT = [1, *range(4000, 4035)]
"""36 arbitrary ids of any vocabulary: what they mean does not matter to the speed."""
ARMS = {
    "native": "vLLM, native seeded sampling",
    "plugin": "vLLM with our sampler",
    "client": "vLLM with our sampler, read and checked by EngineClient",
}
TOKENS = {1: 48, 32: 32}
"""Tokens per answer at each batch size: a round of one arm takes a few seconds."""


def run(model_dir: Path, progress: Progress | None = None, rounds: int = ROUNDS) -> list[Row]:
    """All rows of this benchmark. Starts and stops its own engine; takes about five minutes on two cores."""
    say = progress or (lambda _: None)
    rows = sampler_rows()
    options = EngineOptions(model=model_dir, log_file=model_dir.parent / "benchmark-engine.log", dies_with_parent=True)
    with EngineServer(options) as server:
        for batch in TOKENS:
            rows += asyncio.run(_compare(server.url, options.served_name, batch, rounds, say))
    return rows


async def _compare(url: str, name: str, batch: int, rounds: int, say: Progress) -> list[Row]:
    tokens = TOKENS[batch]
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as http, EngineClient(url, name) as client:
        arms: dict[str, Callable[[int], Awaitable[None]]] = {
            "native": lambda i: _read(http, _body(name, tokens, {"temperature": 0.7, "seed": i})),
            "plugin": lambda i: _read(http, _body(name, tokens, {"temperature": 0, "vllm_xargs": _arguments(i)})),
            "client": lambda i: _through_client(client, tokens, i),
        }
        rates: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(rounds + 1):
            for arm, once in arms.items():
                start = time.perf_counter()
                await asyncio.gather(*(once(1000 * number + i) for i in range(batch)))
                if number:  # round 0 warms up
                    rates[arm].append(batch * tokens / (time.perf_counter() - start))
            if number:
                last = ", ".join(f"{arm} {values[-1]:.1f}" for arm, values in rates.items())
                say(f"batch {batch}, round {number} of {rounds}: {last} tokens/s")
    rows: list[Row] = []
    how = (
        f"one server, arms interleaved, {rounds} rounds of {batch} x {tokens} tokens, {TOP_LOGPROBS} log-probabilities"
    )
    for arm, what in ARMS.items():
        values = rates[arm]
        ratio = statistics.median(mine / native for mine, native in zip(values, rates["native"], strict=True))
        rows.append(
            Row(
                what=f"{what}, batch {batch}",
                value=round(statistics.median(values), 1),
                unit="tokens/s",
                how=f"{how}; {min(values):.1f} to {max(values):.1f}",
                compared_with="" if arm == "native" else "vLLM's native seeded sampling",
                ratio=None if arm == "native" else round(ratio, 3),
                goal="" if arm == "native" else ">= 0.95",
            )
        )
    return rows


def _body(name: str, tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": name,
        "prompt": PROMPT,
        "max_tokens": tokens,
        "stream": True,
        "logprobs": TOP_LOGPROBS,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "ignore_eos": True,
        **sampling,
    }


def _seed(i: int) -> bytes:
    return i.to_bytes(32, "big")


def _arguments(i: int) -> dict[str, Any]:
    return {
        "poip_seed": _seed(i).hex(),
        "poip_temperature_milli": TEMPERATURE_MILLI,
        "poip_prompt_root": prompt_root(PROMPT).hex(),
        "poip_prompt_tokens": len(PROMPT),
    }


async def _read(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for _ in response.aiter_bytes():
            pass


async def _through_client(client: EngineClient, tokens: int, i: int) -> None:
    stream = client.generate(
        PROMPT,
        seed=_seed(i),
        temperature_milli=TEMPERATURE_MILLI,
        max_tokens=tokens,
        prompt_root=prompt_root(PROMPT),
        end_token_ids=(),
        ignore_eos=True,
    )
    async for _ in stream:
        pass


def sampler_rows(vocabulary: int = 49_152, repeats: int = 40) -> list[Row]:
    """CPU time per sampled token of our sampler and of the operations that vLLM's seeded sampling does, one thread."""
    import torch

    from poip_chain.service.engine.noise import GumbelSampler

    torch.set_num_threads(1)
    unit = GumbelSampler()
    rows: list[Row] = []
    for batch in TOKENS:
        logits = torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        seeds = [_seed(i) for i in range(batch)]

        def ours(step: int, logits: Any = logits, seeds: list[bytes] = seeds, batch: int = batch) -> None:
            keys = [sampler.position_key(seed, step) for seed in seeds]
            unit.sample(logits, range(batch), keys, [TEMPERATURE_MILLI] * batch)

        def native(step: int, logits: Any = logits, generators: Any = generators) -> None:
            probabilities = torch.softmax(logits / 0.7, dim=-1)
            noise = torch.empty_like(probabilities)
            for i, generator in enumerate(generators):
                noise[i].exponential_(generator=generator)
            probabilities.div_(noise).argmax(dim=-1)

        cost = {}
        for name, work in (("native", native), ("ours", ours)):
            times = []
            for step in range(repeats):
                start = time.process_time()
                work(step)
                times.append((time.process_time() - start) / batch)
            cost[name] = 1e6 * statistics.median(times)
        rows.append(
            Row(
                what=f"sampler alone, batch {batch}",
                value=round(cost["ours"], 1),
                unit="us CPU/token",
                how=f"median of {repeats}, {vocabulary} tokens of vocabulary, one thread",
                compared_with=f"the operations of vLLM's seeded sampling ({cost['native']:.0f} us)",
                ratio=round(cost["ours"] / cost["native"], 3),
            )
        )
    return rows


def main() -> int:
    """Print the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    rows = run(arguments.model, lambda line: print(line, file=sys.stderr, flush=True), arguments.rounds)
    print(json.dumps([row.to_json() for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

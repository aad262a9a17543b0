"""Collects honest noise: answers of a real engine, each against one canonical prefill, part by part into a folder.

The plan is a function of its seed: every kind of content at every temperature in each round, in an order of its own, so
that contents, lengths and temperatures share the engine's batches as strangers' requests do. While a part is generated,
the one before is scored in a second thread. A part is written whole; a run that was killed goes on with the first part
that is missing. Knows engine, model and folder; nothing of statistics.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from eth_hash.auto import keccak

from poip_chain.errors import InvalidInput
from poip_chain.proof.calibration import search
from poip_chain.proof.calibration.data import Data, Store
from poip_chain.proof.calibration.prompts import CONTENTS, Prompts
from poip_chain.proof.calibration.terms import Claim, Forward, score
from poip_chain.service.engine.client import EngineClient, EngineToken
from poip_chain.spec.objects import Profile
from poip_chain.spec.transcript import prompt_root

Progress = Callable[[str], None]

BATCH = 32
TEMPERATURES = (0, 300, 700, 1000)
"""Besides the profile's own ends."""
LENGTHS = (64, 128, 128, 256)
"""Output tokens: limits are made for lengths up to half of the longest."""


@dataclass(frozen=True, slots=True)
class Job:
    """One receipt of the plan."""

    index: int
    content: str
    temperature_milli: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """Which receipts a run makes: a function of the seed, the temperatures and the number of tokens."""

    seed: int
    temperatures: tuple[int, ...]
    tokens: int
    lengths: tuple[int, ...] = LENGTHS
    batch: int = BATCH

    @classmethod
    def of(cls, profile: Profile, seed: int, tokens: int, lengths: tuple[int, ...] = LENGTHS) -> Plan:
        """The plan for a profile: its lowest and highest temperature beside the usual ones that it allows."""
        low, high = profile.min_temperature_milli, profile.max_temperature_milli
        usual = {t for t in TEMPERATURES if t == 0 or low <= t <= high}
        return cls(seed, tuple(sorted(usual | {low, high})), tokens, lengths)

    def jobs(self) -> list[Job]:
        """All receipts, in order: whole rounds of every content at every temperature until there are enough tokens.

        Whole parts: the last round is cut at the end of the batch that reaches the number.
        """
        jobs: list[Job] = []
        total = 0
        for job in self._endless():
            if total >= self.tokens and len(jobs) % self.batch == 0:
                return jobs
            jobs.append(job)
            total += job.tokens
        raise AssertionError("unreachable")

    def parts(self) -> list[list[Job]]:
        """The jobs of each part."""
        jobs = self.jobs()
        return [jobs[i : i + self.batch] for i in range(0, len(jobs), self.batch)]

    def _endless(self) -> Iterator[Job]:
        index = 0
        while True:
            rng = random.Random(f"{self.seed}:{index}")
            classes = [(content, t) for content in CONTENTS for t in self.temperatures]
            rng.shuffle(classes)
            for content, temperature in classes:
                # Long prompts cost the most, and a search shapes the first tokens: both answer briefly.
                brief = content in ("long", "searched")
                yield Job(index, content, temperature, self.lengths[0] if brief else rng.choice(self.lengths))
                index += 1


def seed_of(plan: Plan, job: Job) -> bytes:
    """The sampler's seed of a job."""
    return keccak(f"poip calibration {plan.seed} {job.index}".encode())


@dataclass(frozen=True)
class Collector:
    """One run. `forward` gives canonical logits; `say` hears about each part."""

    store: Store
    plan: Plan
    prompts: Prompts
    forward: Forward
    end_token_ids: tuple[int, ...]
    say: Progress

    async def run(self, client: EngineClient) -> Data:
        """Make every part that is missing; all receipts. Raises Unavailable if the engine goes away: what is done stays."""
        parts = self.plan.parts()
        missing = [i for i in range(len(parts)) if not self.store.has(i)]
        longest = (await client.model_info()).max_model_len
        if self.prompts.longest + max(self.plan.lengths) > longest:
            raise InvalidInput(
                f"the engine takes {longest} tokens, the longest receipts have "
                f"{self.prompts.longest + max(self.plan.lengths)}.",
                hint="Start it with a longer --max-model-len.",
            )
        loop = asyncio.get_running_loop()
        begun, made = time.monotonic(), 0
        todo = sum(job.tokens for i in missing for job in parts[i])
        scoring: asyncio.Future[None] | None = None
        with ThreadPoolExecutor(1, "calibration") as pool:
            for i in missing:
                claims = await self._generate(client, parts[i])
                if scoring is not None:
                    await scoring
                scoring = loop.run_in_executor(pool, self._score, i, claims)
                made += sum(job.tokens for job in parts[i])
                seconds = time.monotonic() - begun
                rest = (todo - made) * seconds / made / 60
                self.say(
                    f"honest: part {i + 1} of {len(parts)}, {made:,} of {todo:,} tokens, {made / seconds:.1f} tokens/s, "
                    f"about {rest:.0f} min left"
                )
            if scoring is not None:
                await scoring
        return self.store.read()

    def _score(self, index: int, claims: Sequence[Claim]) -> None:
        self.store.write(index, [score(self.forward, claim, self.end_token_ids) for claim in claims])

    async def _generate(self, client: EngineClient, jobs: Sequence[Job]) -> list[Claim]:
        return list(await asyncio.gather(*(self._claim(client, job) for job in jobs)))

    async def _claim(self, client: EngineClient, job: Job) -> Claim:
        prompt = self.prompts.prompt(job.content, job.index)
        seed = seed_of(self.plan, job)
        temperature = job.temperature_milli
        if job.content == "searched" and temperature:

            async def ask(ids: tuple[int, ...]) -> EngineToken:
                return (await self._answer(client, ids, seed, temperature, 1))[0]

            found = await search.search(self.forward, ask, prompt, temperature, seed)
            seed = found.seed
        tokens = await self._answer(client, prompt, seed, temperature, job.tokens)
        return Claim(CONTENTS.index(job.content), temperature, seed, prompt, tokens)

    async def _answer(
        self, client: EngineClient, prompt: tuple[int, ...], seed: bytes, temperature: int, tokens: int
    ) -> tuple[EngineToken, ...]:
        stream = client.generate(
            prompt,
            seed=seed,
            temperature_milli=temperature,
            max_tokens=tokens,
            prompt_root=prompt_root(prompt),
            end_token_ids=self.end_token_ids,
            ignore_eos=True,
        )
        return tuple([token async for token in stream])

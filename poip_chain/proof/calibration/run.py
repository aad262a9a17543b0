"""A calibration from model directory to profile: collect honest noise, measure cheats, make limits, report.

    out/honest/, out/cheats/<name>/   raw terms part by part; a run that was killed goes on from them
    out/scores/*.npz                  the same packed, to be published; read instead where there are no parts
    out/profile.json                  what `poip model register --profile` takes
    out/report.json, out/report.md    every number, and the tables

The folder belongs to one model, dtype, engine and plan; other options need another folder. Ties the other calibration
modules together; knows nothing of the command line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poip_chain.canonical.engine import open_model
from poip_chain.economic.profiles import model_profile, profile_to_json
from poip_chain.errors import InvalidInput
from poip_chain.proof.calibration.collect import LENGTHS, Collector, Plan
from poip_chain.proof.calibration.data import Data, Header, Store, read_folder
from poip_chain.proof.calibration.limits import WIDEN
from poip_chain.proof.calibration.prompts import CONTENTS, LONG, Prompts
from poip_chain.proof.calibration.report import Report, report
from poip_chain.proof.calibration.terms import Forward
from poip_chain.service.engine.client import EngineClient
from poip_chain.service.engine.model import ModelHashes, prepare
from poip_chain.service.engine.server import EngineOptions, EngineServer
from poip_chain.spec.objects import Profile
from poip_chain.spec.strict_json import parse_json_object

Progress = Callable[[str], None]
HONEST, CHEATS, REPORT = "honest", "cheats", "report"
STAGES = (HONEST, CHEATS, REPORT)
SERVED_NAME = "poip"


@dataclass(frozen=True)
class Settings:
    """What to calibrate and how far.

    tokens: honest output tokens; cheat_tokens: of each cheat. engine_url: an engine that runs already, else one is started
    with `dtype`. engine_label: what to call its hardware in the report. longest: output tokens of the longest receipts.
    """

    model: Path
    out: Path
    tokens: int = 50_000
    cheat_tokens: int = 4_096
    max_context: int = 2048
    dtype: str = "bfloat16"
    seed: int = 1
    longest: int = LENGTHS[-1]
    longest_prompt: int = LONG[1]
    threads: int = 1
    widen: float = WIDEN
    engine_url: str = ""
    engine_label: str = "this machine"
    stages: tuple[str, ...] = STAGES

    @property
    def lengths(self) -> tuple[int, ...]:
        """Output lengths of the plan."""
        return tuple(max(1, length * self.longest // LENGTHS[-1]) for length in LENGTHS)


class Calibration:
    """One calibration. `forward` replaces the canonical engine in tests."""

    def __init__(self, settings: Settings, say: Progress, forward: Forward | None = None) -> None:
        for stage in settings.stages:
            if stage not in STAGES:
                raise InvalidInput(f"there is no stage {stage!r}; known are {', '.join(STAGES)}.")
        self.settings, self.say = settings, say
        self.hashes: ModelHashes = prepare(settings.model, say)
        config = self.hashes.config
        context = min(settings.max_context, config.max_positions)
        self.base: Profile = model_profile(config, self.hashes.end_token_ids, context, settings.dtype)
        room = context - max(settings.lengths)
        if room < 1:
            raise InvalidInput(f"receipts of {max(settings.lengths)} tokens do not fit into a context of {context}.")
        prompt = min(settings.longest_prompt, room)
        self.prompts = Prompts(settings.model, config.vocab_size, settings.seed, prompt)
        self._forward = forward

    def run(self) -> Report | None:
        """All stages that were asked for; the report, if that is one of them."""
        stages = self.settings.stages
        if HONEST in stages:
            self.collect()
        if CHEATS in stages:
            self.measure_cheats()
        return self.write_report() if REPORT in stages else None

    # Stages

    def collect(self) -> Data:
        """Honest answers, from the engine at engine_url or one started for it."""
        settings = self.settings
        if settings.engine_url:
            return asyncio.run(self._collect(settings.engine_url, settings.engine_label))
        options = EngineOptions(
            model=settings.model,
            served_name=SERVED_NAME,
            dtype=settings.dtype,
            max_model_len=self.base.max_context,
            max_num_seqs=self.plan.batch,
            threads=settings.threads,
            log_file=settings.out / "engine.log",
            dies_with_parent=True,
        )
        server = EngineServer(options)
        try:
            server.start()
            server.wait_ready(self.say)
            return asyncio.run(self._collect(server.url, settings.engine_label))
        finally:
            server.stop()

    async def _collect(self, url: str, label: str) -> Data:
        plan = self.plan
        async with EngineClient(url, SERVED_NAME, read_timeout_seconds=3600) as client:
            engine = f"{(await client.model_info()).statement}, {label}"
            store = Store(self.settings.out / HONEST, self._header(HONEST, engine, plan.batch, plan.temperatures))
            collector = Collector(store, plan, self.prompts, self.forward, self.base.end_token_ids, self.say)
            return await collector.run(client)

    def measure_cheats(self) -> None:
        """Every cheat of `cheats`, one after another."""
        from poip_chain.proof.calibration.cheats import CHEAT_ANSWER, CHEAT_RECEIPTS, TEMPERATURES, CheatRun, cheats

        settings = self.settings
        run = CheatRun(
            settings.model, self.prompts, self.forward, self.base.end_token_ids, self.say, settings.threads,
            tokens=max(1, min(CHEAT_ANSWER, settings.longest, settings.cheat_tokens // CHEAT_RECEIPTS)),
        )  # fmt: skip
        parts = max(1, round(settings.cheat_tokens / (run.receipts * run.tokens)))
        for cheat in cheats(self.hashes.config.num_layers):
            header = self._header(cheat.name, "torch float32", run.receipts, TEMPERATURES)
            run.measure(cheat, Store(settings.out / CHEATS / cheat.name, header), parts)

    def write_report(self) -> Report:
        """Limits and tables from what is there. Raises InvalidInput if there are no honest receipts yet."""
        from poip_chain.proof.calibration.cheats import HONEST_PREFILL, cheats

        out = self.settings.out
        honest = self._read(out / HONEST, HONEST)
        if not honest.receipts:
            raise InvalidInput(f"{out} holds no honest receipts.", hint="Run the stage `honest` first.")
        measured: list[tuple[str, str, Data, bool]] = []
        for cheat in cheats(self.hashes.config.num_layers):
            data = self._read(out / CHEATS / cheat.name, f"cheat-{cheat.name}")
            if not data.receipts:
                continue
            measured.append((cheat.name, cheat.text, data, False))
            if cheat.name in HONEST_PREFILL:
                measured.append((*HONEST_PREFILL[cheat.name], data, True))
        found = report(self._known_header(), honest, measured, self.base, self.settings.widen)
        _write(out / "profile.json", json.dumps(profile_to_json(found.limits.profile), indent=1, default=_row) + "\n")
        _write(out / "report.json", json.dumps(found.to_json(), indent=1, default=_row) + "\n")
        _write(out / "report.md", found.to_markdown())
        return found

    # Parts

    @property
    def forward(self) -> Forward:
        """The canonical engine, opened once."""
        if self._forward is None:
            self.say("canonical engine: opening")
            self._forward = open_model(self.settings.model, self.settings.threads, root=self.hashes.weights_root)
        return self._forward

    @property
    def plan(self) -> Plan:
        """The honest receipts to make."""
        settings = self.settings
        return Plan.of(self.base, settings.seed, settings.tokens, settings.lengths)

    def _header(self, what: str, engine: str, batch: int, temperatures: tuple[int, ...]) -> Header:
        return Header(
            what=what,
            model_id="0x" + self.hashes.model_id.hex(),
            weights_root="0x" + self.hashes.weights_root.hex(),
            dtype=self.settings.dtype,
            engine=engine,
            plan_seed=self.settings.seed,
            batch=batch,
            contents=CONTENTS,
            temperatures=temperatures,
            lengths=self.settings.lengths,
        )

    def _known_header(self) -> dict[str, Any]:
        """The header of the honest receipts."""
        for path in (self.settings.out / HONEST / "header.json", self.settings.out / "scores" / "header.json"):
            if path.is_file():
                header = parse_json_object(path.read_bytes())
                _write(self.settings.out / "scores" / "header.json", json.dumps(header, indent=1) + "\n")
                return header
        raise InvalidInput(f"{self.settings.out} holds scores without their header.json.")

    def _read(self, folder: Path, name: str) -> Data:
        """The parts of a folder, packed on the way; or what was packed before."""
        packed = self.settings.out / "scores" / f"{name}.npz"
        data = read_folder(folder)
        if data.receipts:
            packed.parent.mkdir(parents=True, exist_ok=True)
            data.save(packed)
        elif packed.is_file():
            data = Data.load(packed)
        return data


def _row(value: Any) -> Any:
    """JSON of a profile's threshold rows."""
    return dataclasses.asdict(value)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)

"""A calibration from end to end on a model of some thousand weights, with a scripted engine: killed, continued, reported."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from poip_chain.canonical.engine import open_model
from poip_chain.canonical.model import CanonicalModel
from poip_chain.cli import main
from poip_chain.economic.profiles import profile_from_json
from poip_chain.errors import InvalidInput
from poip_chain.proof.calibration import cheats, search
from poip_chain.proof.calibration.data import Data, read_folder
from poip_chain.proof.calibration.prompts import CONTENTS, Prompts
from poip_chain.proof.calibration.report import verdicts
from poip_chain.proof.calibration.run import Calibration, Settings
from poip_chain.service.engine.client import EngineToken
from poip_chain.service.engine.noise import GumbelSampler
from poip_chain.spec import sampler, scores
from poip_chain.spec.scores import Verdict
from tests.engines.scripted_engine import Event, ScriptedEngine, token_event
from tests.engines.tiny_tokenizer import IM_END, write_tokenizer

pytestmark = pytest.mark.timeout(600)

CONTEXT = 128
OPTIONS = ("--tokens", "2000", "--cheat-tokens", "300", "--longest", "64", "--longest-prompt", "24")
NOISE = 0.02
"""Logits: the scripted engine's rounding."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 300 tokens, with logits spread widely enough to be worth sampling."""
    directory = write_tokenizer(tmp_path_factory.mktemp("model"))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=CONTEXT, initializer_range=0.25, eos_token_id=IM_END,
        bos_token_id=IM_END, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def canonical(model_dir: Path) -> CanonicalModel:
    return open_model(model_dir)


@pytest.fixture(autouse=True)
def long_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole batch of requests arrives at once: more than the standard library's server lets wait."""
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 128)


class Answers:
    """The script: the model's canonical logits with a rounding of their own at each position, sampled as a node does."""

    def __init__(self, model: CanonicalModel) -> None:
        self._model, self._lock, self._sampler = model, threading.Lock(), GumbelSampler()
        self.before = lambda: None

    def rows(self, prompt: list[int], count: int, arguments: dict[str, Any]) -> list[tuple[int, np.ndarray]]:
        """The chosen token and the engine's row at each position."""
        found, ids = [], list(prompt)
        for position in range(count):
            row = self._model.forward(ids, None, 1)[0] / 65536
            noise = np.random.default_rng(len(ids) * 1000 + ids[-1]).normal(0, NOISE, len(row))
            row = (row + noise).astype(np.float32)
            key = sampler.position_key(bytes.fromhex(arguments["poip_seed"]), position)
            (chosen,) = self._sampler.sample(
                torch.from_numpy(row)[None], [0], [key], [arguments["poip_temperature_milli"]]
            )
            found.append((chosen, row))
            ids.append(chosen)
        return found

    def __call__(self, body: dict[str, Any]) -> list[Event]:
        self.before()
        with self._lock:
            rows = self.rows(body["prompt"], body["max_tokens"], body["vllm_xargs"])
        events: list[Event] = []
        for i, (chosen, row) in enumerate(rows):
            logs = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
            top = {int(v): float(logs[v]) for v in np.argsort(-logs)[: body["logprobs"]]}
            finish = "length" if i == len(rows) - 1 else None
            prompt = body["prompt"] if i == 0 else None
            events.append(token_event(chosen, float(logs[chosen]), top, finish=finish, prompt=prompt))
        return events


@pytest.fixture
def answers(canonical: CanonicalModel) -> Answers:
    return Answers(canonical)


def engine(answers: Answers) -> ScriptedEngine:
    return ScriptedEngine(answers, models={"data": [{"id": "poip", "max_model_len": CONTEXT}]})


def arguments(model_dir: Path, out: Path, url: str, *more: str) -> list[str]:
    return ["model", "calibrate", str(model_dir), "--out", str(out), "--engine", url, *OPTIONS, *more]


@pytest.mark.slow
def test_killed_continued_and_reported(
    model_dir: Path, tmp_path: Path, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "POIP_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    with engine(answers) as server:
        started = threading.Event()
        process: list[subprocess.Popen[bytes]] = []

        def kill_after_the_first_part() -> None:
            started.wait()
            if (out / "honest" / "part-00000.npz").exists():
                os.kill(process[0].pid, signal.SIGKILL)

        answers.before = kill_after_the_first_part
        command = [sys.executable, "-m", "poip_chain.cli", *arguments(model_dir, out, server.url, "--stage", "honest")]
        process.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        started.set()
        text = process[0].communicate()[0].decode()
        assert process[0].returncode == -signal.SIGKILL, text
        answers.before = lambda: None
        done = {path.name: path.stat().st_mtime_ns for path in (out / "honest").glob("part-*.npz")}
        assert done and len(done) < len(Calibration(settings(model_dir, out), quiet).plan.parts())
        for path in (out / "honest").glob("part-*.npz"):
            Data.load(path)  # what there is, is whole

        # The same command goes on; nothing is made twice.
        assert main.run([*arguments(model_dir, out, server.url), "--data", str(tmp_path / "data"), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        for name, when in done.items():
            assert (out / "honest" / name).stat().st_mtime_ns == when
        continued = read_folder(out / "honest")
        asked = len(server.requests)
        assert main.run([*arguments(model_dir, out, server.url), "--data", str(tmp_path / "data"), "--json"]) == 0
        assert len(server.requests) == asked, "a finished calibration asks the engine again"
        assert json.loads(capsys.readouterr().out) == result

        # A run that was never killed has the same scores.
        whole = Calibration(settings(model_dir, tmp_path / "whole", server.url), quiet).collect()
        assert all(np.array_equal(whole.arrays[name], continued.arrays[name]) for name in whole.arrays)

        # Another plan does not mix with it.
        assert main.run([*arguments(model_dir, out, server.url), "--seed", "2", "--json"]) == 1
        assert "another run" in json.loads(capsys.readouterr().out)["error"]["message"]

    profile = profile_from_json(json.loads((out / "profile.json").read_bytes()))
    assert profile.margin_table and profile.fingerprint_table and profile.max_context == CONTEXT
    assert (out / "report.md").read_text().count("|") > 100
    honest = read_folder(out / "honest")
    assert {CONTENTS[int(c)] for c in honest.arrays["content"]} <= set(CONTENTS) and honest.tokens >= 2000
    assert Verdict.FRAUD not in verdicts(honest, profile)
    measured = {entry["name"]: entry for entry in result["detections"]}
    assert {"int4", "drop-1", "wrong-seed", "temperature-1", "drop-half-prefill", "noise-0.5"} <= set(measured)
    assert measured["drop-half"]["needed"][0] is not None and measured["wrong-seed"]["needed"][0] is not None
    assert measured["noise-0.5"]["fingerprint_mean"] < measured["noise-5"]["fingerprint_mean"]
    assert measured["wrong-seed"]["fingerprint_mean"] < 0.1 < measured["drop-half"]["fingerprint_mean"]

    # The published scores alone give the same report.
    alone = tmp_path / "alone"
    alone.mkdir()
    (out / "scores").rename(alone / "scores")
    report = dataclasses.replace(settings(model_dir, alone), stages=("report",))
    found = Calibration(report, quiet).run()
    assert found is not None and found.limits.profile == profile


def quiet(_: str) -> None:
    """Progress that nobody reads."""


def settings(model_dir: Path, out: Path, url: str = "") -> Settings:
    return Settings(
        model=model_dir, out=out, tokens=2000, cheat_tokens=300, longest=64, longest_prompt=24, engine_url=url
    )


def test_what_does_not_fit_is_refused(model_dir: Path, tmp_path: Path, answers: Answers) -> None:
    with pytest.raises(InvalidInput, match="do not fit"):
        Calibration(dataclasses.replace(settings(model_dir, tmp_path), longest=256), quiet)
    with pytest.raises(InvalidInput, match="no stage"):
        Calibration(dataclasses.replace(settings(model_dir, tmp_path), stages=("all",)), quiet)
    with pytest.raises(InvalidInput, match="no honest receipts"):
        Calibration(dataclasses.replace(settings(model_dir, tmp_path / "new"), stages=("report",)), quiet).run()
    small = ScriptedEngine(answers, models={"data": [{"id": "poip", "max_model_len": 64}]})
    with small as server, pytest.raises(InvalidInput, match="the engine takes 64 tokens"):
        Calibration(settings(model_dir, tmp_path / "small", server.url), quiet).collect()


def test_a_searched_seed_is_worse_than_a_random_one(canonical: CanonicalModel, answers: Answers) -> None:
    prompt = (5, 9, 200, 77)

    def margin(seed: bytes) -> int:
        chosen, _ = answers.rows(list(prompt), 1, {"poip_seed": seed.hex(), "poip_temperature_milli": 200})[0]
        logits = canonical.forward(prompt, None, 1)[0].tolist()
        return scores.margin(logits, chosen, seed, 0, 200)

    async def ask(ids: tuple[int, ...]) -> EngineToken:
        row = answers.rows(list(ids), 1, {"poip_seed": "00" * 32, "poip_temperature_milli": 0})[0][1]
        top = tuple((int(v), float(row[v])) for v in np.argsort(-row)[:9])
        return EngineToken(top[0][0], top[0][1], top)

    found = asyncio.run(search.search(canonical, ask, prompt, 200, b"tag", seeds=3000, depth=1))
    random = [margin(search.candidate(b"other", i)) for i in range(100)]
    assert margin(found.seed) > max(random)
    assert abs(margin(found.seed) - found.expected) < 700, "the search expected another margin than it got"


def test_prompts_are_reproducible_varied_and_bounded(model_dir: Path) -> None:
    one, two = (Prompts(model_dir, 300, seed, 40) for seed in (1, 2))
    again = Prompts(model_dir, 300, 1, 40)
    for content in CONTENTS:
        prompts = [one.prompt(content, i) for i in range(12)]
        assert prompts == [again.prompt(content, i) for i in range(12)]
        assert len(set(prompts)) > 3, content
        assert all(1 <= len(p) <= 40 and max(p) < 300 for p in prompts)
        assert prompts != [two.prompt(content, i) for i in range(12)]
    with pytest.raises(InvalidInput, match="no content"):
        one.prompt("poems", 0)


def test_the_degradations_do_what_they_say() -> None:
    torch.manual_seed(2)
    weight = torch.randn(8, 96)
    scale = weight.abs().amax(dim=1, keepdim=True)
    assert (cheats.int8(weight) - weight).abs().max() <= (scale / 127).max() * 0.51
    assert len(cheats.int4(weight)[0, :64].unique()) <= 16
    assert 0.005 < ((cheats.fp8(weight) - weight).abs() / weight.abs()).mean() < 0.05
    names = [cheat.name for cheat in cheats.cheats(30)]
    assert len(names) == len(set(names)) >= 16 and set(cheats.HONEST_PREFILL) <= set(names)

"""Canonical execution against torch on the same cores: speed of prefill, decode and trace; accuracy on real text.

Timings are medians of interleaved runs: one of each contender in turn, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rows import Row
from poip_chain.canonical.compiled import Workers
from poip_chain.canonical.contested import TraceTree, Tree, reveal
from poip_chain.canonical.engine import open_model
from poip_chain.canonical.matmul import PATHS
from poip_chain.canonical.matmul import Path as MatmulPath
from poip_chain.canonical.model import Cache, CanonicalModel
from poip_chain.canonical.moves import Finish, Game, MakeStep, OpenCell, Pick, Player
from poip_chain.canonical.trace import Trace
from poip_chain.canonical.weight_tree import WeightTree
from poip_chain.canonical.weights import Weights
from poip_chain.spec.merkle import inner_hash, leaf_hash
from poip_chain.spec.trace import WIDE, Op, decode, encode
from poip_chain.spec.types import Hash32

TRACE_OUTPUTS = 64
DECODED = 16
REPEATS = 5
ACCURACY_TOKENS = 160
LONG_CONTEXT = 2048


def run(model_directory: Path) -> list[Row]:
    """All rows. Torch and the engine use OMP_NUM_THREADS threads, by default one: BLAS of numpy goes by it, too, and two
    pools of threads that spin for the same cores measure nothing."""
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    model = open_model(model_directory, threads)
    opened = time.perf_counter() - begin
    rows = [
        Row(
            "canonical engine opened",
            opened,
            "s",
            f"self-test and weights, matmul path {model.path.name}, {threads} threads; first time includes compiling",
        )
    ]
    floats = {
        name: AutoModelForCausalLM.from_pretrained(model_directory, dtype=kind, local_files_only=True).eval()
        for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    text = _texts(AutoTokenizer.from_pretrained(model_directory, local_files_only=True))
    rows += _prefill(model, floats, text["prose"], threads)
    rows += _decode(model, floats, text["prose"])
    rows += _trace(model, text["prose"])
    rows += _defence(model, text["prose"])
    rows += _paths(model.weights, threads)
    rows += _accuracy(model, floats, text)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(Row("peak memory of this benchmark", peak, "MB", "with torch fp32 and bf16 models beside the engine"))
    return rows


def interleaved(contenders: dict[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each, run in turn, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, work in contenders.items():
            begin = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _float_logits(network: Any, tokens: Sequence[int], keep: int) -> NDArray[np.float64]:
    with torch.inference_mode():
        logits = network(torch.tensor([list(tokens)]), logits_to_keep=keep).logits[0]
    result: NDArray[np.float64] = logits.double().numpy()
    return result


def _prefill(model: CanonicalModel, floats: dict[str, Any], tokens: list[int], threads: int) -> list[Row]:
    rows = []
    for count in (128, 512):
        part = tokens[:count]
        seconds = interleaved(
            {
                "canonical": partial(model.forward, part),
                **{name: partial(_float_logits, network, part, 1) for name, network in floats.items()},
            },
            REPEATS if count < 512 else 3,
        )
        for name in floats:
            rows.append(
                Row(
                    f"canonical prefill, {count} tokens",
                    seconds["canonical"],
                    "s",
                    f"logits of the last position, path {model.path.name}, {threads} threads; torch: {seconds[name]:.2f} s",
                    f"torch {name}, same cores",
                    seconds["canonical"] / seconds[name],
                    "<= 1" if name == "fp32" else "stretch: <= 1",
                )
            )
    return rows


def _decode(model: CanonicalModel, floats: dict[str, Any], tokens: list[int]) -> list[Row]:
    cache = Cache()
    model.forward(tokens[:64], cache)

    def canonical() -> None:
        for token in tokens[64 : 64 + DECODED]:
            model.forward([token], cache)
        cache.length = 64

    def torch_decode(network: Any) -> Callable[[], None]:
        def work() -> None:
            with torch.inference_mode():
                output = network(torch.tensor([tokens[:64]]), use_cache=True)
                times.append(time.perf_counter())
                for token in tokens[64 : 64 + DECODED]:
                    output = network(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
                times.append(time.perf_counter())

        return work

    times: list[float] = []
    seconds: dict[str, list[float]] = {"canonical": [], "bf16": [], "fp32": []}
    for _ in range(4):
        begin = time.perf_counter()
        canonical()
        seconds["canonical"].append((time.perf_counter() - begin) / DECODED)
        for name, network in floats.items():
            times.clear()
            torch_decode(network)()
            seconds[name].append((times[1] - times[0]) / DECODED)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return [
        Row(
            "canonical decode, one token",
            1000 * median["canonical"],
            "ms",
            f"cache of 64 to {64 + DECODED} positions; torch: {1000 * median[name]:.1f} ms",
            f"torch {name}, same cores",
            median["canonical"] / median[name],
            "<= 1" if name == "bf16" else "",
        )
        for name in ("bf16", "fp32")
    ]


def _trace(model: CanonicalModel, tokens: list[int]) -> list[Row]:
    part = tokens[:512]
    made: list[Trace] = []

    def trace() -> None:
        made[:] = [Trace(model, part, TRACE_OUTPUTS)]

    seconds = interleaved({"forward": lambda: model.forward(part, None, TRACE_OUTPUTS), "trace": trace}, 3)
    share = seconds["trace"] / seconds["forward"] - 1
    layout = made[0].layout
    begin = time.perf_counter()
    made[0].nodes(0, layout.count // 2, 64)
    opened = time.perf_counter() - begin
    return [
        Row(
            "whole trace tree, 512 positions",
            seconds["trace"],
            "s",
            f"{layout.count} leaves hashed during the forward pass",
            "the hashing against the forward pass alone",
            share,
            "<= 0.3",
        ),
        Row("64 leaves opened from a trace", opened, "s", "one layer computed again, 512 positions", goal="< 30"),
    ]


class _Falsified(TraceTree):
    """A trace's tree with one element of one leaf off by one: what a lying accuser shows."""

    def __init__(self, trace: Trace, index: int) -> None:
        super().__init__(trace)
        wide = trace.layout.locate(index).tensor.op in WIDE
        values = decode(trace.leaf(index), wide)
        self.index, self.false = index, encode([values[0] + 1, *values[1:]], wide)
        self.above = {(0, index): leaf_hash(self.false)}
        for level in range(self.shape.height):
            node, beside = self.above[level, index], index ^ 1
            if beside < self.shape.size(level):
                other = trace.nodes(level, beside, 1)[0]
                node = inner_hash(other, node) if index % 2 else inner_hash(node, other)
            index //= 2
            self.above[level + 1, index] = node

    def leaf(self, index: int) -> bytes:
        return self.false if index == self.index else super().leaf(index)

    def nodes(self, level: int, first: int, count: int) -> list[Hash32]:
        honest = super().nodes(level, first, count)
        return [self.above.get((level, first + i), node) for i, node in enumerate(honest)]


def _defence(model: CanonicalModel, tokens: list[int]) -> list[Row]:
    """All of a defence against a false accusation: the trace, and every answer of both sides down to the step."""
    prompt, output = tokens[: 513 - TRACE_OUTPUTS], tokens[513 - TRACE_OUTPUTS : 513]
    begin = time.perf_counter()
    weights = WeightTree(model.weights)
    hashed = time.perf_counter() - begin
    begin = time.perf_counter()
    trace = Trace(model, [*prompt, *output[:-1]], TRACE_OUTPUTS)
    built = time.perf_counter() - begin
    player, layer = Player(trace, weights, prompt, output), model.config.num_layers // 2
    taken = {}
    for op in (Op.EMBED, Op.INPUT_SUM, Op.V, Op.Q_ROPE, Op.ATTENTION, Op.OUTPUT, Op.LOGITS):
        tensor = trace.layout.tensor(op, layer)
        accuser = _Falsified(trace, tensor.start + 2 * tensor.leaves // 3)
        trace.forget()
        begin = time.perf_counter()
        _play(accuser, player)
        taken[op.name.lower()] = time.perf_counter() - begin
    worst = max(taken, key=lambda name: taken[name])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [
        Row("weights hashed for proofs", hashed, "s", "all rows of weights_root, once for a model"),
        Row(
            "whole defence, 512 positions",
            built + taken[worst],
            "s",
            f"trace {built:.1f} s, then all moves of both sides {taken[worst]:.2f} s for the slowest of "
            f"{len(taken)} kinds of cells, {worst}; peak memory so far {peak:,.0f} MB",
            goal="< 30",
        ),
    ]


def _play(accuser: _Falsified, player: Player) -> MakeStep | Finish:
    game = Game(player, accuser.above[accuser.shape.height, 0])
    number, node = 0, accuser.shape.root
    while True:
        tree: Tree = player.tree(number) if number else accuser
        game.see(number, node, reveal(tree, node))
        move = game.move(number, node)
        if isinstance(move, Pick):
            node = move.node
        elif isinstance(move, OpenCell):
            number = move.number
            node = player.tree(number).shape.root
        else:
            return move


def _paths(weights: Weights, threads: int) -> list[Row]:
    """Each way of multiplying over 128 rows of the model's widest matrix, against torch fp32."""
    matrix = weights.integers["0.gate"]
    x = np.random.default_rng(0).integers(-(2**20), 2**20, (128, matrix.shape[1])).astype(np.int32)
    left, right = torch.from_numpy(x).float(), torch.from_numpy(matrix.astype(np.float32))
    contenders: dict[str, Callable[[], object]] = {"fp32": lambda: torch.nn.functional.linear(left, right)}
    for name, make in PATHS.items():
        try:
            path = make(Workers(threads))
        except ImportError:
            continue
        prepared = path.prepare(matrix)
        contenders[name] = partial(_product, path, x, prepared)
    seconds = interleaved(contenders, 7)
    shape = f"128 x {matrix.shape[1]} by {matrix.shape[0]} x {matrix.shape[1]}"
    return [
        Row(
            f"exact matrix product, path {name}",
            1000 * seconds[name],
            "ms",
            f"{shape}, {threads} threads",
            "torch fp32 product",
            seconds[name] / seconds["fp32"],
        )
        for name in contenders
        if name != "fp32"
    ]


def _product(path: MatmulPath, x: NDArray[np.int32], prepared: Any) -> None:
    path.multiply(path.take(x), prepared, lambda _sums, _first, _last: None)


def _accuracy(model: CanonicalModel, floats: dict[str, Any], texts: dict[str, list[int]]) -> list[Row]:
    """|difference| of raw logits from those of torch fp32, for this engine and for torch bf16."""
    rows = []
    for name, tokens in texts.items():
        long = name.startswith("long")
        part = tokens[:LONG_CONTEXT] if long else tokens[:ACCURACY_TOKENS]
        keep = 128 if long else len(part)
        wanted = _float_logits(floats["fp32"], part, keep)
        found: dict[str, NDArray[np.float64]] = {
            "canonical": model.forward(part, None, keep) / 65_536,
            "torch bf16": _float_logits(floats["bf16"], part, keep),
        }
        for who, logits in found.items():
            gap = np.abs(logits - wanted)
            same = float((logits.argmax(axis=1) == wanted.argmax(axis=1)).mean())
            rows.append(
                Row(
                    f"accuracy of {who}, {name}",
                    float(gap.mean()),
                    "mean |d logit|",
                    f"{keep} positions of {len(part)}; largest {gap.max():.4f}; top-1 agreement {100 * same:.1f} %",
                    "torch fp32",
                )
            )
    return rows


def _texts(tokenizer: Any) -> dict[str, list[int]]:
    """Token ids of prose (the licence), code (the standard library), French, and a long mixture."""
    root = Path(__file__).parents[1]
    prose = (root / "LICENSE").read_text()
    code = Path(statistics.__file__).read_text()
    french = (
        "La Bibliothèque nationale ouvre ses portes à neuf heures, et les lecteurs attendent déjà devant l'escalier de "
        "pierre. Il pleut depuis trois jours; les pavés luisent, les arbres du quai perdent leurs dernières feuilles. "
        "Une vieille dame explique à son petit-fils pourquoi les ponts de la ville portent des noms de batailles, mais "
        "l'enfant ne regarde que les péniches. « Où vont-elles, grand-mère ? » demande-t-il. « À la mer, si elles en "
        "ont le courage. » Plus loin, un étudiant relit ses notes sur la thermodynamique; il a oublié la moitié des "
        "formules et se souvient très bien du visage de celle qui les lui a enseignées. "
    )
    texts = {"prose": prose[1000:], "code": code[9000:], "French": french, "long context": prose + code}
    return {name: tokenizer(text).input_ids for name, text in texts.items()}

"""Show accusations of wrong computation and the contests over them, and judge a contest again"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context, when
from poip_chain.cli.main import group
from poip_chain.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from rich.tree import Tree

    from poip_chain.economic.clients.court import AccusationInfo
    from poip_chain.service.court.replay import StepMade
    from poip_chain.service.court.view import Accusation, Accused, Contest, CourtView, Record

command = group("case", "Accusations of wrong computation, and the contests over them (docs/court.md).")

BY = {1: "by a step", 2: "by time", 3: "by a proven point", 4: "the accusation was over"}


class AccusationId(click.ParamType[int]):
    """BATCH-NUMBER, as `poip case list` shows it."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The id on chain."""
        batch, _, number = str(value).partition("-")
        if not (batch.isdecimal() and number.isdecimal() and len(batch) < 20 and int(number or 0) < 2**32):
            self.fail(f"{value!r} is not BATCH-NUMBER, as in 12-0. `poip case list` shows all.", param, ctx)
        return int(batch) << 32 | int(number)


@command.command("list")
@click.option("--batch", "batch_id", type=click.IntRange(min=1), help="Only of this batch.")
@click.option("--open", "only_open", is_flag=True, help="Only those that have not ended.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="The newest so many.")
@command_context
def list_cases(context: Context, batch_id: int | None, only_open: bool, limit: int) -> None:
    """List accusations, newest last."""
    from poip_chain.service.court.view import CourtView

    view = CourtView(context.network)
    rows: list[dict[str, Any]] = []
    for accusation in reversed(view.accusations(batch_id=batch_id)):
        info = view.info(accusation.id)
        if not (only_open and info.is_over):
            rows.append(_summary(view, accusation, info))
        if len(rows) == limit:
            break
    rows.reverse()
    output.result(
        {"cases": rows},
        lambda: output.table(
            [">id", "status", "node", "accuser", ">contests", ">open", "next", ">bonds"],
            [
                [
                    row["id"], row["status"], row["node"], row["accuser"], row["contests"], row["open_contests"],
                    row["next"], _money(row["bonds"]),
                ]
                for row in rows
            ],
            empty="no accusations",
        ),
    )  # fmt: skip


@command.command("show")
@click.argument("case", metavar="ID", type=AccusationId())
@command_context
def show(context: Context, case: int) -> None:
    """Show one accusation: what is claimed, its contests, where each stands, clocks and bonds."""
    from poip_chain.service.court.view import CourtView

    view = CourtView(context.network)
    accusation, info = _find(view, case)
    accused = view.accused(case)
    record = view.record(case)
    data = {**_summary(view, accusation, info), "commitment": accusation.commitment}
    if accused is not None:
        data |= _claim(accused)
    data["contest_list"] = [_contest(view, record, contest) for contest in record.contests]
    output.result(data, lambda: output.tree(_tree(data)))


@command.command("replay")
@click.argument("case", metavar="ID", type=AccusationId())
@click.option("--contest", type=click.IntRange(min=0), help="Its number; default: the last one that a step ended.")
@click.option("--model", type=click.Path(path_type=Path), help="Directory of the model: check its weights as well.")
@click.option("--evidence", type=click.Path(path_type=Path), help="Evidence file of the answer: recompute its trace.")
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="Of the computation.")
@command_context
def replay(
    context: Context, case: int, contest: int | None, model: Path | None, evidence: Path | None, threads: int
) -> None:
    """Judge the step that ended a contest again, on this machine, from what stands on chain.

    All proofs are checked and the one cell is recomputed. With --model also the weights are compared with the model's;
    with --evidence the whole trace is recomputed, and its own value of the cell is shown. Exit code 4 if the court
    decided otherwise.
    """
    from poip_chain.service.court.replay import read_step
    from poip_chain.service.court.view import CourtView

    if evidence is not None and model is None:
        raise InvalidInput("recomputing the trace needs the model.", hint="Add --model DIRECTORY.")
    view = CourtView(context.network)
    _find(view, case)
    accused = view.accused(case)
    if accused is None:
        raise NotFound(f"accusation {_name(case)} was not revealed: there is nothing to judge.")
    chosen = _chosen(view.record(case), case, contest)
    made = read_step(view, accused, chosen)
    data: dict[str, Any] = {
        "contest": f"{_name(case)}-{chosen.id & (2**32 - 1)}",
        "cell": made.cell,
        "accuser_states": made.verdict.stated,
        "recomputed": made.verdict.right,
        "right": "the accuser" if made.verdict.holds else "the contester",
        "court": "the contester won" if made.contester_won else "the contester lost",
        "transaction": made.transaction,
    }
    if model is not None:
        data |= _from_model(accused, made, model, evidence, threads)
    output.result(data, lambda: output.fields(data))
    if made.verdict.holds == made.contester_won:
        raise output.CheckFailed(f"the court decided contest {data['contest']} otherwise than this machine.")


def _from_model(accused: Accused, made: StepMade, model: Path, evidence: Path | None, threads: int) -> dict[str, Any]:
    """What the model's directory, and the answer's tokens, say of a step. Raises IntegrityError for other weights."""
    from poip_chain.proof.evidence import Evidence
    from poip_chain.service.court.replay import own_value
    from poip_chain.service.court.traces import Traces

    root = accused.terms.trace.weights_root
    with output.progress("opening the model") as tell:
        traces = Traces(model, threads, progress=tell)
        traces.weights(root)
        found: dict[str, Any] = {"weights": f"those of {model}"}
        if evidence is not None:
            transcript = Evidence.read(evidence).record.transcript
            tell("recomputing the trace")
            player = traces.player(root, transcript.prompt_ids, transcript.output_ids)
            same = player.root == accused.terms.trace.trace_root
            found["own_value"] = own_value(player, made.step)
            found["own_trace"] = f"0x{player.root.hex()} ({'as' if same else 'not as'} accused)"
    return found


def _find(view: CourtView, case: int) -> tuple[Accusation, AccusationInfo]:
    for accusation in view.accusations(batch_id=case >> 32):
        if accusation.id == case:
            return accusation, view.info(case)
    raise NotFound(f"there is no accusation {_name(case)}.", hint="`poip case list` shows all.")


def _chosen(record: Record, case: int, number: int | None) -> Contest:
    """The contest to judge again. Raises NotFound or InvalidInput."""
    stepped = [c for c in record.contests if c.ended is not None and c.ended.by == 1]
    if number is None:
        if not stepped:
            raise NotFound(
                f"no contest of accusation {_name(case)} was ended by a step.",
                hint=f"`poip case show {_name(case)}` shows where they stand.",
            )
        return stepped[-1]
    for contest in record.contests:
        if contest.id & (2**32 - 1) == number:
            if contest in stepped:
                return contest
            state = "is open" if contest.ended is None else f"ended: {BY[contest.ended.by]}"
            raise InvalidInput(f"contest {number} of accusation {_name(case)} {state}: there is no step to judge.")
    raise NotFound(f"accusation {_name(case)} has no contest {number}.")


def _summary(view: CourtView, accusation: Accusation, info: AccusationInfo) -> dict[str, Any]:
    from poip_chain.economic.clients.court import AccusationStatus

    batch = view.batch(accusation.batch_id)
    parameters = view.network.parameters
    bonds, following = 0, ""
    if not info.is_over:
        bonds = accusation.bond
        contest_bond = parameters.value_at("contest_bond", batch.parameters_version)
        open_bonded = [c for c in view.contests(accusation.id) if c.ended is None and not c.free]
        bonds += contest_bond * (len(open_bonded) + info.lost_contests)
    if info.status is AccusationStatus.COMMITTED:
        until = info.committed_at + parameters.value_at("reveal_window", batch.parameters_version)
        following = f"reveal until {when(until)}"
    elif info.status is AccusationStatus.REVEALED:
        accused = view.accused(accusation.id)
        end = 0 if accused is None else accused.terms.contest_end
        over = view.time() > end
        if info.open_contests:
            following = "contests run"
        else:
            following = "resolve" if over else f"contests until {when(end)}"
    return {
        "id": _name(accusation.id),
        "status": info.status.name.lower(),
        "batch": accusation.batch_id,
        "node": batch.node,
        "accuser": accusation.accuser,
        "contests": info.contests,
        "open_contests": info.open_contests,
        "lost_contests": info.lost_contests,
        "next": following,
        "bond": str(accusation.bond),
        "bonds": str(bonds),
    }


def _claim(accused: Accused) -> dict[str, Any]:
    terms = accused.terms
    return {
        "index": accused.index,
        "prompt_tokens": terms.trace.prompt_tokens,
        "output_tokens": terms.trace.output_tokens,
        "trace_root": terms.trace.trace_root,
        "leaves": terms.leaf_count,
        "margins": [_point(p) for p in accused.margins],
        "fingerprints": [_point(p) for p in accused.fingerprints],
        "contest_bond": str(terms.contest_bond),
        "clock": terms.clock,
        "contest_end": terms.contest_end,
        "transaction": accused.where.transaction,
    }


def _point(point: Any) -> dict[str, int]:
    return dict(zip(("position", "token", "logit", "claimed_logit"), point.values(), strict=True))


def _contest(view: CourtView, record: Record, contest: Contest) -> dict[str, Any]:
    data: dict[str, Any] = {
        "number": contest.id & (2**32 - 1),
        "contester": contest.contester,
        "free": contest.free,
        "over": "the trace" if contest.point is None else f"point {contest.point}",
        "outcome": None,
        "moves": _moves(record, contest),
    }
    if contest.ended is not None:
        data["outcome"] = contest.ended.outcome.name.lower()
        data["by"] = BY[contest.ended.by]
        data["transaction"] = contest.ended.where.transaction
        return data
    at, now = view.contest(contest.id), view.time()
    accuser_moves = at.revealed_at == 0
    since = at.since if accuser_moves else max(at.since, at.revealed_at)
    waited = max(0, at.revealed_at - at.since)
    lefts = {"accuser": at.accuser_left - waited, "contester": at.contester_left}
    mover = "accuser" if accuser_moves else "contester"
    lefts[mover] -= max(0, now - since)
    data |= {
        "to_move": mover,
        "at": _place(at.cell, at.level, at.index) if contest.point is None else f"point {at.index}",
        "accuser_left": lefts["accuser"],
        "contester_left": lefts["contester"],
    }
    return data


def _moves(record: Record, contest: Contest) -> list[str]:
    """What was said at the places where a contest stood, in order; what was shown for another contest is shown for it."""
    from poip_chain.spec.dispute import Node

    own = [p for p in record.picks if p.contest == contest.id]
    stood = {(p.cell, p.node): p.where for p in own}
    said: list[tuple[int, int, str]] = [
        (p.where.block, p.where.log_index, f"contester: {_place(p.cell, p.node.level, p.node.index)}") for p in own
    ]
    tops = [s for s in record.reveals if s.cell == 0]
    top = max((s.node.level for s in tops), default=0)
    for shown in record.reveals:
        key = (shown.cell, shown.node)
        if key in stood or (contest.point is None and key == (0, Node(top, 0))):
            kind = "leaves" if len(shown.parts[0]) != 32 else "nodes"
            place = _place(shown.cell, shown.node.level, shown.node.index)
            said.append((shown.where.block, shown.where.log_index, f"shown: {len(shown.parts)} {kind} below {place}"))
    return [text for _, _, text in sorted(said)]


def _place(cell: int, level: int, index: int) -> str:
    from poip_chain.spec.dispute import cell_of

    node = f"node {index} of level {level}"
    if not cell:
        return node
    leaf, element = cell_of(cell)
    return f"{node} in the tree of leaf {leaf}, element {element}"


def _tree(data: dict[str, Any]) -> Tree:
    from rich.tree import Tree

    top = Tree(f"accusation {data['id']}: {data['status']}" + (f", {data['next']}" if data["next"] else ""))
    top.add(f"node {data['node']}, batch {data['batch']}" + (f", receipt {data['index']}" if "index" in data else ""))
    top.add(f"accuser {data['accuser']}, bond {_money(data['bond'])}; all bonds {_money(data['bonds'])}")
    if "trace_root" in data:
        top.add(
            f"trace 0x{data['trace_root'].hex()}: {data['prompt_tokens']} + {data['output_tokens']} tokens, "
            f"{data['leaves']} leaves"
        )
        points = top.add(f"{len(data['margins'])} margins, {len(data['fingerprints'])} fingerprints")
        for number, point in enumerate((*data["margins"], *data["fingerprints"])):
            points.add(
                f"{number}: position {point['position']}, token {point['token']}: {point['logit'] / 65536:.4f} against "
                f"{point['claimed_logit'] / 65536:.4f}"
            )
        top.add(
            f"contests: bond {_money(data['contest_bond'])}, {_clock(data['clock'])} a side, to be opened until "
            f"{when(data['contest_end'])}"
        )
    for contest in data["contest_list"]:
        _branch(top, contest)
    return top


def _branch(top: Tree, contest: dict[str, Any]) -> None:
    state = "open" if contest["outcome"] is None else f"{contest['outcome']} {contest['by']}"
    kind = "free, " if contest["free"] else ""
    branch = top.add(f"contest {contest['number']} over {contest['over']}, {kind}by {contest['contester']}: {state}")
    for move in contest["moves"]:
        branch.add(move)
    if contest["outcome"] is None:
        branch.add(f"the {contest['to_move']} is to move at {contest['at']}")
        branch.add(f"clocks: accuser {_clock(contest['accuser_left'])}, contester {_clock(contest['contester_left'])}")


def _name(case: int) -> str:
    return f"{case >> 32}-{case & (2**32 - 1)}"


def _money(wei: str) -> str:
    from poip_chain.economic.money import format_amount

    return format_amount(int(wei))


def _clock(seconds: int) -> str:
    """Time left, h:mm:ss."""
    if seconds < 0:
        return "over"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02}:{seconds % 60:02}"

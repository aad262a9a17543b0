"""The step that ended a contest, read from its transaction and judged again (`canonical.replay`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hexbytes import HexBytes

from poip_chain.canonical.moves import Player
from poip_chain.canonical.opening import Opened, Step, is_wide
from poip_chain.canonical.replay import Roots, Verdict, describe, judge
from poip_chain.economic.clients.court import ContestOutcome
from poip_chain.errors import InvalidInput
from poip_chain.service.court.view import Accused, Contest, CourtView
from poip_chain.spec.dispute import TRACE, cell_number, cell_of
from poip_chain.spec.trace import Layout, decode

BY_STEP = 1


@dataclass(frozen=True, slots=True)
class StepMade:
    """A step on chain, judged here. `cell` in words."""

    step: Step
    cell: str
    verdict: Verdict
    contester_won: bool
    transaction: str


def read_step(view: CourtView, accused: Accused, contest: Contest) -> StepMade:
    """The step that ended a contest, judged again.

    Raises InvalidInput if no step ended it, or its transaction does not call the court itself or proves nothing.
    """
    ended = contest.ended
    if ended is None or ended.by != BY_STEP:
        raise InvalidInput("no step has ended this contest.")
    contests, terms = view.network.contests, accused.terms
    transaction: Any = view.network.chain.request("eth_getTransactionByHash", ended.where.transaction)
    if not transaction or str(transaction["to"]).lower() != str(contests.address).lower():
        raise InvalidInput(
            f"the transaction {ended.where.transaction} does not call the court itself: its step cannot be read from it."
        )
    try:
        function, given = contests.contract.decode_function_input(HexBytes(transaction["input"]))
    except Exception as error:
        # web3 raises many kinds for data that fits no function; all mean the same here.
        raise InvalidInput(f"the transaction {ended.where.transaction} fits no move: {error}.") from error
    name = function.fn_name
    if name not in ("step", "finish") or int(given["id"]) != contest.id:
        raise InvalidInput(f"the transaction {ended.where.transaction} is no step of this contest.")
    picks = [p for p in view.record(accused.id).picks if p.contest == contest.id]
    number = picks[-1].cell if picks else TRACE
    if name == "finish":
        step = Step(*cell_of(number))
    elif number == TRACE:
        step = Step(int(given["index"]), int(given["element"]))
    else:
        step = Step(*cell_of(number), True, int(given["index"]), int(given["element"]))
    trace = terms.trace
    layout = Layout(terms.config, trace.prompt_tokens, trace.output_tokens)
    opened = given["opened"]
    leaves, rows, proof = opened.values() if hasattr(opened, "values") else opened
    roots = Roots(trace.trace_root, trace.weights_root, trace.prompt_root, trace.output_root, bytes(given["sub_root"]))
    shown = {part for s in view.reveals(accused.id) for part in s.parts}
    if name == "step" and bytes(given["leaf"]) not in shown:
        raise InvalidInput("the leaf of this step was never shown.")
    verdict = judge(
        layout,
        step,
        Opened(bytes(leaves), bytes(rows), tuple(bytes(node) for node in proof)),
        roots,
        bytes(given["leaf"]),
    )
    return StepMade(step, describe(layout, step), verdict, ended.outcome is ContestOutcome.WON, ended.where.transaction)


def own_value(player: Player, step: Step) -> int:
    """What a player's own trace says at the cell of a step."""
    number = cell_number(step.leaf, step.element) if step.inside else TRACE
    leaf, element = (step.sub_leaf, step.sub_element) if step.inside else (step.leaf, step.element)
    return decode(player.tree(number).leaf(leaf), is_wide(player.layout, step))[element]

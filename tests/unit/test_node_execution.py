"""Running requests: what is streamed, what is signed, and when nothing is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from poip_chain.errors import Unavailable
from poip_chain.service.node.admission import parse_submission
from poip_chain.service.node.execution import ErrorEvent, Job, ReceiptEvent, TokenEvent
from poip_chain.service.node.node import Stored
from poip_chain.service.node.refusals import RequestRefused
from poip_chain.spec.objects import FinishReason, Request, SamplingParams
from poip_chain.spec.types import ZERO_ADDRESS
from tests.engines.node_kit import INPUT_PRICE, OUTPUT_PRICE, Kit, request_hash
from tests.engines.scripted import answer_length, expected_answer

PROMPT = [11, 12, 13]


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


def test_an_answer_and_its_receipt(kit: Kit) -> None:
    body = kit.client.body(PROMPT)
    events = asyncio.run(kit.answer(body))
    receipt_event = events[-1]
    assert isinstance(receipt_event, ReceiptEvent)
    request: Request = Request.from_json(body["request"])
    ids = expected_answer(PROMPT, request.seed(), 700, 40)
    assert [(e.index, e.token_id) for e in events[:-1]] == list(enumerate(ids))
    receipt, transcript = receipt_event.stored.receipt, receipt_event.transcript
    assert list(transcript.output_ids) == ids and ids[-1] == 2
    assert receipt.finish_reason == FinishReason.STOP
    assert receipt.fee == 3 * INPUT_PRICE + len(ids) * OUTPUT_PRICE
    assert receipt.output_tokens == len(ids) == answer_length(PROMPT)
    assert receipt.transcript_root == transcript.root()
    assert receipt.recover(kit.node.served.log_domain, receipt_event.stored.signature) == kit.key.address
    assert receipt.request_hash == request_hash(body) == transcript.request_hash
    assert receipt.issued_at == kit.chain.state.time


def test_length_and_stop_ids(kit: Kit) -> None:
    short = kit.ask(prompt=PROMPT, max_tokens=2)
    assert (short.finish_reason, short.output_tokens) == (FinishReason.LENGTH, 2)
    ids = expected_answer(PROMPT, Request.from_json(kit.client.body(PROMPT)["request"]).seed(), 700, 40)
    stop = SamplingParams(700, stop_token_ids=(ids[2],))
    stopped = kit.ask(prompt=PROMPT, params=stop)
    assert (stopped.finish_reason, stopped.output_tokens) == (FinishReason.STOP, ids.index(ids[2]) + 1)
    endless = kit.ask(prompt=PROMPT, params=SamplingParams(700, ignore_eos=True))
    assert (endless.finish_reason, endless.output_tokens) == (FinishReason.LENGTH, 40)


def test_the_same_request_again_gets_the_same_receipt(kit: Kit) -> None:
    body = kit.client.body()
    first = asyncio.run(kit.answer(body))[-1]
    kit.restart()
    again = asyncio.run(kit.answer(body))[0]
    assert isinstance(again, Stored)
    assert (again.stored, again.transcript) == (first.stored, first.transcript)
    assert kit.engine.started == 1
    # Also when it could not be admitted any more.
    kit.chain.state.escrow.clear()
    kit.chain.state.time += 10**6
    assert isinstance(asyncio.run(kit.answer(body))[0], Stored)


def test_any_node_requests_and_receipts_name_this_node(kit: Kit) -> None:
    receipt = kit.ask(node=ZERO_ADDRESS)
    assert receipt.node == kit.key.address


def test_an_engine_that_dies_leaves_nothing(kit: Kit) -> None:
    body = kit.client.body()
    kit.engine.fail_after = 3
    events = asyncio.run(kit.answer(body))
    assert [type(e) for e in events] == [TokenEvent] * 3 + [ErrorEvent]
    assert isinstance(events[-1].error, Unavailable)
    assert kit.node.store.next_seq() == 0
    with pytest.raises(RequestRefused) as caught:
        kit.node.receipt(request_hash(body))
    assert caught.value.status == 404
    kit.engine.fail_after = None
    retried = asyncio.run(kit.answer(body))
    assert retried[:3] == events[:3]
    assert retried[-1].stored.receipt.seq == 0


def run_gated(kit: Kit, body: dict[str, Any], tokens: int, then: Any) -> list[Any]:
    """Start a request, let `tokens` tokens through, run `then(job)`, and return all events."""

    async def scenario() -> list[Any]:
        kit.engine.gate = asyncio.Semaphore(tokens)
        job = await kit.node.submit(parse_submission(body))
        assert isinstance(job, Job)
        events: list[Any] = [await job.events.get() for _ in range(tokens)]
        await then(job)
        while not isinstance(events[-1] if events else None, ReceiptEvent | ErrorEvent):
            events.append(await job.events.get())
        assert job.task is not None
        await job.task
        kit.engine.gate = None
        return events

    return asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_client_that_leaves_gets_a_receipt_for_what_there_was(kit: Kit) -> None:
    async def leave(job: Job) -> None:
        job.cancel()

    body = kit.client.body()
    events = run_gated(kit, body, 4, leave)
    receipt = events[-1].stored.receipt
    assert (receipt.finish_reason, receipt.output_tokens) == (FinishReason.CANCELLED, 4)
    assert receipt.fee == 3 * INPUT_PRICE + 4 * OUTPUT_PRICE
    assert kit.engine.closed == 1
    assert kit.node.receipt(request_hash(body)).receipt == receipt
    assert kit.node.executor.running() == 0


def test_leaving_before_the_first_token_leaves_nothing(kit: Kit) -> None:
    async def leave(job: Job) -> None:
        job.cancel()

    body = kit.client.body()
    events = run_gated(kit, body, 0, leave)
    assert isinstance(events[-1], ErrorEvent)
    assert kit.node.store.next_seq() == 0 and kit.engine.closed == 1
    assert kit.ask_body(body).seq == 0


def test_twice_at_the_same_time(kit: Kit) -> None:
    body = kit.client.body()

    async def again(job: Job) -> None:
        with pytest.raises(RequestRefused) as caught:
            await kit.node.submit(parse_submission(body))
        assert (caught.value.status, caught.value.code) == (409, "in_progress")
        with pytest.raises(RequestRefused) as fetched:
            kit.node.receipt(request_hash(body))
        assert fetched.value.status == 409
        assert kit.engine.gate is not None
        for _ in range(100):
            kit.engine.gate.release()

    run_gated(kit, body, 1, again)
    assert kit.engine.started == 1


def test_full_nodes_say_so(tmp_path: Path) -> None:
    kit = Kit(tmp_path, {"capacity": 1})

    async def another(job: Job) -> None:
        with pytest.raises(RequestRefused) as caught:
            await kit.node.submit(parse_submission(kit.client.body()))
        assert (caught.value.status, caught.value.code, caught.value.retry_after) == (429, "busy", 2)
        job.cancel()

    run_gated(kit, kit.client.body(), 1, another)
    assert kit.ask().seq == 1


def test_a_silent_engine_fails_the_request(tmp_path: Path) -> None:
    kit = Kit(tmp_path, {"stall_timeout": 0.05})

    async def wait(job: Job) -> None:
        pass

    events = run_gated(kit, kit.client.body(), 2, wait)
    assert isinstance(events[-1], ErrorEvent) and "nothing for" in str(events[-1].error)
    assert kit.node.store.next_seq() == 0 and kit.engine.closed == 1


def test_no_receipt_is_dated_after_the_deadline(kit: Kit) -> None:
    """The deadline comes while the answer runs: it ends there, as cancelled, and in time."""
    deadline = kit.chain.state.time + 100

    async def late(job: Job) -> None:
        kit.chain.state.time = deadline
        assert kit.engine.gate is not None
        kit.engine.gate.release()

    events = run_gated(kit, kit.client.body(deadline=deadline), 3, late)
    receipt = events[-1].stored.receipt
    assert receipt.finish_reason == FinishReason.CANCELLED
    assert receipt.issued_at <= deadline
    with pytest.raises(RequestRefused) as caught:
        kit.ask(deadline=deadline)
    assert caught.value.status == 408


def test_nothing_is_signed_after_the_deadline(kit: Kit) -> None:
    """The clock jumps between the last token and the signature."""
    deadline = kit.chain.state.time + 100

    async def late(job: Job) -> None:
        kit.chain.state.time = deadline + 1
        job.cancel()

    events = run_gated(kit, kit.client.body(deadline=deadline), 3, late)
    assert isinstance(events[-1], ErrorEvent) and events[-1].error.code == "deadline_passed"
    assert kit.node.store.next_seq() == 0


def test_draining_ends_with_receipts(kit: Kit) -> None:
    async def drain(job: Job) -> None:
        await kit.node.executor.drain(5)
        with pytest.raises(RequestRefused) as caught:
            await kit.node.submit(parse_submission(kit.client.body()))
        assert caught.value.code == "stopping"

    events = run_gated(kit, kit.client.body(), 2, drain)
    assert events[-1].stored.receipt.finish_reason == FinishReason.CANCELLED

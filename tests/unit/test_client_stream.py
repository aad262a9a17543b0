"""NodeClient against a scripted node on a real socket: what is paid, what is refused, what is recovered."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from poip_chain.control.checks import BadAnswer, SignedRequest
from poip_chain.control.client import Answer, KeySigner, NodeClient, NodeRefused, StreamBroken, Timeouts, Token
from poip_chain.control.ledger import Ledger
from poip_chain.errors import InsufficientFunds, Refused
from poip_chain.spec.objects import FinishReason, Request, SamplingParams
from poip_chain.spec.transcript import prompt_root
from poip_chain.spec.types import ZERO_ADDRESS, ZERO_HASH, Address
from tests.engines.scripted_chain import MODEL_ID, PROFILE, ScriptedChain
from tests.engines.scripted_node import Fault, ScriptedNode, change_receipt, change_transcript, private_key
from tests.engines.tiny_tokenizer import IM_END

PROMPT = (72, 105, 33)
PAYER = KeySigner(private_key("payer"))
HELLO = [*b"Hello, world.", IM_END]
FEE = 3 * 10 + len(HELLO) * 20

Use = Callable[[NodeClient], Awaitable[None]]


class World:
    """A chain, a node and a client with a ledger on disk; `use` runs a coroutine with a fresh client."""

    def __init__(self, chain: ScriptedChain, node: ScriptedNode, path: Path) -> None:
        self.chain, self.node, self.path = chain, node, path
        self.timeouts = Timeouts(connect=2, first_token=5, between_tokens=5, call=5)

    def ledger(self) -> Ledger:
        domain = self.chain.vault_domain
        return Ledger(self.path / "client.db", PAYER.address, domain, lambda voucher: PAYER.sign(voucher, domain))

    def use(self, work: Use, ledger: Ledger | None = None) -> None:
        own = ledger or self.ledger()

        async def run() -> None:
            async with httpx.AsyncClient(verify=False) as http:
                client = NodeClient(http, PAYER, self.chain, own, self.timeouts, clock=lambda: float(self.chain.now))
                try:
                    await work(client)
                finally:
                    await client.aclose()

        try:
            asyncio.run(run())
        finally:
            if ledger is None:
                own.close()

    def request(self, client: NodeClient, *, max_tokens: int = 32, node: Address = ZERO_ADDRESS) -> SignedRequest:
        params = SamplingParams(temperature_milli=700)
        request = Request(
            client=PAYER.address,
            node=node,
            model_id=MODEL_ID,
            profile_version=1,
            prompt_root=prompt_root(PROMPT),
            prompt_tokens=len(PROMPT),
            params_hash=params.params_hash(),
            max_tokens=max_tokens,
            input_price=10,
            output_price=20,
            client_seed=bytes(32),
            client_nonce=secrets.token_bytes(32),
            deadline=self.chain.now + 300,
        )
        return client.sign(request, params, PROMPT)

    async def ask(self, client: NodeClient, **options: int) -> tuple[list[int], Answer]:
        return await self.collect(client, self.request(client, **options))

    async def collect(self, client: NodeClient, signed: SignedRequest) -> tuple[list[int], Answer]:
        ids: list[int] = []
        async for item in client.stream(self.node.address, self.node.url, signed, PROFILE):
            if isinstance(item, Answer):
                return ids, item
            assert item.index == len(ids)
            ids.append(item.token_id)
        raise AssertionError("the stream ended without an answer")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    chain = ScriptedChain()
    with ScriptedNode(chain).running() as node:
        chain.fund(PAYER.address, node.address, 100_000)
        yield World(chain, node, tmp_path)


def test_an_honest_answer_is_checked_and_paid_exactly(world: World) -> None:
    async def work(client: NodeClient) -> None:
        ids, answer = await world.ask(client)
        assert ids == HELLO
        assert answer.receipt.fee == FEE
        await client.aclose()
        _, second = await world.ask(client, max_tokens=5)
        assert second.receipt.finish_reason == FinishReason.LENGTH
        await client.aclose()
        vouchers = world.node.vouchers
        assert [voucher.cumulative for voucher in vouchers] == [FEE, FEE + 30 + 100]
        assert [voucher.last_receipt_hash for voucher in vouchers] == [
            answer.receipt.struct_hash(),
            second.receipt.struct_hash(),
        ]
        account = client.ledger.account(world.node.address)
        assert (account.accepted, account.signed, account.open_max) == (FEE + 130, FEE + 130, 0)

    world.use(work)


def test_prompts_are_forgotten_once_settled(world: World) -> None:
    async def work(client: NodeClient) -> None:
        _, answer = await world.ask(client)
        stored = client.ledger.body(answer.signed.request_hash)
        assert stored is not None and stored.prompt_ids == () and stored.request == answer.signed.request

    world.use(work)


WRONG = {
    "fee": change_receipt(fee=lambda r: r.fee + 1, payer_cum=10**9, node_cum=10**9),
    "counts": change_receipt(output_tokens=99, fee=lambda r: r.fee + 85 * 20, payer_cum=10**9, node_cum=10**9),
    "request": change_receipt(request_hash=bytes(32)),
    "payer": change_receipt(payer=Address("0x9999999999999999999999999999999999999999")),
    "model": change_receipt(model_id=bytes(32)),
    "finish reason": change_receipt(finish_reason=3),
    "totals": change_receipt(payer_cum=0),
    "deadline": change_receipt(issued_at=2**40),
    "node": change_receipt(node=Address("0x9999999999999999999999999999999999999999")),
    "transcript root": change_receipt(transcript_root=bytes(32)),
    "transcript header": change_transcript(finish_reason=int(FinishReason.LENGTH)),
    "stream": change_transcript(output_ids=lambda t: (1, *t.output_ids[1:])),
    "transcript counts": change_transcript(fingerprints=lambda t: t.fingerprints[:-1]),
    "transcript prompt": change_transcript(prompt_ids=(1, 2, 3)),
    "fingerprint": change_transcript(fingerprints=lambda t: (t.fingerprints[0][::-1], *t.fingerprints[1:])),
    "seed": change_transcript(fingerprints=lambda t: (((200, 20000), *t.fingerprints[0][:7]), *t.fingerprints[1:])),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_not_paid_and_blocks_the_node(world: World, name: str) -> None:
    world.node.faults.append(Fault(change=WRONG[name]))

    async def work(client: NodeClient) -> None:
        with pytest.raises(BadAnswer) as caught:
            await world.ask(client)
        assert caught.value.name == name
        assert world.node.vouchers == []
        assert client.ledger.account(world.node.address).signed == 0
        (attempt,) = client.ledger.attempts("bad")
        assert name == "node" or attempt.receipt is not None, "a signed receipt is evidence: keep it"
        with pytest.raises(Refused, match="blocked"):
            await world.ask(client)

    world.use(work)


def test_a_receipt_by_another_key_is_refused(world: World) -> None:
    def by_another_key(draft) -> None:  # type: ignore[no-untyped-def]
        draft.sign_with = private_key("stranger")

    world.node.faults.append(Fault(change=by_another_key))

    async def work(client: NodeClient) -> None:
        with pytest.raises(BadAnswer, match="signed by"):
            await world.ask(client)
        assert world.node.vouchers == []

    world.use(work)


def test_a_second_receipt_that_charges_the_same_interval_is_refused(world: World) -> None:
    world.node.faults.extend([Fault(), Fault(change=change_receipt(payer_cum=FEE + 1))])

    async def work(client: NodeClient) -> None:
        await world.ask(client)
        with pytest.raises(BadAnswer) as caught:
            await world.ask(client)
        assert caught.value.name == "payer total"
        await client.aclose()
        assert [voucher.cumulative for voucher in world.node.vouchers] == [FEE]

    world.use(work)


GARBAGE = {
    "not json": b"event: token\ndata: {\n\n",
    "wrong index": b'event: token\ndata: {"i": 1, "id": 5}\n\n',
    "negative id": b'event: token\ndata: {"i": 0, "id": -5}\n\n',
    "huge id": b'event: token\ndata: {"i": 0, "id": 99999999999999999999999}\n\n',
    "outside the vocabulary": b'event: token\ndata: {"i": 0, "id": 300}\n\n',
    "bool id": b'event: token\ndata: {"i": 0, "id": true}\n\n',
    "float": b'event: token\ndata: {"i": 0, "id": 1e2}\n\n',
    "list": b"event: token\ndata: [1]\n\n",
    "unknown event": b"event: gift\ndata: {}\n\n",
    "not utf-8": b"event: token\ndata: \xff\xfe\n\n",
    "endless line": b"data: " + b"x" * (5 * 2**20),
    "deep nesting": b"event: token\ndata: " + b"[" * 200_000 + b"\n\n",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_malformed_event_breaks_the_stream_and_changes_nothing(world: World, name: str) -> None:
    world.node.faults.append(Fault(raw=GARBAGE[name], forget=True))

    async def work(client: NodeClient) -> None:
        with pytest.raises(StreamBroken):
            await world.ask(client)
        assert client.ledger.account(world.node.address).signed == 0
        assert [attempt.state for attempt in client.ledger.attempts("open")] == ["open"]

    world.use(work)


def test_refusals_owe_nothing_and_release_the_escrow(world: World) -> None:
    world.node.faults.append(Fault(refuse=(429, "busy")))

    async def work(client: NodeClient) -> None:
        signed = world.request(client)
        with pytest.raises(NodeRefused, match="busy"):
            await world.collect(client, signed)
        assert client.ledger.account(world.node.address).open_max == 0
        # Refused is not answered: the same signed request may be tried again.
        ids, _ = await world.collect(client, signed)
        assert ids == HELLO

    world.use(work)


def test_a_server_error_leaves_the_attempt_open(world: World) -> None:
    world.node.faults.append(Fault(refuse=(500, "internal_error")))

    async def work(client: NodeClient) -> None:
        with pytest.raises(StreamBroken):
            await world.ask(client)
        assert client.ledger.account(world.node.address).open_max > 0

    world.use(work)


def test_a_voucher_owed_when_the_stream_dies_is_given_later(world: World) -> None:
    world.node.faults.append(Fault(drop_receipt=True))

    async def first(client: NodeClient) -> None:
        with pytest.raises(StreamBroken):
            await world.ask(client)
        assert world.node.vouchers == []

    async def after_restart(client: NodeClient) -> None:
        assert await client.step(world.chain.profile) == []
        assert [voucher.cumulative for voucher in world.node.vouchers] == [FEE]
        assert await client.step(world.chain.profile) == []
        assert len(world.node.vouchers) == 1

    world.use(first)
    world.use(after_restart)


def test_vouchers_that_could_not_be_delivered_are_delivered_after_a_restart(world: World) -> None:
    ledger = world.ledger()

    async def first(client: NodeClient) -> None:
        signed = world.request(client)
        _, answer = await world.collect(client, signed)
        assert answer.state == "checked"

    async def no_delivery(self: NodeClient, *_: object, **__: object) -> int:
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NodeClient, "deliver_vouchers", no_delivery)
        world.use(first, ledger)
    ledger.close()
    assert world.node.vouchers == []

    async def later(client: NodeClient) -> None:
        await client.step(world.chain.profile)

    world.use(later)
    assert [voucher.cumulative for voucher in world.node.vouchers] == [FEE]


def test_cancelling_pays_for_what_was_produced(world: World) -> None:
    world.node.faults.append(Fault(silent_after=4))

    async def work(client: NodeClient) -> None:
        signed = world.request(client)
        stream = client.stream(world.node.address, world.node.url, signed, PROFILE)
        got = [await anext(stream) for _ in range(4)]
        assert all(isinstance(item, Token) for item in got)
        await stream.aclose()
        assert await asyncio.to_thread(world.node.cancelled.wait, 5)
        (attempt,) = client.ledger.attempts("open")
        answer = await client.recover(attempt, PROFILE, wait=5)
        assert answer is not None
        assert answer.receipt.finish_reason == FinishReason.CANCELLED
        assert answer.receipt.output_tokens == 4
        await client.aclose()
        (voucher,) = world.node.vouchers
        assert voucher.cumulative == 30 + 4 * 20
        assert voucher.last_receipt_hash == answer.receipt.struct_hash() != ZERO_HASH

    world.use(work)


def test_silence_is_bounded(world: World) -> None:
    world.timeouts = replace(world.timeouts, first_token=0.2, between_tokens=0.2)
    world.node.faults.extend([Fault(silent_after=0), Fault(silent_after=2)])

    async def work(client: NodeClient) -> None:
        for tokens in (0, 2):
            with pytest.raises(StreamBroken, match="silent") as caught:
                await world.ask(client)
            assert caught.value.tokens == tokens

    world.use(work)


def test_nothing_is_owed_where_no_receipt_came_by_the_deadline(world: World) -> None:
    world.node.faults.append(Fault(stop_after=2, forget=True))

    async def work(client: NodeClient) -> None:
        with pytest.raises(StreamBroken):
            await world.ask(client)
        await client.step(world.chain.profile)
        assert client.ledger.account(world.node.address).open_max > 0, "the node may still deliver"
        world.chain.now += 1000
        await client.step(world.chain.profile)
        assert client.ledger.account(world.node.address).open_max == 0
        assert [attempt.state for attempt in client.ledger.attempts("void")] == ["void"]

    world.use(work)


def test_two_nodes_hold_receipts_for_one_request_and_one_is_paid(world: World) -> None:
    with ScriptedNode(world.chain, name="other").running() as other:
        world.chain.fund(PAYER.address, other.address, 100_000)
        world.node.faults.append(Fault(drop_receipt=True))

        async def work(client: NodeClient) -> None:
            signed = world.request(client)
            with pytest.raises(StreamBroken):
                await world.collect(client, signed)
            await client.abandon(signed, world.node.address, "no receipt came")
            answers = [
                item
                async for item in client.stream(other.address, other.url, signed, PROFILE)
                if isinstance(item, Answer)
            ]
            assert len(answers) == 1
            await client.step(world.chain.profile)
            states = {attempt.node: attempt.state for attempt in client.ledger.of_request(signed.request_hash)}
            assert states == {world.node.address: "unpaid", other.address: "checked"}
            assert other.paid == FEE and world.node.vouchers == []
            # The next answer of the first node is paid, the one that nobody wanted still is not.
            await world.ask(client)
            await client.aclose()
            assert [voucher.cumulative for voucher in world.node.vouchers] == [FEE]

        world.use(work)


def test_one_escrow_is_promised_once(world: World) -> None:
    world.chain.fund(PAYER.address, world.node.address, 30 + 32 * 20)
    world.node.faults.append(Fault(silent_after=1))

    async def work(client: NodeClient) -> None:
        first = client.stream(world.node.address, world.node.url, world.request(client), PROFILE)
        await anext(first)
        with pytest.raises(InsufficientFunds, match="free"):
            await world.ask(client)
        assert len(world.node.received) == 1, "an uncovered request must not leave"
        world.node.release()
        async for _ in first:
            pass
        with pytest.raises(InsufficientFunds):
            await world.ask(client)

    world.use(work)


def test_a_prepaid_voucher_is_given_only_on_demand_and_only_up_to_the_most_it_can_cost(world: World) -> None:
    world.node.demand_voucher = True

    async def work(client: NodeClient) -> None:
        await world.ask(client)
        await client.aclose()
        prepaid, final = world.node.vouchers
        assert (prepaid.cumulative, prepaid.last_receipt_hash) == (30 + 32 * 20, ZERO_HASH)
        assert final.cumulative == FEE
        await world.ask(client)
        await client.aclose()
        assert world.node.paid == FEE + 30 + 32 * 20

    world.use(work)


def test_concurrent_answers_are_vouched_for_in_the_order_of_their_totals(world: World) -> None:
    async def work(client: NodeClient) -> None:
        await asyncio.gather(*(world.ask(client) for _ in range(8)))
        await client.aclose()
        assert [voucher.cumulative for voucher in world.node.vouchers] == [FEE * n for n in range(1, 9)]

    world.use(work)


def test_a_stored_receipt_is_replayed_with_its_tokens(world: World) -> None:
    world.node.faults.append(Fault(stop_after=3))

    async def work(client: NodeClient) -> None:
        with pytest.raises(StreamBroken):
            await world.ask(client)
        await client.step(world.chain.profile)
        await client.aclose()
        (voucher,) = world.node.vouchers
        assert voucher.cumulative == 30 + 3 * 20

    world.use(work)


def test_a_ledger_belongs_to_one_process_and_one_key(world: World) -> None:
    from poip_chain.errors import ConfigurationError

    ledger = world.ledger()
    with pytest.raises(ConfigurationError, match="in use"):
        world.ledger()
    ledger.close()
    other = private_key("someone else").public_key.to_checksum_address()
    with pytest.raises(ConfigurationError, match="belongs to payer"):
        Ledger(world.path / "client.db", Address(other), world.chain.vault_domain, lambda _: b"")
    world.ledger().close()


def test_a_node_that_refuses_connections_took_nothing(world: World) -> None:
    async def work(client: NodeClient) -> None:
        world.node.url = "http://127.0.0.1:9"
        with pytest.raises(NodeRefused, match="accepts no connection"):
            await world.ask(client)
        assert client.ledger.account(world.node.address).open_max == 0

    world.use(work)

"""The one owner of an account's nonces: every transaction of a key goes through its outbox.

An intent is stored under the caller's idempotency key, with its nonce and signed bytes, before anything is sent; so a
kill at any point loses nothing and sends nothing twice. `step()` moves every open transaction on: it sends it again
where the chain's memory lost it, raises its fees within a bound where it is stuck, and records how it ended. A
reorganisation that drops a mined transaction opens it again. Knows nothing of what the transactions mean.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

from eth_utils.crypto import keccak

from poip_chain.chain.keys import Key
from poip_chain.chain.outbox_store import (
    Attempt,
    OutboxStore,
    State,
    Transaction,
    TransactionReceipt,
    receipt_from_json_rpc,
)
from poip_chain.chain.rpc import Call, Chain
from poip_chain.chain.signing import FeePolicy, Fees, Preview, sign_transaction
from poip_chain.errors import InsufficientFunds, PoipError, Refused, TransactionFailed, Unavailable

__all__ = [
    "Attempt",
    "FeePolicy",
    "Outbox",
    "Preview",
    "State",
    "Transaction",
    "TransactionReceipt",
    "new_idempotency_key",
]

_ALREADY_THERE = ("already known", "already imported", "known transaction", "already in mempool", "alreadyknown")
_NONCE_USED = ("nonce too low", "nonce is too low", "invalid transaction nonce", "nonce has already been used")


def new_idempotency_key(prefix: str) -> str:
    """A key that is never used again, for what a person asks for once on the command line."""
    return f"{prefix}:{secrets.token_hex(8)}"


class Outbox:
    """The outbox of `key` on `chain`, kept in the SQLite file `path`. Safe to use from several threads.

    `finality_blocks`: how deep a transaction must lie before its outcome is no longer looked at again, and how deep a
    foreign use of a nonce must lie before a transaction is signed anew with another nonce.
    Raises Refused if another process has the outbox open, IntegrityError if the file belongs to another key or chain.
    """

    def __init__(
        self,
        chain: Chain,
        key: Key,
        path: Path,
        *,
        fees: FeePolicy | None = None,
        finality_blocks: int = 3,
        rebroadcast_after: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.chain = chain
        self.address = key.address
        self._key = key
        self._fees = fees or FeePolicy()
        self._finality = finality_blocks
        self._rebroadcast_after = rebroadcast_after
        self._clock = clock
        self._lock = threading.RLock()
        self._changed = threading.Event()
        self._broadcast_at: dict[str, float] = {}
        self._store = OutboxStore(path, key.address)
        try:
            genesis = chain.block(0).hash
            self._store.bind(key.address, chain.chain_id, genesis)
        except BaseException:
            self._store.close()
            raise

    def close(self) -> None:
        """Release the file to other processes. Nothing is lost by it."""
        with self._lock:
            self._store.close()

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # sending

    def preview(self, call: Call) -> Preview:
        """What `send` would do: simulates, estimates gas and prices it. Sends and stores nothing.

        Raises TransactionFailed with the contract's reason if it would revert.
        """
        self.chain.simulate(call, self.address)
        gas = self._fees.gas_limit(self.chain.estimate_gas(call, self.address))
        return Preview(call=call, sender=self.address, gas=gas, fees=self._fees.current(self.chain))

    def send(self, call: Call, idempotency_key: str, value: int = 0) -> str:
        """Simulate, store, sign and send a call once; the hash of its (latest) transaction.

        The same key again returns the stored transaction's hash and sends nothing new. `value` (wei of the chain's own
        coin) is added to the call's. Once the intent is stored this returns normally even if the endpoint has gone
        away: `step()` sends it later.

        Raises TransactionFailed if the simulation reverts, InsufficientFunds if the balance does not cover the most
        that it may cost, Unavailable if the chain cannot be asked (in all three cases nothing is stored), and Refused
        if the idempotency key was used for a different call.
        """
        if value:
            call = Call(call.to, call.data, call.description, call.value + value)
        with self._lock:
            known = self._store.find(idempotency_key)
            if known is not None:
                if (known.to, known.data, known.value) != (call.to, call.data, call.value):
                    raise Refused(
                        f"the idempotency key {idempotency_key!r} was used for another transaction "
                        f"({known.description})."
                    )
                if known.state is State.STOPPED:
                    return self._submit(call, idempotency_key, known)
                return known.hash
            return self._submit(call, idempotency_key, None)

    def _submit(self, call: Call, idempotency_key: str, renewed: Transaction | None) -> str:
        """Store and send. `renewed`: a lost transaction; its old bytes can never be mined, their nonce is taken."""
        open_transactions = [t for t in self._store.open_transactions() if t.state is State.OPEN]
        try:
            preview = self.preview(call)
        except TransactionFailed as error:
            if open_transactions:
                raise TransactionFailed(
                    error.message, hint=f"{len(open_transactions)} earlier transactions of this key are not mined yet."
                ) from error
            raise
        self._check_balance(preview, open_transactions)
        nonce = self._next_nonce()
        attempt = self._sign(call, nonce, preview.gas, preview.fees)
        if renewed is None:
            self._store.add(idempotency_key, call, nonce, preview.gas, attempt, self._clock())
        else:
            self._store.renew(renewed.id, nonce, preview.gas, attempt)
        transaction = self._store.get(idempotency_key)
        with contextlib.suppress(Unavailable):
            self._broadcast(transaction)
        return attempt.hash

    def _check_balance(self, preview: Preview, open_transactions: list[Transaction]) -> None:
        reserved = sum(t.value + t.gas * t.attempts[-1].max_fee for t in open_transactions)
        balance = self.chain.balance(self.address)
        if balance < reserved + preview.most:
            raise InsufficientFunds(
                f"{self.address} has {balance} wei for gas, and needs {preview.most} for {preview.call.description}"
                + (f" beside {reserved} for transactions under way." if reserved else "."),
                hint="Send the chain's own coin to this address.",
            )

    def _next_nonce(self) -> int:
        """The first nonce that neither the chain nor this outbox has given away."""
        on_chain = self.chain.transaction_count(self.address, "pending")
        highest = self._store.highest_nonce()
        return on_chain if highest is None else max(on_chain, highest + 1)

    def _sign(self, call: Call, nonce: int, gas: int, fees: Fees) -> Attempt:
        raw = sign_transaction(self._key, self.chain.chain_id, call, nonce, gas, fees)
        return Attempt("0x" + keccak(raw).hex(), raw, fees.max_fee, fees.tip, 0.0)

    def _broadcast(self, transaction: Transaction) -> None:
        """Hand the latest signed form to the endpoint. An endpoint that has it already, or has mined it, is fine."""
        attempt = transaction.attempts[-1]
        error = ""
        try:
            self.chain.send_raw(attempt.raw)
        except TransactionFailed as failure:
            text = failure.message.lower()
            # "Nonce too low" may mean that it is mined: the next step looks at the chain.
            if not any(word in text for word in (*_ALREADY_THERE, *_NONCE_USED)):
                error = failure.message
        self._broadcast_at[attempt.hash] = self._clock()
        self._store.sent(transaction.id, attempt.hash, self._clock(), error)

    # following up

    def step(self) -> int:
        """One round over all open transactions; how many are still open. Raises Unavailable if the chain is away."""
        with self._lock:
            try:
                head = self.chain.block("latest")
                mined = self.chain.transaction_count(self.address, "latest")
                for transaction in self._store.unsettled():
                    self._follow(transaction, head.number, mined)
                return len(self._store.open_transactions())
            finally:
                self._changed.set()

    def _follow(self, transaction: Transaction, head: int, mined_count: int) -> None:
        if transaction.state is State.LOST:
            self._renew(transaction)
            return
        receipt = self._receipt(transaction)
        if receipt is not None:
            settled = head - receipt.block_number + 1 > self._finality
            if transaction.receipt != receipt:
                reason = "" if receipt.status else self._reason(transaction, receipt)
                self._store.mined(transaction.id, receipt, reason, settled)
            elif settled:
                self._store.settle(transaction.id)
            return
        if transaction.state in (State.MINED, State.REVERTED):
            # A reorganisation dropped it.
            self._store.reopen(transaction.id)
            transaction = self._store.get(transaction.idempotency_key)
        if transaction.nonce >= mined_count:
            self._push(transaction)
        elif self._used_deep(transaction.nonce, head) and self._receipt(transaction) is None:
            # The receipt is asked for once more: it may have appeared between the first question and the count.
            self._store.fail(
                transaction.id, State.LOST, "its nonce was used by a transaction that this outbox did not send"
            )
            self._renew(self._store.get(transaction.idempotency_key))

    def _used_deep(self, nonce: int, head: int) -> bool:
        """Whether the nonce was used so long ago that no reorganisation gives it back."""
        return head >= self._finality and self.chain.transaction_count(self.address, head - self._finality) > nonce

    def _renew(self, lost: Transaction) -> None:
        """Sign a lost transaction anew, unless by now it would revert."""
        try:
            self._submit(lost.call, lost.idempotency_key, lost)
        except TransactionFailed as error:
            self._store.fail(lost.id, State.STOPPED, f"{lost.error}, and now {error.message}")
        except InsufficientFunds as error:
            self._store.fail(lost.id, State.LOST, error.message)

    def _push(self, transaction: Transaction) -> None:
        latest = transaction.attempts[-1]
        waited = self._clock() - latest.sent_at
        if latest.sent_at and waited >= self._fees.bump_after and len(transaction.attempts) <= self._fees.max_bumps:
            fees = self._fees.bumped(Fees(latest.max_fee, latest.tip), self._fees.current(self.chain))
            if fees is not None:
                replacement = self._sign(transaction.call, transaction.nonce, transaction.gas, fees)
                self._store.add_attempt(transaction.id, replacement)
                self._broadcast(self._store.get(transaction.idempotency_key))
                return
        now = self._clock()
        if not latest.sent_at or now - self._broadcast_at.get(latest.hash, 0.0) >= self._rebroadcast_after:
            self._broadcast(transaction)

    def _receipt(self, transaction: Transaction) -> TransactionReceipt | None:
        for attempt in reversed(transaction.attempts):
            found = self.chain.transaction_receipt(attempt.hash)
            if found is not None:
                return receipt_from_json_rpc(found)
        return None

    def _reason(self, transaction: Transaction, receipt: TransactionReceipt) -> str:
        """Why a mined transaction reverted, by running it again on the block before."""
        try:
            self.chain.simulate(transaction.call, self.address, block=receipt.block_number - 1)
        except PoipError as error:
            return error.message
        return "no reason given"

    def wait(self, idempotency_key: str, timeout: float = 60.0) -> TransactionReceipt:
        """Wait until the transaction is mined (not necessarily final).

        Raises TransactionFailed if it reverted or was lost for good, Unavailable after `timeout` seconds, NotFound for
        an unknown key.
        """
        deadline = time.monotonic() + timeout
        trouble: PoipError | None = None
        while True:
            try:
                self.step()
                trouble = None
            except Unavailable as error:
                trouble = error
            transaction = self.status(idempotency_key)
            if transaction.state is State.MINED and transaction.receipt is not None:
                return transaction.receipt
            if transaction.state in (State.REVERTED, State.STOPPED):
                raise TransactionFailed(f"{transaction.description} failed: {transaction.error}.")
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise trouble or Unavailable(
                    f"{transaction.description} ({transaction.hash}) is not mined after {timeout:.0f} s."
                    + (f" The last refusal was: {transaction.error}." if transaction.error else ""),
                    hint="It is stored and goes on; ask again with the same idempotency key.",
                )
            self._changed.clear()
            # Another thread's step may have news before this one asks again.
            self._changed.wait(min(0.2, remaining))

    def execute(self, call: Call, idempotency_key: str, timeout: float = 60.0) -> TransactionReceipt:
        """`send` and `wait`."""
        self.send(call, idempotency_key)
        return self.wait(idempotency_key, timeout)

    def status(self, idempotency_key: str) -> Transaction:
        """What is known of a transaction, without asking the chain. Raises NotFound."""
        with self._lock:
            return self._store.get(idempotency_key)

    def known(self, idempotency_key: str) -> bool:
        """Whether an intent is stored under the key."""
        with self._lock:
            return self._store.find(idempotency_key) is not None

    def transactions(self, limit: int = 100) -> list[Transaction]:
        """The newest transactions, newest first."""
        with self._lock:
            return self._store.newest(limit)

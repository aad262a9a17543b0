"""Ask the network without a gateway: a user who trusts nobody signs for himself.

One `DirectClient` per key and data directory. It chooses a node as the gateway does, streams the text, checks and pays.
Used by `poip request`; knows no OpenAI API.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from poip_chain.chain.endpoints import node_transport
from poip_chain.control.checks import end_ids
from poip_chain.control.client import Answer, KeySigner, NodeClient, Timeouts
from poip_chain.control.ledger import Ledger
from poip_chain.control.nodes import Choice, Need, NodeDirectory
from poip_chain.control.view import ChainView
from poip_chain.errors import InvalidInput, PoipError
from poip_chain.service.engine.tokenizer import Tokenizer
from poip_chain.spec.objects import Request, SamplingParams, Voucher
from poip_chain.spec.transcript import prompt_root
from poip_chain.spec.types import Address

LIFETIME_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. `node` None: any; `client_seed` None: random."""

    model_id: bytes
    profile_version: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    node: Address | None = None
    client_seed: bytes | None = None


class DirectClient:
    """See the module's docstring. Open it with `DirectClient.open`."""

    def __init__(self, view: ChainView, client: NodeClient, directory: NodeDirectory) -> None:
        self._view, self.client, self.directory = view, client, directory

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        view: ChainView,
        signer: KeySigner,
        path: Path,
        *,
        private_endpoints: bool = True,
        timeouts: Timeouts | None = None,
    ) -> AsyncIterator[DirectClient]:
        """A client whose ledger is the file `path`. Raises ConfigurationError if another process uses it."""

        def sign(voucher: Voucher) -> bytes:
            return signer.sign(voucher, view.vault_domain)

        ledger = Ledger(path, signer.address, view.vault_domain, sign)
        try:
            transport = node_transport(private_endpoints)
            async with httpx.AsyncClient(transport=transport, follow_redirects=False, trust_env=False) as http:
                client = NodeClient(http, signer, view, ledger, timeouts or Timeouts())
                yield cls(view, client, NodeDirectory(view, http, private_endpoints))
                await client.aclose()
        finally:
            ledger.close()

    async def choose(self, question: Question) -> Choice:
        """The node that would be asked, and why the others not. Raises NoNode."""
        await self.directory.refresh()
        nodes = [standing.node.address for standing in self.directory.standings()]
        free, barred = await asyncio.to_thread(self._escrow, nodes)
        if question.node is not None:
            barred.update({node: "another node was asked for" for node in nodes if node != question.node})
        need = Need(question.model_id, question.profile_version, len(question.prompt_ids), question.max_tokens)
        return self.directory.choose(need, barred=barred, free_escrow=free)

    def _escrow(self, nodes: list[Address]) -> tuple[dict[Address, int], dict[Address, str]]:
        free, barred = {}, {}
        for node in nodes:
            account, escrow = self.client.ledger.account(node), self._view.escrow(self.client.signer.address, node)
            free[node] = escrow.available - account.committed(escrow.settled)
            if account.blocked:
                barred[node] = f"blocked after a wrong answer: {account.blocked}"
        return free, barred

    async def ask(
        self, question: Question, choice: Choice, tokenizer: Tokenizer, show: Callable[[str], None]
    ) -> Answer:
        """Sign the question, stream the answer's text to `show`, check and pay. Raises PoipError."""
        profile = await asyncio.to_thread(self._view.profile, question.model_id, question.profile_version)
        if len(question.prompt_ids) + question.max_tokens > profile.max_context:
            raise InvalidInput(
                f"prompt and answer of {len(question.prompt_ids)} + {question.max_tokens} tokens exceed the context of "
                f"{profile.max_context}."
            )
        now = await asyncio.to_thread(self._view.timestamp)
        request = Request(
            client=self.client.signer.address,
            node=choice.node,
            model_id=question.model_id,
            profile_version=question.profile_version,
            prompt_root=prompt_root(question.prompt_ids),
            prompt_tokens=len(question.prompt_ids),
            params_hash=question.params.params_hash(),
            max_tokens=question.max_tokens,
            input_price=choice.offer.input_price,
            output_price=choice.offer.output_price,
            client_seed=question.client_seed or secrets.token_bytes(32),
            client_nonce=secrets.token_bytes(32),
            deadline=max(now, int(self.client.clock())) + LIFETIME_SECONDS,
        )
        signed = self.client.sign(request, question.params, question.prompt_ids)
        detokenizer, ends = tokenizer.detokenizer(), end_ids(question.params, profile)
        async with aclosing(self.client.stream(choice.node, choice.url, signed, profile)) as stream:
            async for item in stream:
                if isinstance(item, Answer):
                    show(detokenizer.finish())
                    return item
                if item.token_id not in ends:
                    show(detokenizer.push(item.token_id))
        raise PoipError("the node's stream ended without an answer.")

    async def settle(self) -> list[str]:
        """Settle what earlier streams left open; what did not work. Raises Unavailable without a chain."""
        await self.directory.refresh()
        return await self.client.step(self._view.profile, self.directory.url)

"""Gas of a batch: what `commit` and `finalize` cost as whole transactions, with the real contracts on the devnet.

The figures are gas used by signed transactions: intrinsic gas, calldata at its price or the EIP-7623 floor, refunds.
The node is in its daily state: it has committed before, and an older batch is still pending while this one is committed
and finalised alone. `first_*` are those of a node's very first batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eth_abi.abi import encode
from eth_account import Account
from eth_hash.auto import keccak
from eth_keys.datatypes import PrivateKey
from eth_utils.abi import function_abi_to_4byte_selector
from eth_utils.address import to_checksum_address

from poip_chain.chain.artifacts import artifact
from poip_chain.chain.devnet.chain import Devnet
from poip_chain.chain.devnet.config import DevnetConfig
from poip_chain.economic.parameters import PARAMETERS
from poip_chain.spec.eip712 import Domain
from poip_chain.spec.merkle import merkle_root
from poip_chain.spec.objects import Batch, ModelConfig, ModelSpec, Profile, ProofOfPossession, ThresholdRow
from poip_chain.spec.types import Address

POIP = 10**18
GAS_LIMIT = 16_000_000
FEE_PER_RECEIPT = 15 * 10**14
LOCATOR = "https://node-1.example.org/v1/batches"
BATCH_EVENT = keccak(
    b"BatchCommitted(uint64,address,(uint64,address,bytes32,uint32,bytes32,uint64,uint32,uint192,uint192,uint256,"
    b"uint32,uint32,uint64,uint64,uint64),string)"
)


@dataclass(frozen=True)
class _Contract:
    """A deployed contract: calls are encoded by its ABI."""

    address: bytes
    abi: list[dict[str, Any]]

    def encode(self, function: str, *arguments: Any) -> bytes:
        """Calldata of a call."""
        (entry,) = (e for e in self.abi if e.get("name") == function and len(e["inputs"]) == len(arguments))
        selector: bytes = function_abi_to_4byte_selector(entry)  # type: ignore[arg-type]
        return selector + encode([_type_of(i) for i in entry["inputs"]], list(arguments))


class _Bench:
    """A chain with the contracts that a batch touches, one registered node, and its books."""

    def __init__(self) -> None:
        self.chain = Devnet(DevnetConfig(block_time=None, automine=True))
        keys = [PrivateKey(bytes(account.key)) for account in self.chain.accounts[:3]]
        self.owner, self.node, self.peer = keys
        self.seq = 0
        token = self._deploy("PoipToken", self._address(self.owner), 10**9 * POIP, 10**10 * POIP)
        parameters = self._deploy("Parameters", [p.as_tuple() for p in PARAMETERS])
        models = self._deploy("ModelRegistry")
        self.registry = self._deploy("NodeRegistry", token.address, parameters.address, models.address)
        self.log = self._deploy("CommitmentLog", self.registry.address, models.address, parameters.address)
        self._send(self.owner, self.registry, "initialize", self.log.address)
        self._send(self.owner, self.registry, "seal")
        self._send(self.owner, self.log, "seal")
        self.model_id = self._add_model(models)
        self._register()
        self._send(self.owner, token, "approve", self.registry.address, 10**6 * POIP)
        self._send(self.owner, self.registry, "stake", self._address(self.node), 10**6 * POIP)

    def commit(self, count: int) -> tuple[Batch, int]:
        """Commit to `count` receipts; the batch and the gas used."""
        root = merkle_root([keccak(i.to_bytes(8, "big")) for i in range(self.seq, self.seq + count)])
        arguments = (self.model_id, 1, root, self.seq, count, count * FEE_PER_RECEIPT, LOCATOR)
        gas, logs = self._send(self.node, self.log, "commit", *arguments)
        self.seq += count
        (data,) = (log.data for log in logs if log.topics[0] == int.from_bytes(BATCH_EVENT, "big"))
        words = [data[i : i + 32] for i in range(0, 32 * len(Batch.ABI), 32)]
        return Batch(*(_field(t, w) for t, w in zip(Batch.ABI.values(), words, strict=True))), gas

    def finalize(self, batch: Batch) -> int:
        """Let the window pass and make the batch final; the gas used."""
        self.chain.increase_time(max(0, batch.window_end - self.chain.now()) + 1)
        return self._send(self.node, self.log, "finalize", [batch.values()])[0]

    def _deploy(self, name: str, *arguments: Any) -> _Contract:
        made = artifact(name)
        constructor: list[dict[str, Any]] = next((e["inputs"] for e in made.abi if e["type"] == "constructor"), [])
        nonce = self.chain.nonce(self.owner.public_key.to_canonical_address())
        self._transact(self.owner, b"", made.bytecode + encode([_type_of(i) for i in constructor], list(arguments)))
        sender = self.owner.public_key.to_canonical_address()
        return _Contract(keccak(_rlp_of(sender, nonce))[12:], made.abi)

    def _send(self, key: PrivateKey, contract: _Contract, function: str, *arguments: Any) -> tuple[int, Any]:
        return self._transact(key, contract.address, contract.encode(function, *arguments))

    def _transact(self, key: PrivateKey, to: bytes, data: bytes) -> tuple[int, Any]:
        """Send one transaction in a block of its own; its gas used and logs."""
        transaction: dict[str, Any] = {
            "nonce": self.chain.nonce(key.public_key.to_canonical_address()),
            "gas": GAS_LIMIT,
            "maxFeePerGas": 10**11,
            "maxPriorityFeePerGas": 10**9,
            "value": 0,
            "data": data,
            "chainId": self.chain.config.chain_id,
        }
        if to:
            transaction["to"] = to_checksum_address(to)
        signed = Account.from_key(key.to_bytes()).sign_transaction(transaction)
        submitted = self.chain.submit(bytes(signed.raw_transaction))
        found = self.chain.find_transaction(submitted.hash)
        assert found is not None, "the transaction was not mined"
        receipt = found[0].receipts[found[1]]
        assert receipt.state_root == b"\x01", "the transaction failed"
        return int(receipt.gas_used), receipt.logs

    def _add_model(self, models: _Contract) -> bytes:
        config = ModelConfig(576, 1536, 30, 9, 3, 64, 49152, 8192, 10**7, 10**5, bytes(32), True, False, False, False)
        spec = ModelSpec(keccak(b"weights"), keccak(b"tokenizer"), keccak(b"template"), config.config_hash())
        table = (ThresholdRow(32, 1000),)
        profile = Profile(4096, 49152, "bfloat16", "bfloat16", 100, 2000, (0, 2), 1, 2, table, 1, 1, table)
        self._send(self.owner, models, "register_model", spec.values(), config.values(), "")
        self._send(self.owner, models, "add_profile", spec.model_id(), profile.values())
        return spec.model_id()

    def _register(self) -> None:
        operator, deadline = self._address(self.owner), 2**40
        domain = Domain(self.chain.config.chain_id, Address(to_checksum_address(self.registry.address)))
        proofs = [
            ProofOfPossession(operator, self._address(key), role, deadline).sign(domain, key)
            for key, role in ((self.node, ProofOfPossession.NODE_KEY), (self.peer, ProofOfPossession.PEER_KEY))
        ]
        node, peer = self._address(self.node), self._address(self.peer)
        endpoint = "https://node-1.example.org"
        self._send(self.owner, self.registry, "register", node, operator, peer, endpoint, deadline, *proofs)

    @staticmethod
    def _address(key: PrivateKey) -> Address:
        return Address(key.public_key.to_checksum_address())


def batch_gas(count: int) -> dict[str, int]:
    """Gas of committing and finalising a batch of `count` receipts: commit, finalize, first_commit, first_finalize.

    count is 1 to 65536. Each call starts from a new chain; the chain's block times do not matter.
    """
    bench = _Bench()
    first, first_commit = bench.commit(count)
    pending, _ = bench.commit(count)
    first_finalize = bench.finalize(first)
    batch, commit = bench.commit(count)
    finalize = bench.finalize(pending)
    assert batch.node_cum == 3 * count * FEE_PER_RECEIPT
    return {"commit": commit, "finalize": finalize, "first_commit": first_commit, "first_finalize": first_finalize}


def _type_of(entry: dict[str, Any]) -> str:
    """The ABI type of an input, tuples written out."""
    kind = str(entry["type"])
    if not kind.startswith("tuple"):
        return kind
    return f"({','.join(_type_of(c) for c in entry['components'])}){kind.removeprefix('tuple')}"


def _field(abi_type: str, word: bytes) -> Any:
    """One static value out of its ABI word."""
    if abi_type == "bytes32":
        return word
    if abi_type == "address":
        return to_checksum_address(word[12:])
    return int.from_bytes(word, "big")


def _rlp_of(sender: bytes, nonce: int) -> bytes:
    """What the address of a created contract is the hash of."""
    number = nonce.to_bytes((nonce.bit_length() + 7) // 8, "big")
    tail = number if 0 < nonce < 128 else bytes([0x80 + len(number)]) + number
    body = b"\x94" + sender + tail
    return bytes([0xC0 + len(body)]) + body


if __name__ == "__main__":
    for size in (1, 100, 1000):
        print(size, batch_gas(size))

"""One Ethereum JSON-RPC endpoint, read synchronously, with errors in this library's own terms.

Nothing here signs or knows the protocol. A `Chain` may be shared by the threads of a process.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import httpx
import rlp
from eth_hash.auto import keccak
from hexbytes import HexBytes
from web3 import Web3
from web3.contract import Contract
from web3.exceptions import (
    BadFunctionCallOutput,
    BadResponseFormat,
    BlockNotFound,
    ContractLogicError,
    MethodUnavailable,
    TransactionNotFound,
    Web3RPCError,
    Web3ValidationError,
)
from web3.middleware import AttributeDictMiddleware
from web3.providers import HTTPProvider
from web3.types import BlockData, BlockIdentifier, FilterParams, LogReceipt, RPCEndpoint, RPCResponse, TxParams

from poip_chain.errors import ConfigurationError, IntegrityError, InvalidInput, NotFound, TransactionFailed, Unavailable
from poip_chain.spec.strict_json import parse_json_object
from poip_chain.spec.types import Address, Hash32

if TYPE_CHECKING:
    from web3.contract.contract import ContractFunction

MAX_RESPONSE_BYTES = 64 * 1024 * 1024
"""An answer that is larger is refused before it is parsed."""

_HEADER_FIELDS: tuple[tuple[str, bool], ...] = (
    ("parentHash", False),
    ("sha3Uncles", False),
    ("miner", False),
    ("stateRoot", False),
    ("transactionsRoot", False),
    ("receiptsRoot", False),
    ("logsBloom", False),
    ("difficulty", True),
    ("number", True),
    ("gasLimit", True),
    ("gasUsed", True),
    ("timestamp", True),
    ("extraData", False),
    ("mixHash", False),
    ("nonce", False),
    # Present since London, Shanghai, Cancun (three) and Prague; a header ends where its fork ends.
    ("baseFeePerGas", True),
    ("withdrawalsRoot", False),
    ("blobGasUsed", True),
    ("excessBlobGas", True),
    ("parentBeaconBlockRoot", False),
    ("requestsHash", False),
)
_MANDATORY_HEADER_FIELDS = 15


@dataclass(frozen=True, slots=True)
class Call:
    """A transaction's content without nonce, fees or signature. `to` None creates a contract; value in wei of the
    chain's own coin."""

    to: Address | None
    data: bytes
    description: str
    value: int = 0

    def __post_init__(self) -> None:
        if self.value < 0:
            raise ValueError("the value of a call is not negative.")


@dataclass(frozen=True, slots=True)
class Block:
    """What the library reads of a block. timestamp in Unix seconds, base_fee in wei per gas."""

    number: int
    hash: Hash32
    parent_hash: Hash32
    timestamp: int
    mix_hash: Hash32
    base_fee: int


class Chain:
    """A JSON-RPC endpoint over HTTP. `timeout` in seconds bounds every single call.

    Methods raise Unavailable if the endpoint cannot be reached or answers nonsense, and TransactionFailed (with the
    contract's reason) for a revert.
    """

    def __init__(self, url: str, timeout: float = 10.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigurationError(f"the RPC address must start with http:// or https://, not {url!r}.")
        self.url = url
        self._state: BlockIdentifier = "latest"
        self._provider = _BoundedProvider(url, timeout)
        # Web3's other default layers look up ENS names and ask for the chain id again with every call.
        self.w3 = Web3(self._provider, middleware=[(AttributeDictMiddleware, "attrdict")], ens=cast(Any, None))

    def at(self, number: int) -> Chain:
        """This chain with its views pinned to the state after block `number`: what they answer belongs together, however
        the chain goes on. Connections are shared."""
        pinned = copy(self)
        pinned._state = number
        return pinned

    def close(self) -> None:
        """Close the connections. The object opens new ones if it is used again."""
        self._provider.close()

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def chain_id(self) -> int:
        """EIP-155 chain id; asked once."""
        with self.errors():
            return int(self.w3.eth.chain_id)

    def block_number(self) -> int:
        """Number of the newest block."""
        with self.errors():
            return int(self.w3.eth.block_number)

    def timestamp(self) -> int:
        """Chain time: the timestamp of the newest block, Unix seconds."""
        return self.block("latest").timestamp

    def block(self, number: BlockIdentifier = "latest") -> Block:
        """A block by number, hash or tag. Raises NotFound if there is none (yet, or any more)."""
        block = self._block(number)
        return Block(
            number=int(block["number"]),
            hash=Hash32(bytes(block["hash"])),
            parent_hash=Hash32(bytes(block["parentHash"])),
            timestamp=int(block["timestamp"]),
            mix_hash=Hash32(bytes(block["mixHash"])),
            base_fee=int(block.get("baseFeePerGas", 0)),
        )

    def _block(self, number: BlockIdentifier) -> BlockData:
        with self.errors():
            try:
                return self.w3.eth.get_block(number)
            except BlockNotFound as error:
                raise NotFound(f"the chain has no block {number!r}.") from error

    def raw_header(self, number: int) -> bytes:
        """The RLP of a block's header, rebuilt from its JSON form and checked against the block's hash.

        Raises NotFound, or IntegrityError if the fields do not hash to the hash that the endpoint gave.
        """
        block = cast("dict[str, Any]", self._block(number))
        fields: list[bytes | int] = []
        for name, is_integer in _HEADER_FIELDS:
            if name not in block or block[name] is None:
                if len(fields) < _MANDATORY_HEADER_FIELDS:
                    raise IntegrityError(f"block {number} from {self.url} lacks the header field {name}.")
                break
            fields.append(int(block[name]) if is_integer else bytes(HexBytes(block[name])))
        encoded = cast(bytes, rlp.encode(fields))
        if keccak(encoded) != bytes(block["hash"]):
            raise IntegrityError(
                f"the header of block {number} from {self.url} does not hash to its block hash.",
                hint="Use another RPC endpoint.",
            )
        return encoded

    def code(self, address: Address) -> bytes:
        """The runtime code at an address, empty if it is no contract."""
        with self.errors():
            return bytes(self.w3.eth.get_code(cast(Any, address)))

    def balance(self, address: Address) -> int:
        """Balance of the chain's own coin (it pays for gas), wei."""
        with self.errors():
            return int(self.w3.eth.get_balance(cast(Any, address)))

    def transaction_count(self, address: Address, block: BlockIdentifier = "latest") -> int:
        """The number of transactions that an account has had mined (or, with 'pending', also queued)."""
        with self.errors():
            return int(self.w3.eth.get_transaction_count(cast(Any, address), block))

    def contract(self, name: str, address: Address) -> Contract:
        """One of our contracts at an address; its ABI is compiled from (or cached for) contracts/."""
        from poip_chain.chain.artifacts import artifact

        return self.contract_at(artifact(name).abi, address)

    def contract_at(self, abi: list[dict[str, Any]], address: Address) -> Contract:
        """A contract with any ABI."""
        return cast(Contract, self.w3.eth.contract(address=cast(Any, address), abi=abi))

    def read(
        self, function: ContractFunction, *, sender: Address | None = None, block: BlockIdentifier | None = None
    ) -> Any:
        """The result of a view function. Raises TransactionFailed with the reason if it reverts."""
        parameters: TxParams = {"from": cast(Any, sender)} if sender else {}
        with self.errors():
            return function.call(parameters, block_identifier=self._state if block is None else block)

    def simulate(self, call: Call, sender: Address, *, block: BlockIdentifier = "latest") -> bytes:
        """Run a call without sending it; the returned data. Raises TransactionFailed if it reverts."""
        with self.errors():
            return bytes(self.w3.eth.call(self.parameters(call, sender), block))

    def estimate_gas(self, call: Call, sender: Address) -> int:
        """The gas that a call needs. Raises TransactionFailed if it reverts."""
        with self.errors():
            return int(self.w3.eth.estimate_gas(self.parameters(call, sender)))

    @staticmethod
    def parameters(call: Call, sender: Address) -> TxParams:
        """A call in JSON-RPC's form."""
        parameters: dict[str, Any] = {"from": sender, "data": HexBytes(call.data), "value": call.value}
        if call.to is not None:
            parameters["to"] = call.to
        return cast(TxParams, parameters)

    def logs(self, parameters: FilterParams) -> list[LogReceipt]:
        """eth_getLogs."""
        with self.errors():
            return list(self.w3.eth.get_logs(parameters))

    def transaction_receipt(self, transaction_hash: str) -> dict[str, Any] | None:
        """The receipt of a mined transaction, or None while there is none."""
        with self.errors():
            try:
                return dict(self.w3.eth.get_transaction_receipt(cast(Any, transaction_hash)))
            except TransactionNotFound:
                return None

    def knows_transaction(self, transaction_hash: str) -> bool:
        """Whether the endpoint has the transaction, mined or waiting."""
        with self.errors():
            try:
                self.w3.eth.get_transaction(cast(Any, transaction_hash))
            except TransactionNotFound:
                return False
            return True

    def send_raw(self, raw: bytes) -> str:
        """Hand a signed transaction over; its hash. Raises TransactionFailed if the endpoint refuses it."""
        with self.errors():
            return self.w3.eth.send_raw_transaction(raw).to_0x_hex()

    def tip(self) -> int:
        """The endpoint's suggestion for the priority fee, wei per gas."""
        with self.errors():
            try:
                return int(self.w3.eth.max_priority_fee)
            except MethodUnavailable:
                return 10**9

    def request(self, method: str, *parameters: Any) -> Any:
        """Any JSON-RPC method; its raw result."""
        with self.errors():
            return self.w3.manager.request_blocking(cast(RPCEndpoint, method), list(parameters))

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn web3's exceptions into ours inside the block."""
        try:
            yield
        except ContractLogicError as error:
            raise TransactionFailed(f"the contract refused: {revert_reason(error)}.") from error
        except BadFunctionCallOutput as error:
            raise TransactionFailed(
                "the address holds no such contract.",
                hint="Check that the deployment file belongs to this chain.",
            ) from error
        except Web3RPCError as error:
            if error.rpc_response is None:
                raise Unavailable(f"the RPC endpoint {self.url} gave no usable answer: {error}.") from error
            raise TransactionFailed(_rpc_message(error)) from error
        except (BadResponseFormat, Web3ValidationError) as error:
            raise Unavailable(f"the RPC endpoint {self.url} gave no usable answer: {error}.") from error


def revert_reason(error: ContractLogicError) -> str:
    """The reason that a contract gave, without web3's prefix."""
    text = str(error.message or error)
    text = re.sub(r"^(execution reverted:? ?|reverted:? ?)+", "", text).strip(" .")
    if not text or text == "no data":
        data = error.data
        return (
            f"no reason given (data {data})" if isinstance(data, str) and data not in ("", "0x") else "no reason given"
        )
    return text


def _rpc_message(error: Web3RPCError) -> str:
    response = cast("dict[str, Any]", error.rpc_response)
    body = response.get("error")
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])[:500]
    return str(body)[:500]


class _BoundedProvider(HTTPProvider):
    """web3's HTTP provider over one thread-safe client, with a bound on the answer and no silent retries."""

    def __init__(self, url: str, timeout: float) -> None:
        super().__init__(url, exception_retry_configuration=None)
        self._url = url
        self._timeout = timeout
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """One call. Raises Unavailable if the endpoint is away or what it sends is no answer."""
        return cast(RPCResponse, self._post(self.encode_rpc_request(method, params)))

    def _post(self, request_data: bytes) -> dict[str, Any]:
        with self._lock:
            if self._client is None:
                # A proxy that the environment names is for the outside world, not for a node on this machine.
                self._client = httpx.Client(timeout=self._timeout, trust_env=self._url.startswith("https://"))
            client = self._client
        try:
            with client.stream(
                "POST", self._url, content=request_data, headers={"content-type": "application/json"}
            ) as response:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > MAX_RESPONSE_BYTES:
                        raise Unavailable(
                            f"the RPC endpoint {self._url} answered more than {MAX_RESPONSE_BYTES} bytes."
                        )
        except (httpx.HTTPError, RuntimeError) as error:
            raise Unavailable(
                f"the RPC endpoint {self._url} does not answer ({type(error).__name__}).",
                hint="Is the chain running? `poip devnet` starts a local one; --rpc names another.",
            ) from error
        try:
            # Parsed here and once: web3's own parser takes any depth, which ends the process.
            return parse_json_object(bytes(body))
        except InvalidInput as error:
            raise Unavailable(f"{self._url} (HTTP {response.status_code}) does not speak JSON-RPC: {error}") from error

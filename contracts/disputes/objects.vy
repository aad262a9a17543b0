# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title The protocol's objects: structs, struct hashes, EIP-712 digests and signers
@custom:contract-name objects
@license AGPL-3.0-only
@notice The second writing of poip_chain/spec/{objects,eip712,transcript}.py, field for field. Every contract that
        hashes an object or recovers a signer imports this module. It holds no state and knows no contract.
        The sizes of the integers are chosen so that no sum or product formed from hostile values overflows 256 bits:
        token counts uint32, prices uint128, sums of fees uint192.
"""

from snekmate.utils import ecdsa


struct Batch:
    id: uint64
    node: address
    model_id: bytes32
    profile_version: uint32
    root: bytes32
    first_seq: uint64
    count: uint32
    total_fee: uint192
    node_cum: uint192
    lock: uint256
    audit_rate_ppm: uint32
    parameters_version: uint32
    block_number: uint64
    committed_at: uint64
    window_end: uint64


struct Request:
    client: address
    node: address
    model_id: bytes32
    profile_version: uint32
    prompt_root: bytes32
    prompt_tokens: uint32
    params_hash: bytes32
    max_tokens: uint32
    input_price: uint128
    output_price: uint128
    client_seed: bytes32
    client_nonce: bytes32
    deadline: uint64


struct SamplingParams:
    temperature_milli: uint32
    top_p_milli: uint32
    top_k: uint32
    stop_token_ids: DynArray[uint32, 8]
    ignore_eos: bool


struct Receipt:
    node: address
    seq: uint64
    request_hash: bytes32
    model_id: bytes32
    transcript_root: bytes32
    output_tokens: uint32
    finish_reason: uint8
    fee: uint192
    payer: address
    payer_cum: uint192
    node_cum: uint192
    issued_at: uint64


struct Voucher:
    payer: address
    node: address
    cumulative: uint192
    last_receipt_hash: bytes32


# What transcript_root commits to. The header is (request_hash, finish_reason, statement_hash).
struct TranscriptRoots:
    request_hash: bytes32
    finish_reason: uint8
    statement_hash: bytes32
    prompt_root: bytes32
    output_root: bytes32
    fingerprint_root: bytes32


# A receipt that stands at `index` of a batch, with its Merkle proof.
struct ReceiptInBatch:
    receipt: Receipt
    index: uint256
    proof: DynArray[bytes32, 32]


# How a receipt is known to be the node's. Committed (batch.id != 0): it stands at `index` of that batch, and the
# signature is not looked at. Uncommitted (batch.id = 0): signed by the node's key for its seq.
struct Evidence:
    batch: Batch
    index: uint256
    proof: DynArray[bytes32, 32]
    signature: Bytes[65]


_REQUEST_TYPE_HASH: constant(bytes32) = keccak256(
    "Request(address client,address node,bytes32 model_id,uint32 profile_version,bytes32 prompt_root,uint32 prompt_tokens,bytes32 params_hash,uint32 max_tokens,uint128 input_price,uint128 output_price,bytes32 client_seed,bytes32 client_nonce,uint64 deadline)"
)
_RECEIPT_TYPE_HASH: constant(bytes32) = keccak256(
    "Receipt(address node,uint64 seq,bytes32 request_hash,bytes32 model_id,bytes32 transcript_root,uint32 output_tokens,uint8 finish_reason,uint192 fee,address payer,uint192 payer_cum,uint192 node_cum,uint64 issued_at)"
)
_VOUCHER_TYPE_HASH: constant(bytes32) = keccak256(
    "Voucher(address payer,address node,uint192 cumulative,bytes32 last_receipt_hash)"
)
_DOMAIN_TYPE_HASH: constant(bytes32) = keccak256(
    "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
)
_NAME_HASH: constant(bytes32) = keccak256("PoIP")
_VERSION_HASH: constant(bytes32) = keccak256("1")


@internal
@pure
def _request_hash(request: Request) -> bytes32:
    """
    @dev EIP-712 hashStruct of a Request: the request_hash of receipts.
    """
    return keccak256(abi_encode(_REQUEST_TYPE_HASH, request))


@internal
@pure
def _receipt_hash(receipt: Receipt) -> bytes32:
    """
    @dev EIP-712 hashStruct of a Receipt: the data of its leaf in a batch.
    """
    return keccak256(abi_encode(_RECEIPT_TYPE_HASH, receipt))


@internal
@pure
def _voucher_hash(voucher: Voucher) -> bytes32:
    """
    @dev EIP-712 hashStruct of a Voucher.
    """
    return keccak256(abi_encode(_VOUCHER_TYPE_HASH, voucher))


@internal
@pure
def _params_hash(params: SamplingParams) -> bytes32:
    """
    @dev keccak(abi.encode(params)): the params_hash of requests.
    """
    return keccak256(abi_encode(params))


@internal
@pure
def _batch_hash(batch: Batch) -> bytes32:
    """
    @dev keccak(abi.encode(batch)); the commitment log keeps its highest 240 bits.
    """
    return keccak256(abi_encode(batch))


@internal
@pure
def _transcript_root(roots: TranscriptRoots) -> bytes32:
    """
    @dev keccak(0x02 || header_hash || prompt_root || output_root || fingerprint_root).
    """
    header: bytes32 = keccak256(abi_encode(roots.request_hash, roots.finish_reason, roots.statement_hash))
    return keccak256(concat(0x02, header, roots.prompt_root, roots.output_root, roots.fingerprint_root))


@internal
@view
def _domain_separator(verifying_contract: address) -> bytes32:
    """
    @dev The EIP-712 domain separator of one of the protocol's contracts on this chain (after a fork, the new chain's).
    """
    return keccak256(abi_encode(_DOMAIN_TYPE_HASH, _NAME_HASH, _VERSION_HASH, chain.id, verifying_contract))


@internal
@view
def _signer(struct_hash: bytes32, verifying_contract: address, signature: Bytes[65]) -> address:
    """
    @dev Who signed; zero if nobody did. 65 bytes (r, s, v of 27 or 28) and low s only, as the spec recovers.
    """
    if len(signature) != 65:
        return empty(address)
    digest: bytes32 = keccak256(concat(0x1901, self._domain_separator(verifying_contract), struct_hash))
    v: uint256 = convert(slice(signature, 64, 1), uint256)
    if v != 27 and v != 28:
        return empty(address)
    if convert(slice(signature, 32, 32), uint256) > ecdsa._MALLEABILITY_THRESHOLD:
        return empty(address)
    return ecrecover(digest, v, convert(slice(signature, 0, 32), uint256), convert(slice(signature, 32, 32), uint256))

# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Payment vault: escrow per (payer, node), cumulative vouchers, payout when the batch is final
@custom:contract-name PaymentVault
@license AGPL-3.0-only
@notice A payer keeps escrow for each node it uses. Each receipt carries the payer's running total with the node; the
        payer's voucher allows the node to be paid up to a point of that total. `collect` moves the interval that a
        batch's receipts cover from the escrow to a bucket of that batch. When the batch is final the bucket is the
        node's, less the protocol fee; when it is convicted the bucket goes back to the escrow.
@custom:security
        - `settled` per (payer, node) only grows, and only the interval above it is ever paid: nothing is paid twice,
          whoever signs, however vouchers and batches are combined. A payer never loses more than it signed.
        - No batch pays more than the total of fees that its stake lock was computed from, so a node that states less
          than its receipts come to is paid less.
        - Balances are counted inside (`total_held`); tokens sent here by mistake change nothing and can be swept.
        - The vault calls the token, the log and the registry, all fixed at deployment; none of them calls it. State is
          changed before tokens move out, and after they have moved in. Every entry point is nonreentrant.
        - Third parties may deposit for a payer, settle and pay out, but can change no thaw, no order of collection and
          no recipient.
        - The signature of an EIP-3009 deposit names the node through its nonce, so it cannot be redirected.
@custom:kill There is no kill switch and no pause: withdrawals, settlement and payout never stop. Intake ends when the
        payers' deposits do; to retire the vault, deploy another one with new nodes and clients using it.
"""

from snekmate.auth import ownable
from snekmate.auth import ownable_2step
from snekmate.utils import eip712_domain_separator

from ..commitments import merkle
from ..disputes import objects
from ..governance import parameter_names
from ..interfaces import ICommitmentLog
from ..interfaces import INodeRegistry
from ..interfaces import IParameters
from ..interfaces import IPaymentVault
from ..interfaces import IPoipToken

implements: IPaymentVault

initializes: ownable
initializes: ownable_2step[ownable := ownable]
initializes: eip712_domain_separator

exports: (
    # Administration.
    ownable_2step.owner,
    ownable_2step.pending_owner,
    ownable_2step.transfer_ownership,
    ownable_2step.accept_ownership,
    # Vouchers are signed for this contract (EIP-5267).
    eip712_domain_separator.eip712Domain,
)


PPM: constant(uint256) = 10**6
PENDING: constant(uint256) = 1
FINAL: constant(uint256) = 2
CONVICTED: constant(uint256) = 3
CANCELLED: constant(uint8) = 2

token: public(immutable(address))
commitment_log: public(immutable(address))
registry: public(immutable(address))
parameters: public(immutable(address))


# `thawing` is a part of `balance`, still usable for `collect`; it may be withdrawn from `thaw_end` on.
struct Escrow:
    balance: uint256
    thawing: uint256
    thaw_end: uint256


treasury: public(address)
# Sum of escrows, buckets, earnings and the treasury's due.
total_held: public(uint256)
treasury_due: public(uint256)
earned: public(HashMap[address, uint256])
settled: public(HashMap[address, HashMap[address, uint256]])
bucket: public(HashMap[uint64, HashMap[address, uint256]])
# What was ever moved into a batch's buckets, at most the batch's total_fee.
collected: public(HashMap[uint64, uint256])
_escrows: HashMap[address, HashMap[address, Escrow]]


event Deposited:
    payer: indexed(address)
    node: indexed(address)
    sender: indexed(address)
    amount: uint256
    balance: uint256


event ThawStarted:
    payer: indexed(address)
    node: indexed(address)
    old_thawing: uint256
    new_thawing: uint256
    thaw_end: uint256


event ThawCancelled:
    payer: indexed(address)
    node: indexed(address)
    old_thawing: uint256


event Withdrawn:
    payer: indexed(address)
    node: indexed(address)
    amount: uint256
    balance: uint256


event Collected:
    batch_id: indexed(uint64)
    payer: indexed(address)
    node: indexed(address)
    amount: uint256
    old_settled: uint256
    new_settled: uint256


event Settled:
    batch_id: indexed(uint64)
    payer: indexed(address)
    node: indexed(address)
    earned: uint256
    fee: uint256
    refunded: uint256


event EarningsWithdrawn:
    node: indexed(address)
    payout: indexed(address)
    amount: uint256


event TreasuryPaid:
    treasury: indexed(address)
    amount: uint256


event TreasuryChanged:
    old_treasury: indexed(address)
    new_treasury: indexed(address)


event Swept:
    treasury: indexed(address)
    amount: uint256


@deploy
def __init__(token_: address, log_: address, registry_: address, parameters_: address, treasury_: address):
    """
    @notice The deployer owns the vault; the owner can name the treasury, nothing else.
    @param token_ The network's token.
    @param log_ The commitment log.
    @param registry_ The node registry.
    @param parameters_ The protocol's parameters.
    @param treasury_ Who gets the protocol fee.
    """
    assert token_ != empty(address) and log_ != empty(address), "vault: zero address"
    assert registry_ != empty(address) and parameters_ != empty(address), "vault: zero address"
    assert treasury_ != empty(address), "vault: zero address"
    ownable.__init__()
    ownable_2step.__init__()
    eip712_domain_separator.__init__("PoIP", "1")
    token = token_
    commitment_log = log_
    registry = registry_
    parameters = parameters_
    self.treasury = treasury_
    log TreasuryChanged(old_treasury=empty(address), new_treasury=treasury_)


@external
@pure
def version() -> String[16]:
    """
    @notice The version of this contract's code.
    """
    return "0.1.0"


@external
def deposit(payer: address, node: address, amount: uint256):
    """
    @notice Add the sender's tokens to a payer's escrow with a node. Changes no thaw.
    @param payer Whose escrow.
    @param node The node's name.
    @param amount In wei, not zero.
    """
    self._pull(msg.sender, amount)
    self._credit(payer, node, amount)


@external
def deposit_with_permit(node: address, amount: uint256, deadline: uint256, v: uint8, r: bytes32, s: bytes32):
    """
    @notice Add the sender's tokens to its own escrow, allowing it in the same transaction (EIP-2612). If somebody has
            used the permit already, the allowance that it left is used.
    @param node The node's name.
    @param amount In wei, not zero.
    @param deadline Of the permit.
    @param v Of the permit's signature.
    @param r Of the permit's signature.
    @param s Of the permit's signature.
    """
    success: bool = raw_call(
        token,
        abi_encode(
            msg.sender,
            self,
            amount,
            deadline,
            v,
            r,
            s,
            method_id=method_id("permit(address,address,uint256,uint256,uint8,bytes32,bytes32)"),
        ),
        revert_on_failure=False,
    )
    allowance: uint256 = staticcall IPoipToken(token).allowance(msg.sender, self)
    assert success or allowance >= amount, "vault: permit is not valid"
    self._pull(msg.sender, amount)
    self._credit(msg.sender, node, amount)


@external
def deposit_with_authorization(
    payer: address,
    node: address,
    amount: uint256,
    valid_after: uint256,
    valid_before: uint256,
    salt: bytes32,
    v: uint8,
    r: bytes32,
    s: bytes32,
):
    """
    @notice Add tokens to the escrow of a payer who signed an EIP-3009 receiveWithAuthorization for the vault, sent by
            anyone. The authorization's nonce is keccak(abi.encode(node, salt)), so that it is good for this node alone.
    @param payer Who signed.
    @param node The node's name.
    @param amount In wei, not zero.
    @param valid_after Of the authorization.
    @param valid_before Of the authorization.
    @param salt 32 random bytes.
    @param v Of the signature.
    @param r Of the signature.
    @param s Of the signature.
    """
    nonce: bytes32 = keccak256(abi_encode(node, salt))
    extcall IPoipToken(token).receiveWithAuthorization(payer, self, amount, valid_after, valid_before, nonce, v, r, s)
    self._credit(payer, node, amount)


@external
def thaw(node: address, amount: uint256):
    """
    @notice Start to take escrow out. A second request adds to the first and restarts the clock for the whole.
    @param node The node's name.
    @param amount In wei, not zero, at most what is available.
    """
    escrow: Escrow = self._escrows[msg.sender][node]
    assert amount != 0, "vault: zero amount"
    assert amount <= escrow.balance - escrow.thawing, "vault: not so much is available"
    thaw_end: uint256 = block.timestamp + staticcall IParameters(parameters).value(parameter_names.THAW_PERIOD)
    self._escrows[msg.sender][node].thawing = escrow.thawing + amount
    self._escrows[msg.sender][node].thaw_end = thaw_end
    log ThawStarted(
        payer=msg.sender,
        node=node,
        old_thawing=escrow.thawing,
        new_thawing=escrow.thawing + amount,
        thaw_end=thaw_end,
    )


@external
def cancel_thaw(node: address):
    """
    @notice Keep what is thawing in escrow.
    @param node The node's name.
    """
    thawing: uint256 = self._escrows[msg.sender][node].thawing
    assert thawing != 0, "vault: nothing is thawing"
    self._escrows[msg.sender][node].thawing = 0
    self._escrows[msg.sender][node].thaw_end = 0
    log ThawCancelled(payer=msg.sender, node=node, old_thawing=thawing)


@external
def withdraw(node: address) -> uint256:
    """
    @notice Take out what has thawed and was not collected meanwhile.
    @param node The node's name.
    @return What was paid to the sender, in wei.
    """
    escrow: Escrow = self._escrows[msg.sender][node]
    assert escrow.thawing != 0, "vault: nothing is thawing"
    assert block.timestamp >= escrow.thaw_end, "vault: still thawing"
    balance: uint256 = escrow.balance - escrow.thawing
    self._escrows[msg.sender][node] = Escrow(balance=balance, thawing=0, thaw_end=0)
    log Withdrawn(payer=msg.sender, node=node, amount=escrow.thawing, balance=balance)
    self._push(msg.sender, escrow.thawing)
    return escrow.thawing


@external
def collect(
    voucher: objects.Voucher,
    signature: Bytes[65],
    batch: objects.Batch,
    first: objects.ReceiptInBatch,
    last: objects.ReceiptInBatch,
) -> uint256:
    """
    @notice By the node's operator or its current key: move what a batch's receipts and the payer's voucher allow from
            the payer's escrow to the batch's bucket. Pays the payer's running total from the start of `first`, or from
            where it was paid up to if that is later, to the end of `last`, or to the voucher's point if that is
            earlier. What lies below the start is given up, so collect batches in order. If the escrow holds less, what
            it holds is taken and the rest can be collected later. All of a batch's payers together pay at most its
            total_fee.
    @param voucher The payer's promise. Its last_receipt_hash is zero, names `last`, or names a later receipt.
    @param signature The payer's, 65 bytes.
    @param batch The node's batch, pending or final.
    @param first A receipt of the payer in the batch: the payer's first in it, to be paid in full.
    @param last A receipt of the payer in the batch, `first` or later. A cancelled one must be named by the voucher.
    @return What was moved, in wei.
    """
    assert batch.node == voucher.node, "vault: not the voucher's node"
    status: uint256 = staticcall ICommitmentLog(commitment_log).status_of(batch)
    assert status == PENDING or status == FINAL, "vault: batch is neither pending nor final"
    if msg.sender != staticcall INodeRegistry(registry).operator_of(batch.node):
        key: address = staticcall INodeRegistry(registry).committer(batch.node)
        assert msg.sender == key, "vault: caller is not the node's"
    signer: address = objects._signer(objects._voucher_hash(voucher), self, signature)
    assert signer != empty(address) and signer == voucher.payer, "vault: voucher is not signed by its payer"

    last_hash: bytes32 = objects._receipt_hash(last.receipt)
    self._check_receipt(first, objects._receipt_hash(first.receipt), batch, voucher.payer)
    self._check_receipt(last, last_hash, batch, voucher.payer)
    assert first.index <= last.index, "vault: first is after last"
    if voucher.last_receipt_hash != last_hash:
        assert last.receipt.finish_reason != CANCELLED, "vault: voucher does not name the cancelled receipt"
        if voucher.last_receipt_hash != empty(bytes32):
            assert last.receipt.payer_cum <= voucher.cumulative, "vault: voucher ends before the last receipt"

    assert first.receipt.fee <= first.receipt.payer_cum, "vault: malformed receipt"
    old_settled: uint256 = self.settled[voucher.payer][batch.node]
    low: uint256 = max(convert(first.receipt.payer_cum - first.receipt.fee, uint256), old_settled)
    high: uint256 = convert(min(last.receipt.payer_cum, voucher.cumulative), uint256)
    assert high > low, "vault: nothing to collect"
    escrow: Escrow = self._escrows[voucher.payer][batch.node]
    amount: uint256 = min(high - low, escrow.balance)
    assert amount != 0, "vault: escrow is empty"
    collected: uint256 = self.collected[batch.id] + amount
    # The stake behind the batch follows its total.
    assert collected <= convert(batch.total_fee, uint256), "vault: above the batch's total"

    self.settled[voucher.payer][batch.node] = low + amount
    self._escrows[voucher.payer][batch.node].balance = escrow.balance - amount
    if escrow.thawing > escrow.balance - amount:
        self._escrows[voucher.payer][batch.node].thawing = escrow.balance - amount
    self.collected[batch.id] = collected
    self.bucket[batch.id][voucher.payer] += amount
    log Collected(
        batch_id=batch.id,
        payer=voucher.payer,
        node=batch.node,
        amount=amount,
        old_settled=old_settled,
        new_settled=low + amount,
    )
    return amount


@external
def settle(batch: objects.Batch, payer: address) -> uint256:
    """
    @notice Hand out a bucket of a batch that is final or convicted. By anyone.
    @param batch The batch.
    @param payer Whose bucket.
    @return What was in it, in wei.
    """
    status: uint256 = staticcall ICommitmentLog(commitment_log).status_of(batch)
    assert status == FINAL or status == CONVICTED, "vault: batch is neither final nor convicted"
    amount: uint256 = self.bucket[batch.id][payer]
    assert amount != 0, "vault: bucket is empty"
    self.bucket[batch.id][payer] = 0
    if status == CONVICTED:
        self._escrows[payer][batch.node].balance += amount
        log Settled(batch_id=batch.id, payer=payer, node=batch.node, earned=0, fee=0, refunded=amount)
        return amount
    share: uint256 = staticcall IParameters(parameters).value_at(
        parameter_names.PROTOCOL_FEE, convert(batch.parameters_version, uint256)
    )
    fee: uint256 = amount * share // PPM
    self.treasury_due += fee
    self.earned[batch.node] += amount - fee
    log Settled(batch_id=batch.id, payer=payer, node=batch.node, earned=amount - fee, fee=fee, refunded=0)
    return amount


@external
def withdraw_earnings(node: address) -> uint256:
    """
    @notice Pay a node's earnings to the payout address that the registry names. By anyone.
    @param node The node's name.
    @return What was paid, in wei.
    """
    amount: uint256 = self.earned[node]
    assert amount != 0, "vault: nothing is earned"
    payout: address = staticcall INodeRegistry(registry).payout_of(node)
    self.earned[node] = 0
    log EarningsWithdrawn(node=node, payout=payout, amount=amount)
    self._push(payout, amount)
    return amount


@external
def withdraw_treasury() -> uint256:
    """
    @notice Pay the protocol fees to the treasury. By anyone.
    @return What was paid, in wei.
    """
    amount: uint256 = self.treasury_due
    assert amount != 0, "vault: nothing is due"
    self.treasury_due = 0
    log TreasuryPaid(treasury=self.treasury, amount=amount)
    self._push(self.treasury, amount)
    return amount


@external
def set_treasury(new_treasury: address):
    """
    @notice By the owner: name another treasury.
    @param new_treasury Not zero.
    """
    ownable._check_owner()
    assert new_treasury != empty(address), "vault: zero address"
    log TreasuryChanged(old_treasury=self.treasury, new_treasury=new_treasury)
    self.treasury = new_treasury


@external
def sweep() -> uint256:
    """
    @notice Send tokens that came here outside of deposits to the treasury. By anyone.
    @return What was sent, in wei.
    """
    amount: uint256 = staticcall IPoipToken(token).balanceOf(self) - self.total_held
    assert amount != 0, "vault: nothing to sweep"
    log Swept(treasury=self.treasury, amount=amount)
    assert extcall IPoipToken(token).transfer(self.treasury, amount), "vault: transfer failed"
    return amount


@external
@view
def escrow(payer: address, node: address) -> (uint256, uint256, uint256):
    """
    @notice (balance, the part of it that is thawing, when that part may be withdrawn).
    """
    held: Escrow = self._escrows[payer][node]
    return held.balance, held.thawing, held.thaw_end


@external
@view
def available(payer: address, node: address) -> uint256:
    """
    @notice What is in escrow and not thawing, in wei.
    """
    held: Escrow = self._escrows[payer][node]
    return held.balance - held.thawing


@internal
@view
def _check_receipt(
    held: objects.ReceiptInBatch, receipt_hash: bytes32, batch: objects.Batch, payer: address
):
    """
    @dev The receipt stands in the batch, and is between this payer and the batch's node.
    """
    root: bytes32 = merkle._root_of_one(
        merkle._leaf_of_hash(receipt_hash), held.index, convert(batch.count, uint256), held.proof
    )
    assert root == batch.root, "vault: receipt is not in the batch"
    assert held.receipt.payer == payer, "vault: not the voucher's payer"
    assert held.receipt.node == batch.node, "vault: not the batch's node"


@internal
def _pull(sender: address, amount: uint256):
    assert extcall IPoipToken(token).transferFrom(sender, self, amount), "vault: transfer failed"


@internal
def _credit(payer: address, node: address, amount: uint256):
    """
    @dev Count tokens that have arrived. A failure here undoes their arrival.
    """
    assert payer != empty(address) and node != empty(address), "vault: zero address"
    assert amount != 0, "vault: zero amount"
    balance: uint256 = self._escrows[payer][node].balance + amount
    self._escrows[payer][node].balance = balance
    self.total_held += amount
    log Deposited(payer=payer, node=node, sender=msg.sender, amount=amount, balance=balance)


@internal
def _push(receiver: address, amount: uint256):
    self.total_held -= amount
    assert extcall IPoipToken(token).transfer(receiver, amount), "vault: transfer failed"

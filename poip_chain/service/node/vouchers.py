"""Vouchers as they come in: whether one is genuine and makes sense, and keeping it.

Collecting them is `collection.py`'s work.
"""

from __future__ import annotations

from poip_chain.errors import InvalidSignature
from poip_chain.service.node.admission import Served, SignedVoucher
from poip_chain.service.node.faults import crash_point
from poip_chain.service.node.refusals import RequestRefused
from poip_chain.service.node.store import Store
from poip_chain.spec.types import ZERO_HASH, Address


def accept_voucher(
    store: Store,
    served: Served,
    signed: SignedVoucher,
    *,
    max_prepaid: int,
    running: int = 0,
    payer: Address | None = None,
) -> bool:
    """Check a voucher and keep it; True if it promises more than what was kept for the same receipt.

    A repeated or lower voucher is no error and changes nothing: vouchers of concurrent answers arrive in any order, and
    each is good for the receipt that it names. It may exceed the payer's running total by at most `max_prepaid` plus
    what `running` requests may cost (wei). `payer`: who it must be from, if that is known.
    Raises InvalidSignature, or RequestRefused for another node, an unknown receipt or too large an amount.
    """
    voucher = signed.voucher
    if voucher.node != served.node:
        raise RequestRefused(
            400, "wrong_node", f"the voucher is for node {voucher.node}; this is {served.node}.", param="node"
        )
    if payer is not None and voucher.payer != payer:
        raise RequestRefused(
            400, "wrong_payer", f"the voucher is of {voucher.payer}, the request of {payer}.", param="payer"
        )
    if (signer := voucher.recover(served.vault_domain, signed.signature)) != voucher.payer:
        raise InvalidSignature(
            f"the voucher is signed by {signer} for this chain and payment vault, not by its payer {voucher.payer}.",
            hint=f"Sign with chain id {served.vault_domain.chain_id} and verifyingContract "
            f"{served.vault_domain.verifying_contract}.",
        )
    if voucher.last_receipt_hash != ZERO_HASH:
        known = store.receipt_payer(voucher.last_receipt_hash)
        if known is None or known[0] != voucher.payer:
            raise RequestRefused(
                404, "unknown_receipt", "the voucher names a receipt that this node did not give to its payer.",
                hint="Name the receipt's EIP-712 struct hash, or none (32 zero bytes).", param="last_receipt_hash",
            )  # fmt: skip
    limit = store.payer_cum(voucher.payer) + running + max_prepaid
    if voucher.cumulative > limit:
        raise RequestRefused(
            400, "voucher_too_large",
            f"the voucher promises {voucher.cumulative} wei in all, more than {limit} can have been spent or prepaid.",
            hint="`cumulative` is the running total with this node, in wei.", param="cumulative",
        )  # fmt: skip
    if voucher.cumulative == 0:
        return False
    news = store.add_voucher(voucher, signed.signature)
    crash_point("after_voucher")
    return news

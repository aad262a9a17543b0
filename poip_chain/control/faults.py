"""Places in the life of a gateway's request where a test may have the process killed; see service/node/faults.py."""

from __future__ import annotations

from poip_chain.service.node.faults import crash_point

CRASH_POINTS = (
    "gateway_reserved",
    "gateway_opened",
    "gateway_first_token",
    "gateway_receipt_checked",
    "gateway_accepted",
    "gateway_voucher_taken",
    "gateway_move_planned",
    "gateway_move_sent",
)
"""In order: spending reserved; request written down, not sent; first token seen; receipt checked, not written down;
receipt and voucher written down, nothing handed over; voucher taken by the node, not marked; escrow move written down;
escrow move sent."""

__all__ = ["CRASH_POINTS", "crash_point"]

# pragma version 0.4.3
# pragma evm-version cancun
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title A scoring contract that believes every claim: it reads lengths and roots and says what the test told it to say
"""

from contracts.disputes import objects
from contracts.interfaces import IModelRegistry
from contracts.interfaces import IScoring

implements: IScoring

models: immutable(address)
acquits: public(bool)


@deploy
def __init__(models_: address):
    models = models_


@external
@pure
def version() -> String[16]:
    return "scripted"


@external
def set_acquits(acquits: bool):
    self.acquits = acquits


@external
@view
def score(batch: objects.Batch, claim: IScoring.Claim) -> IScoring.Scored:
    spec: IModelRegistry.ModelSpec = staticcall IModelRegistry(models).model_spec(batch.model_id)
    return IScoring.Scored(
        convicts=not self.acquits,
        margin_sum=0,
        margin_max=0,
        fingerprint_sum=0,
        model_id=batch.model_id,
        prompt_tokens=claim.request.prompt_tokens,
        output_tokens=claim.receipt.output_tokens,
        prompt_root=claim.roots.prompt_root,
        output_root=claim.roots.output_root,
        weights_root=spec.weights_root,
    )

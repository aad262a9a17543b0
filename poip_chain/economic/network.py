"""One deployed network: its contracts on a chain, as typed clients.

Clients read (views raise TransactionFailed and Unavailable) and build calls for an outbox; nothing here signs or sends.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from poip_chain.chain.deployment import Deployment
from poip_chain.chain.rpc import Chain
from poip_chain.economic.clients.court import Accusations, Contests
from poip_chain.economic.clients.disputes import Availability, Offences
from poip_chain.economic.clients.log import Log
from poip_chain.economic.clients.models import Models
from poip_chain.economic.clients.parameters import Parameters
from poip_chain.economic.clients.registry import Registry
from poip_chain.economic.clients.token import Token
from poip_chain.economic.clients.vault import Vault
from poip_chain.errors import ConfigurationError
from poip_chain.spec.eip712 import Domain
from poip_chain.spec.types import Address

_CONTRACT_OF_DOMAIN = {"log": "CommitmentLog", "vault": "PaymentVault", "registry": "NodeRegistry"}


class Network:
    """The contracts of `deployment` on `chain`.

    `check()` proves that they belong together; the constructor asks the chain nothing.
    """

    def __init__(self, chain: Chain, deployment: Deployment) -> None:
        self.chain = chain
        self.deployment = deployment

    def at(self, block: int) -> Network:
        """The same contracts as they were after a block: for sums whose parts must belong together."""
        return Network(self.chain.at(block), self.deployment)

    def check(self) -> None:
        """Raises ConfigurationError if the chain is another one, or is not the one that the deployment was made on."""
        self.deployment.check(self.chain)

    def address(self, contract: str) -> Address:
        """The address of a contract by its name. Raises ConfigurationError if the deployment lacks it."""
        return self.deployment.address(contract)

    def domain(self, name: Literal["log", "vault", "registry"]) -> Domain:
        """The EIP-712 domain: log for requests and receipts, vault for vouchers, registry for proofs of possession."""
        if name not in _CONTRACT_OF_DOMAIN:
            raise ConfigurationError(f"there is no signing domain {name!r}.")
        return Domain(self.deployment.chain_id, self.address(_CONTRACT_OF_DOMAIN[name]))

    @cached_property
    def token(self) -> Token:
        """PoipToken."""
        return Token(self.chain, self.address(Token.NAME))

    @cached_property
    def parameters(self) -> Parameters:
        """Parameters."""
        return Parameters(self.chain, self.address(Parameters.NAME))

    @cached_property
    def models(self) -> Models:
        """ModelRegistry."""
        return Models(self.chain, self.address(Models.NAME))

    @cached_property
    def registry(self) -> Registry:
        """NodeRegistry."""
        return Registry(self.chain, self.address(Registry.NAME))

    @cached_property
    def log(self) -> Log:
        """CommitmentLog."""
        return Log(self.chain, self.address(Log.NAME))

    @cached_property
    def vault(self) -> Vault:
        """PaymentVault."""
        return Vault(self.chain, self.address(Vault.NAME))

    @cached_property
    def offences(self) -> Offences:
        """Offences."""
        return Offences(self.chain, self.address(Offences.NAME))

    @cached_property
    def availability(self) -> Availability:
        """Availability."""
        return Availability(self.chain, self.address(Availability.NAME))

    @cached_property
    def accusations(self) -> Accusations:
        """Accusations."""
        return Accusations(self.chain, self.address(Accusations.NAME))

    @cached_property
    def contests(self) -> Contests:
        """Contests."""
        return Contests(self.chain, self.address(Contests.NAME))

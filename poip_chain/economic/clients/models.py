"""Models and their profiles on a chain."""

from __future__ import annotations

from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.base import ContractClient
from poip_chain.spec.objects import ModelConfig, ModelSpec, Profile
from poip_chain.spec.types import Hash32


class Models(ContractClient):
    """ModelRegistry."""

    NAME = "ModelRegistry"

    def model_ids(self) -> list[Hash32]:
        """All registered models, oldest first."""
        return [Hash32(bytes(self.read("model_at", index))) for index in range(int(self.read("model_count")))]

    def spec(self, model_id: bytes) -> ModelSpec:
        """What a model is. Raises TransactionFailed for an unknown id."""
        return ModelSpec(*self.read("model_spec", model_id))

    def config(self, model_id: bytes) -> ModelConfig:
        """A model's dimensions. Raises TransactionFailed for an unknown id."""
        return ModelConfig(*self.read("model_config", model_id))

    def profile(self, model_id: bytes, version: int) -> Profile:
        """How a model is served and judged. Raises TransactionFailed for an unknown one."""
        return Profile.from_values(self.read("profile", model_id, version))

    def profile_count(self, model_id: bytes) -> int:
        """Profiles are numbered from 1 to this."""
        return int(self.read("profile_count", model_id))

    def is_servable(self, model_id: bytes, version: int) -> bool:
        """Whether new offers and requests may be of this model and profile."""
        return bool(self.read("is_servable", model_id, version))

    def deprecated_at(self, model_id: bytes) -> int:
        """From when on it is no longer served, 0 if it stays."""
        return int(self.read("deprecated_at", model_id))

    def register(self, spec: ModelSpec, config: ModelConfig, metadata_uri: str) -> Call:
        """By the owner only (the allow-list)."""
        return self.call("register_model", spec.values(), config.values(), metadata_uri)

    def add_profile(self, model_id: bytes, profile: Profile) -> Call:
        """The model's next profile, immutable; by the owner only."""
        return self.call("add_profile", model_id, profile.values())

    def deprecate(self, model_id: bytes, sunset: int) -> Call:
        """Serve it no longer from `sunset` on; by the owner only."""
        return self.call("deprecate", model_id, sunset)

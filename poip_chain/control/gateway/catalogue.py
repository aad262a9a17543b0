"""The models that a gateway serves: name, registered identity, profile and tokenizer, each checked against the chain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from poip_chain.control.gateway.errors import ApiError
from poip_chain.control.gateway.settings import ModelEntry
from poip_chain.control.view import ChainView
from poip_chain.errors import ConfigurationError, Refused
from poip_chain.service.engine.model import prepare
from poip_chain.service.engine.tokenizer import Tokenizer
from poip_chain.spec.objects import Profile


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model under the name by which clients ask for it."""

    name: str
    model_id: bytes
    profile_version: int
    profile: Profile
    tokenizer: Tokenizer


class Catalogue:
    """Finds models by name or by 0x-hex model id."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self.models = tuple(models)
        self._by_name = {name: model for model in self.models for name in (model.name, "0x" + model.model_id.hex())}
        if len(self._by_name) != 2 * len(self.models):
            raise ConfigurationError("two entries of the gateway's models share a name or are the same model.")

    def get(self, name: str) -> ServedModel:
        """A model. Raises ApiError 404."""
        model = self._by_name.get(name)
        if model is None:
            served = ", ".join(model.name for model in self.models)
            raise ApiError(
                404, "model_not_found", f"the model {name!r:.80} is not served here; served: {served}.", param="model"
            )
        return model


def load_catalogue(chain: ChainView, entries: Iterable[ModelEntry]) -> Catalogue:
    """Load tokenizers and check them against the registered models. Blocks.

    Raises NotFound for a model that is not registered, IntegrityError for other files than the registered ones,
    Refused where no profile may be served any more, Unavailable without a chain.
    """
    return Catalogue(load_model(chain, entry) for entry in entries)


def load_model(chain: ChainView, entry: ModelEntry) -> ServedModel:
    """One entry; see `load_catalogue`."""
    model_id = bytes.fromhex(entry.model_id[2:]) if entry.model_id else prepare(entry.directory).model_id
    tokenizer = Tokenizer.load(entry.directory, chain.model_spec(model_id))
    versions = range(chain.profile_count(model_id), 0, -1)
    wanted = [entry.profile_version] if entry.profile_version else list(versions)
    version = next((version for version in wanted if chain.is_servable(model_id, version)), None)
    if version is None:
        raise Refused(
            f"model {entry.name} (0x{model_id.hex()}) has no profile that may be served.",
            hint="`poip model show` lists its profiles; it may be deprecated.",
        )
    return ServedModel(entry.name, bytes(model_id), version, chain.profile(model_id, version), tokenizer)

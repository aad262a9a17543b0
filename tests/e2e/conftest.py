"""One real vLLM engine with the default model, shared by all tests of a session that ask for it."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from poip_chain.service.engine import model
from poip_chain.service.engine.model import ModelHashes
from poip_chain.service.engine.server import EngineOptions, EngineServer

ROOT = Path(__file__).resolve().parent.parent.parent
SERVED_NAME = "poip"


@dataclass(frozen=True)
class Engine:
    """A running vLLM server: its address, the model it serves, that model's hashes, and its process."""

    url: str
    model_dir: Path
    hashes: ModelHashes
    server: EngineServer
    served_name: str = SERVED_NAME


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model's directory: POIP_TEST_MODEL, or .build/models of the checkout; built on first use."""
    directory = Path(os.environ.get("POIP_TEST_MODEL", ROOT / ".build" / "models" / "smollm2-135m-instruct"))
    model.prepare_default(directory)
    return directory


@pytest.fixture(scope="session")
def engine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """See the module's docstring. Starting takes one to two minutes on two cores."""
    faulthandler.cancel_dump_traceback_later()  # the start is no hang
    options = EngineOptions(
        model=model_dir, served_name=SERVED_NAME, log_file=tmp_path_factory.mktemp("engine") / "engine.log"
    )
    with EngineServer(options) as server:
        yield Engine(server.url, model_dir, model.prepare(model_dir), server)

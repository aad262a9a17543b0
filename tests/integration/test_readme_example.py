"""The README's Python example, executed as it is written: only the address, the API key and the model's name differ."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from poip_chain.control.gateway.settings import GatewaySettings
from poip_chain.spec.objects import Receipt
from tests.engines.gateway_kit import GATEWAY, MODEL, GatewayKit, running_gateway
from tests.engines.scripted_chain import ScriptedChain
from tests.engines.scripted_node import ScriptedNode
from tests.integration.test_gateway_openai import say
from tests.unit.test_readme import ROOT, blocks

ANSWER = "A chain of blocks, signed and counted."
DEFAULT_MODEL = "smollm2-135m-instruct"


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[GatewayKit]:
    chain = ScriptedChain()
    with running_gateway(tmp_path, chain, [ScriptedNode(chain)]) as kit:
        say(kit, ANSWER)
        yield kit


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"the README's example has {text.count(old)} times {old}"
    return text.replace(old, new)


def example(kit: GatewayKit) -> str:
    """The README's one Python block, pointed at a gateway of the test."""
    (block,) = [block for name, block in blocks("python") if name == "README.md"]
    address = f"http://{GatewaySettings.model_fields['host'].default}:{GatewaySettings.model_fields['port'].default}"
    block = replaced(block, f'"{address}/v1"', repr(f"{kit.url}/v1"))
    block = replaced(block, '"any"', repr(kit.api_key))
    return replaced(block, f'"{DEFAULT_MODEL}"', repr(MODEL))


def check_printed(kit: GatewayKit, printed: str) -> None:
    """First the answer, then a dictionary: the receipt of that very answer, by the node, for this gateway's key."""
    answer, _, shown = printed.partition("\n")
    assert answer == ANSWER
    receipt: Receipt = Receipt.from_json(ast.literal_eval(shown))
    assert (receipt.node, receipt.payer) == (kit.node.address, GATEWAY.address)
    (request,) = kit.node.received
    assert request["request"]["max_tokens"] == 64
    asked = kit.gateway.catalogue.models[0].tokenizer.decode(request["prompt_ids"])
    assert "What is a blockchain?" in asked
    kit.run(kit.gateway.settle())
    assert kit.node.paid == receipt.fee > 0


def test_the_example_prints_an_answer_and_its_receipt(kit: GatewayKit, tmp_path: Path) -> None:
    """Pasted into a file and run as a program: nothing of ours is imported."""
    file = tmp_path / "example.py"
    file.write_text(example(kit))
    done = subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    check_printed(kit, done.stdout)


def test_the_default_model_is_the_one_that_is_prepared() -> None:
    from poip_chain.cli.commands.model_prepare import DEFAULT_MODEL as prepared

    assert prepared == DEFAULT_MODEL and ROOT.joinpath("README.md").is_file()

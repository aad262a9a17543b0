"""The long-running programs as an operator starts them: `poip ... run` and workers/*.py, against the scripted engine.

Each is started by its command line, works, and ends with status 0 on SIGTERM; wrong settings give one line and no
traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from poip_chain.cli import main
from tests.integration.gateway_world import ESCROW, MODEL, GatewayProcess, running_gateway_world
from tests.integration.node_world import HTTP, PASSWORD, ROOT, NodeProcess, World, _free_port, wait_until

STOP_SECONDS = 20.0
POIP = str(Path(sys.executable).with_name("poip"))
NODE_WORKER, GATEWAY_WORKER, WATCH_WORKER = (
    str(ROOT / "workers" / name) for name in ("inference_node.py", "gateway.py", "watchtower.py")
)


class Program:
    """A process with its output in a file. SIGKILL at the end of the block, if it still runs."""

    def __init__(self, arguments: Sequence[str], folder: Path, **environment: str) -> None:
        self.log = folder / f"{time.monotonic_ns()}.log"
        given = {name: value for name, value in os.environ.items() if not name.startswith("POIP_")}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                list(arguments),
                cwd=folder,
                env={**given, "POIP_PASSWORD": PASSWORD, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
            )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def text(self) -> str:
        """What it wrote to standard error."""
        return self.log.read_text(errors="replace")

    def ready(self, url: str, sign: str = "") -> None:
        """Wait until `url` answers with 200, and with `sign` in it."""

        def there() -> bool:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self.text()}"
            with contextlib.suppress(httpx.HTTPError):
                answer = HTTP.get(url, timeout=5)
                return answer.status_code == 200 and sign in answer.text
            return False

        wait_until(there, 90, lambda: f"{url} answers {sign}: {self.text()[-2000:]}")

    def stop(self) -> None:
        """SIGTERM ends it with status 0, soon and without complaints."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(STOP_SECONDS) == 0, self.text()[-3000:]
        assert "Traceback" not in self.text()

    def refused(self) -> str:
        """It ends by itself with status 1: one line of error, and at most one of advice."""
        assert self.process.wait(60) == 1, self.text()
        lines = self.text().splitlines()
        assert "Traceback" not in self.text() and 1 <= len(lines) <= 2, self.text()
        assert lines[0].lower().startswith("error: "), lines
        return self.text()


@dataclass
class Site:
    """The world, a folder for settings, and where the programs will answer."""

    world: World
    node: NodeProcess
    gateway: GatewayProcess
    folder: Path

    def write(self, name: str, **sections: dict[str, Any]) -> Path:
        """A TOML file; the section 'top' has no header. None removes a value."""
        lines = []
        for section, values in sections.items():
            lines += [f"[{section}]"] if section != "top" else []
            lines += [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
        path = self.folder / name
        path.write_text("\n".join(lines) + "\n")
        return path

    def common(self) -> dict[str, Any]:
        return {"rpc_url": self.world.rpc_url, "deployment": str(self.world.deployment_path)}

    def node_values(self, **changes: Any) -> dict[str, Any]:
        return {
            "data": str(self.node.folder),
            "key": str(self.node.folder / "key.json"),
            "port": self.node.port,
            "engine_url": self.world.engine.url,
            "batch_count": 1,
            "batch_age": 1.0,
            "poll_interval": 0.2,
            "finality_blocks": 1,
            "startup_timeout": 60.0,
            **changes,
        }

    def gateway_values(self, **changes: Any) -> dict[str, Any]:
        model = {"name": MODEL, "directory": str(self.gateway.model), "model_id": "0x" + self.gateway.model_id.hex()}
        return {
            "data": str(self.gateway.folder),
            "key": str(self.gateway.folder / "key.json"),
            "port": self.gateway.port,
            "escrow_per_node": str(ESCROW),
            "refresh_interval": 0.5,
            "settle_interval": 0.5,
            "first_token_timeout": 20,
            "startup_timeout": 60.0,
            "models": [model],
            **changes,
        }

    def watch_values(self, data: Path, port: int) -> dict[str, Any]:
        return {"data": str(data), "poll_interval": 0.2, "metrics_port": port}

    def ask(self) -> str:
        """A question through the gateway with the unmodified SDK; the node that answered."""
        with self.gateway.sdk() as sdk:
            messages: Any = [{"role": "user", "content": "Hi!"}]
            answer = sdk.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)
        assert answer.usage is not None and answer.usage.completion_tokens == 8
        receipt = (answer.model_extra or {})["poip"]["proof"]["receipt"]
        return str(receipt["node"])


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(entry) for entry in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + " }"
    return json.dumps(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("processes")
    with running_gateway_world(folder) as (world, (node,), gateway):
        assert node.stop() == 0
        yield Site(world, node, gateway, folder)


def programs(site: Site, arguments: Sequence[Sequence[str]], metrics: int) -> None:
    """Node, gateway and watchtower by these command lines: a question is answered, committed, seen; then they end."""
    with contextlib.ExitStack() as stack:
        node, gateway, watch = (stack.enter_context(Program(line, site.folder)) for line in arguments)
        node.ready(f"{site.node.url}/healthz", '"ok"')
        gateway.ready(f"{site.gateway.url}/healthz")
        before = len(site.node.receipts())
        assert site.ask() == site.node.address
        assert len(site.node.receipts()) == before + 1
        watch.ready(f"http://127.0.0.1:{metrics}/metrics", 'poip_watchtower_events_total{event="batches"}')
        for program in (watch, gateway, node):
            program.stop()
    with pytest.raises(openai.APIConnectionError):
        site.ask()


def test_the_commands(site: Site, tmp_path: Path) -> None:
    metrics = _free_port()
    config = site.write(
        "poip.toml",
        top=site.common(),
        node=site.node_values(),
        gateway=site.gateway_values(),
        watchtower=site.watch_values(tmp_path / "watch", metrics),
    )
    shared = ["--config", str(config), "--data", str(tmp_path)]
    programs(site, [[POIP, noun, "run", *shared] for noun in ("node", "gateway", "watch")], metrics)
    # What the watchtower saw is there for the commands that look, in the directory that the settings name.
    seen = subprocess.run([POIP, "watch", "status", "--json", *shared], capture_output=True, timeout=60, check=True)
    assert {batch["node"] for batch in json.loads(seen.stdout)["batches"]} == {site.node.address}
    audits = subprocess.run([POIP, "audit", "list", "--json", *shared], capture_output=True, timeout=60, check=True)
    assert isinstance(json.loads(audits.stdout)["audits"], list)


def test_the_workers(site: Site, tmp_path: Path) -> None:
    metrics = _free_port()
    common = site.common()
    node = site.write("node.toml", top={**common, **site.node_values()})
    gateway = site.write("gateway.toml", top={**common, **site.gateway_values()})
    watch = site.write("watch.toml", top={**common, **site.watch_values(tmp_path / "watch", metrics)})
    workers = ((NODE_WORKER, node), (GATEWAY_WORKER, gateway), (WATCH_WORKER, watch))
    programs(site, [[sys.executable, worker, "--config", str(config)] for worker, config in workers], metrics)


def refusal(site: Site, arguments: Sequence[str], words: Sequence[str], **environment: str) -> None:
    """A process that ends with status 1 and an error that has these words."""
    with Program(arguments, site.folder, **environment) as program:
        text = program.refused()
    assert all(word in text for word in words), (words, text)


def values_of(site: Site, noun: str, data: Path) -> tuple[str, str, dict[str, Any]]:
    """(section, its setting of a port, sound values) of a program."""
    if noun == "node":
        return "node", "port", site.node_values()
    if noun == "gateway":
        return "gateway", "port", site.gateway_values()
    return "watchtower", "metrics_port", site.watch_values(data / "watch", _free_port())


@pytest.mark.parametrize("noun", ["node", "gateway", "watch"])
def test_a_command_names_the_setting_that_is_wrong(
    site: Site, tmp_path: Path, noun: str, capsys: pytest.CaptureFixture[str]
) -> None:
    section, port, values = values_of(site, noun, tmp_path)

    def line(**changes: Any) -> list[str]:
        config = site.write(f"wrong-{noun}.toml", top=site.common(), **{section: {**values, **changes}})
        return [noun, "run", "--config", str(config), "--data", str(tmp_path)]

    for changes, words in (
        ({port: 70_000}, f"{section}.{port} = 70000 (from file"),
        ({"colour": "red"}, f"{section}.colour = 'red' (from file"),
    ):
        assert main.run(line(**changes)) == 1
        shown = capsys.readouterr()
        assert words in shown.err and len(shown.err.splitlines()) == 2 and not shown.out
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        named = [str(number), f"{section}.{port}", "another port"]
        refusal(site, [POIP, *line(**{port: number})], named)


@pytest.mark.parametrize(
    ("worker", "noun"), [(NODE_WORKER, "node"), (GATEWAY_WORKER, "gateway"), (WATCH_WORKER, "watch")]
)
def test_a_worker_names_the_setting_that_is_wrong(site: Site, tmp_path: Path, worker: str, noun: str) -> None:
    section, port, values = values_of(site, noun, tmp_path)
    wrong = site.write(f"wrong-{noun}-worker.toml", top={**site.common(), **values, port: "often"})
    refusal(site, [sys.executable, worker, "--config", str(wrong)], [f"{port}:", f"POIP_{section.upper()}_"])


def test_flags_without_sense(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = site.write("flags.toml", top=site.common(), gateway=site.gateway_values())
    shared = ["--config", str(config), "--data", str(tmp_path)]
    for flag, value in (("poll_interval", "0"), ("confirmations", "-1")):
        assert main.run(["watch", "run", *shared, f"--{flag.replace('_', '-')}", value]) == 1
        assert f"watchtower.{flag} = {value}" in capsys.readouterr().err
    refusal(site, [POIP, "watch", "run", *shared, "--mode", "defend"], ["--key"])
    refusal(site, [POIP, "watch", "run", *shared, "--model", str(tmp_path)], ["config.json"])
    refusal(site, [POIP, "gateway", "run", *shared], ["password", "key.json"], POIP_PASSWORD="not this one")
    refusal(site, [POIP, "node", "run", *shared], ["node.json", "poip key new"])


def test_audit_run_refuses_what_is_no_evidence(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    garbage = tmp_path / "garbage.json"
    garbage.write_text('{"version": 999}')
    line = ["audit", "run", "--data", str(tmp_path), "--model", str(site.gateway.model), "--evidence"]
    for file, words in ((garbage, "version 999"), (tmp_path / "none.json", "no evidence file")):
        assert main.run([*line, str(file)]) == 1
        shown = capsys.readouterr().err
        assert str(file) in shown and words in shown and "Traceback" not in shown

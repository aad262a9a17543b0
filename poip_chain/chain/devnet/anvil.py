"""Running Foundry's anvil in place of the embedded node, with the same chain id, keys and gas limit."""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from poip_chain.chain.devnet.config import WEI_PER_ETHER, DevnetConfig
from poip_chain.errors import ConfigurationError, Unavailable

START_SECONDS = 30.0


def find() -> Path:
    """The installed anvil binary. Raises ConfigurationError if PATH has none."""
    found = shutil.which("anvil")
    if found is None:
        raise ConfigurationError(
            "the anvil backend was asked for, but no 'anvil' is on PATH.",
            hint="Install Foundry (or the npm package @foundry-rs/anvil) and put the binary on PATH, "
            "or use the embedded backend.",
        )
    return Path(found)


def command(binary: Path, config: DevnetConfig, port: int) -> list[str]:
    """The command line that makes anvil the same chain as the embedded node. Raises ConfigurationError."""
    ether, rest = divmod(config.balance, WEI_PER_ETHER)
    if rest:
        raise ConfigurationError(f"anvil takes whole ether as balance, not {config.balance} wei.")
    line = [
        str(binary),
        "--host",
        config.host,
        "--port",
        str(port),
        "--silent",
        "--chain-id",
        str(config.chain_id),
        "--hardfork",
        "prague",
        "--gas-limit",
        str(config.gas_limit),
        "--mnemonic",
        config.mnemonic,
        "--accounts",
        str(config.accounts),
        "--balance",
        str(ether),
    ]
    if config.block_time is not None:
        line += ["--block-time", f"{config.block_time:g}"]
    elif not config.automine:
        line.append("--no-mining")
    if config.database is not None:
        # Its state is dumped every few seconds only: what came after the last dump is lost by kill -9.
        line += ["--state", str(config.database), "--state-interval", "1"]
    return line


def run(config: DevnetConfig) -> None:
    """Run anvil until it ends or this process gets SIGINT or SIGTERM. Raises ConfigurationError, Unavailable."""
    binary = find()
    port = config.port or _free_port(config.host)
    child = subprocess.Popen(command(binary, config, port), stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)

    def forward(number: int, _: object) -> None:
        child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        url = f"http://{config.host}:{port}"
        _wait_until_ready(url, child)
        if config.ready_file is not None:
            config.ready_file.write_text(url + "\n")
        child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()
            child.wait()


def _wait_until_ready(url: str, child: subprocess.Popen[bytes]) -> None:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}).encode()
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise Unavailable(f"anvil ended at once with status {child.returncode}.", hint="Is the port free?")
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=2):
            return
        time.sleep(0.05)
    raise Unavailable(f"anvil did not answer at {url} within {START_SECONDS:.0f} seconds.")


def _end_with_parent() -> None:
    """In the child, on Linux: get SIGTERM when this process dies, even by kill -9."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])

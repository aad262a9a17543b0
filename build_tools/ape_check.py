"""Shows that Ape works with this project: `make ape`.

Compiles the contracts with Ape and compares every bytecode with what the library compiles, then runs each script of
scripts/ on Ape's own network and against a devnet, where the library reads back what the scripts wrote. Ape runs in its
own environment (.venv-ape), as a subprocess: nothing here may import it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from poip_chain.chain.artifacts import artifact
from poip_chain.chain.deployment import Deployment
from poip_chain.chain.rpc import Chain
from poip_chain.economic.network import Network
from poip_chain.errors import PoipError
from poip_chain.spec.types import Address

ROOT = Path(__file__).resolve().parent.parent
APE_ENVIRONMENT = ROOT / ".venv-ape" / "bin"
COMPILED = ROOT / ".build" / "__local__.json"
DEVNET_READY_SECONDS = 60.0
SCRIPT_SECONDS = 300.0
STAKED, UNSTAKED = 150, 40
UNIT = 10**18
# Fixed by the test mnemonic: its second account is the node key, which names the node.
NODE = Address("0x70997970C51812dc3A010C7d01b50e0d17dc79C8")


class CheckError(Exception):
    """Ape and the library disagree, or a script failed."""


def ape(*arguments: str) -> str:
    """Run Ape's command with its environment first on the path, where it looks for the compiler; its output."""
    environment = {
        **os.environ,
        "PATH": f"{APE_ENVIRONMENT}:{os.environ['PATH']}",
        # Its caches and keys stay inside of the project.
        "APE_DATA_FOLDER": str(ROOT / ".build" / "ape"),
        # Ape's own dependencies warn about each other at import.
        "PYTHONWARNINGS": "ignore",
    }
    print(f"$ ape {' '.join(arguments)}", flush=True)
    finished = subprocess.run(
        [str(APE_ENVIRONMENT / "ape"), *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SCRIPT_SECONDS,
        check=False,
    )
    for line in finished.stdout.splitlines():
        if not line.startswith(("INFO:", "SUCCESS:")):
            print(f"    {line}", flush=True)
    if finished.returncode:
        raise CheckError(f"ape {arguments[0]} ended with exit code {finished.returncode}; its words are above.")
    return finished.stdout


def compare_bytecode() -> int:
    """Every deployable has the same creation code from Ape as from the library; how many there are."""
    compiled = json.loads(COMPILED.read_text())["contractTypes"]
    names = sorted(path.stem for path in (ROOT / "contracts").rglob("[A-Z]*.vy"))
    for name in names:
        if name not in compiled:
            raise CheckError(f"Ape compiled no {name}.")
        code = bytes.fromhex(compiled[name]["deploymentBytecode"]["bytecode"].removeprefix("0x"))
        if code != artifact(name).bytecode:
            raise CheckError(f"Ape and the library compile {name} to different code; compare vyper in the two locks.")
    return len(names)


def expect(output: str, wanted: str) -> None:
    """`CheckError` unless a script said what it should."""
    if wanted not in output:
        raise CheckError(f"The script did not print {wanted!r}.")


def run_on_own_network() -> None:
    """Each script on Ape's built-in network, which starts empty every time."""
    network = ("--network", "ethereum:local:test")
    expect(ape("run", "deploy", *network), "Availability")
    expect(ape("run", "register_node", *network), f"node {NODE}: active 0 POIP")
    expect(ape("run", "stake", "--amount", str(STAKED), *network), f"active {STAKED} POIP")
    unstaked = ape("run", "unstake", "--amount", str(UNSTAKED), *network)
    expect(unstaked, f"active 0 POIP, unbonding {UNSTAKED} POIP")


@contextmanager
def devnet(folder: Path) -> Iterator[str]:
    """A devnet on a free port; its URL."""
    ready = folder / "ready"
    command = [sys.executable, "-m", "poip_chain.chain.devnet", "--port", "0", "--ready-file", str(ready)]
    with (folder / "devnet.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + DEVNET_READY_SECONDS
            while not (ready.exists() and ready.read_text().strip()):
                if process.poll() is not None or time.monotonic() > deadline:
                    said = (folder / "devnet.log").read_text(errors="replace")
                    raise CheckError(f"The devnet did not start:\n{said}")
                time.sleep(0.05)
            yield ready.read_text().strip()
        finally:
            process.terminate()
            process.wait(20)


def run_on_devnet(folder: Path) -> None:
    """The same scripts one after the other on one chain, and then the library's view of what they did."""
    with devnet(folder) as url:
        path = folder / "deployment.json"
        network = ("--network", f"ethereum:devnet:{url}", "--deployment", str(path))
        ape("run", "deploy", "--short-windows", *network)
        ape("run", "register_node", *network)
        ape("run", "stake", "--node", NODE, "--amount", str(STAKED), *network)
        ape("run", "unstake", "--node", NODE, "--amount", str(UNSTAKED), *network)
        contracts = Network(Chain(url), Deployment.load(path))
        contracts.check()
        info = contracts.registry.info(NODE)
        if (info.active, info.unbonding) != ((STAKED - UNSTAKED) * UNIT, UNSTAKED * UNIT):
            raise CheckError(f"The registry holds {info.active} and {info.unbonding} wei for the node.")
        print(f"    the library reads back: active {info.active} wei, unbonding {info.unbonding} wei", flush=True)


def main() -> int:
    """Run all checks; 0 if they passed."""
    started = time.monotonic()
    try:
        ape("compile", "--force")
        count = compare_bytecode()
        print(f"    {count} contracts: the same bytecode as the library's", flush=True)
        run_on_own_network()
        with tempfile.TemporaryDirectory() as folder:
            run_on_devnet(Path(folder))
    except (CheckError, PoipError, subprocess.TimeoutExpired) as error:
        print(f"\nape check: {error}", file=sys.stderr)
        return 1
    print(f"ape: compile, scripts on its own network and on the devnet passed in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks`: run every benchmark once and write one table, as text and as JSON.

Each module has `run(...) -> list[Row]`. Ratios are formed within one run on one machine; absolute numbers are for
orientation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import canonical, chain_gas, court, crypto, devnet, engine, referee, verification
from benchmarks.rows import Row
from poip_chain.service.engine.model import prepare_default

DEFAULT_MODEL = Path(".build/models/smollm2-135m-instruct")


def main() -> int:
    """Run the chosen benchmarks; exit code 0 if all of them ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="a prepared model directory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the table goes")
    parser.add_argument("--only", nargs="*", default=[], help="names of benchmarks to run (default: all)")
    options = parser.parse_args()
    # Where nobody watches, the table keeps its width.
    console, rows = Console(width=None if sys.stdout.isatty() else 180), []

    def say(line: str) -> None:
        console.print(f"  {line}", highlight=False)

    suites: dict[str, Callable[[], list[Row]]] = {
        "crypto": crypto.run,
        "gas": chain_gas.run,
        "referee": referee.run,
        "court": court.run,
        "devnet": devnet.run,
        "engine": lambda: engine.run(options.model, say),
        "canonical": lambda: canonical.run(options.model),
        "verification": lambda: verification.run(options.model),
    }
    unknown = sorted(set(options.only) - set(suites))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(suites)}")
    if options.model == DEFAULT_MODEL:
        prepare_default(DEFAULT_MODEL, say)
    for name in options.only or suites:
        console.print(f"running {name} ...")
        begin = time.monotonic()
        rows += [(name, row) for row in suites[name]()]
        console.print(f"  done in {time.monotonic() - begin:.0f} s")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    table = Table(title=f"poip-chain benchmarks ({machine})")
    for heading in ("what", "value", "unit", "compared with", "ratio", "goal", "how"):
        table.add_column(heading, justify="right" if heading in ("value", "ratio") else "left", overflow="fold")
    for _, row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.what, f"{row.value:,.4g}", row.unit, row.compared_with, ratio, row.goal, row.how)
    options.out.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine, "rows": [{"suite": suite, **row.to_json()} for suite, row in rows]}
    (options.out / "benchmarks.json").write_text(json.dumps(document, indent=2) + "\n")
    with (options.out / "benchmarks.txt").open("w") as file:
        Console(file=file, width=180).print(table)
    console.print(table)
    console.print(f"written to {options.out}/benchmarks.json and .txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())

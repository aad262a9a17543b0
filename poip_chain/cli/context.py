"""What commands share: options, the chain and network they work on, keys, and how they send transactions.

Heavy imports stand inside functions: `poip --help` must be quick.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from poip_chain.cli import output
from poip_chain.errors import ConfigurationError, InvalidInput, PoipError

if TYPE_CHECKING:
    from poip_chain.chain.keys import Key
    from poip_chain.chain.outbox import Outbox
    from poip_chain.chain.rpc import Call, Chain
    from poip_chain.cli.settings import CommonSettings, Effective
    from poip_chain.economic.network import Network
    from poip_chain.spec.types import Address

R = TypeVar("R")

_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


@dataclass
class Context:
    """The flags common to all commands, and what follows from them. Everything is made on first use."""

    config: Path | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    key_name: str | None = None
    password_file: Path | None = None
    yes: bool = False
    dry_run: bool = False

    @cached_property
    def effective(self) -> Effective[CommonSettings]:
        """The common settings with their sources."""
        from poip_chain.cli.settings import load_common

        return load_common(self.config, self.flags)

    @property
    def settings(self) -> CommonSettings:
        """The common settings."""
        return self.effective.values

    @cached_property
    def chain(self) -> Chain:
        """The chain at --rpc. Nothing is asked yet."""
        from poip_chain.chain.rpc import Chain

        return Chain(self.settings.rpc_url, self.settings.rpc_timeout)

    def close(self) -> None:
        """Close what was opened; the commands' frame calls it."""
        if "chain" in self.__dict__:
            self.chain.close()

    @cached_property
    def network(self) -> Network:
        """The deployed network, checked to be on this chain."""
        from poip_chain.chain.deployment import Deployment
        from poip_chain.economic.network import Network

        network = Network(self.chain, Deployment.load(self.settings.deployment_path))
        network.check()
        return network

    def key_path(self, name: str) -> Path:
        """A key file by its name in the data directory, or by its path."""
        if "/" in name or name.endswith(".json"):
            return Path(name).expanduser()
        return self.settings.keys / f"{name}.json"

    def new_key_path(self, name: str) -> Path:
        """Where a new key of this name goes. Raises InvalidInput for what is no name: a path, what looks like an address."""
        if not _KEY_NAME.fullmatch(name) or name.endswith(".json") or name.startswith("0x"):
            raise InvalidInput(
                f"{name[:80]!r} is not a name for a key: letters, digits, '-', '_' and '.', no path, no ending, no address.",
                hint=f"The file NAME.json is made in {self.settings.keys}; --data names another data directory.",
            )
        return self.key_path(name)

    def load_key(self, name: str) -> Key:
        """Open a key; the password comes from --password-file, POIP_PASSWORD, `<key>.password`, or the terminal."""
        from poip_chain.chain.keys import load, password_from

        path = self.key_path(name)
        if not path.exists():
            raise ConfigurationError(f"there is no key {name!r} ({path}).", hint=self._known_keys())
        return load(path, password_from(self.password_file, _prompt))

    @cached_property
    def key(self) -> Key:
        """The key that --key names. Raises ConfigurationError if none is named and there is not exactly one."""
        return self.load_key(self._chosen())

    def _chosen(self) -> str:
        if self.key_name is not None:
            return self.key_name
        found = self._key_files()
        if len(found) == 1:
            return found[0].stem
        raise ConfigurationError("which key? Name it with --key.", hint=self._known_keys())

    def _key_files(self) -> list[Path]:
        return sorted(self.settings.keys.glob("*.json"))

    def _known_keys(self) -> str:
        names = ", ".join(path.stem for path in self._key_files())
        return f"There are: {names}." if names else "`poip key new NAME` makes one."

    def address(self, text: str | None) -> Address:
        """An address from a 0x... text, the name of a key, or (None) the key that --key names, which is not opened."""
        from eth_utils.address import is_address, to_checksum_address

        from poip_chain.chain.keys import address_of
        from poip_chain.spec.types import Address

        if text is None:
            return address_of(self.key_path(self._chosen()))
        if text.startswith("0x"):
            if not is_address(text):
                raise InvalidInput(f"{text!r} is not an address.")
            return Address(to_checksum_address(text))
        path = self.key_path(text)
        if not path.exists():
            raise InvalidInput(f"{text!r} is neither an address nor a key.", hint=self._known_keys())
        return address_of(path)

    def node(self, text: str) -> Address:
        """A registered node by its address or the name of its first key. Raises NotFound."""
        address = self.address(text)
        self.network.registry.info(address)
        return address

    def need_tokens(self, owner: Address, amount: int) -> None:
        """Raises InsufficientFunds, with the balance and what to do, unless `owner` holds `amount` wei of the token."""
        from poip_chain.economic.money import format_amount
        from poip_chain.errors import InsufficientFunds

        held = self.network.token.balance(owner)
        if held < amount:
            raise InsufficientFunds(
                f"{format_amount(amount)} is more than {owner} has: its balance is {format_amount(held)}.",
                hint=f"Name a smaller amount, or send it {format_amount(amount - held)} more: "
                f"`poip token transfer {owner} AMOUNT --key NAME`, with a key that has tokens.",
            )

    @contextmanager
    def outbox(self, key: Key) -> Iterator[Outbox]:
        """The outbox of a key, held for the block."""
        from poip_chain.chain.outbox import FeePolicy, Outbox
        from poip_chain.chain.signing import GWEI

        fees = FeePolicy(max_fee=int(self.settings.max_fee_gwei * GWEI))
        path = self.settings.data / "outbox" / f"{key.address}.db"
        with Outbox(self.chain, key, path, fees=fees) as outbox:
            yield outbox

    def transact(self, title: str, call: Call, *, question: str = "", **details: Any) -> None:
        """Send one call with the key of --key: preview with --dry-run, else ask (unless --yes), send, wait, report.

        `question` '' asks nothing (no money moves). `details` are added to the JSON result.
        """
        self.transact_all(title, [call], question=question, **details)

    def transact_all(self, title: str, calls: Sequence[Call], *, question: str = "", **details: Any) -> None:
        """Send calls one after the other, each after the one before is mined. See `transact`."""
        from poip_chain.chain.outbox import new_idempotency_key

        with self.outbox(self.key) as outbox:
            if self.dry_run:
                self._preview(title, outbox, calls, details)
                return
            # A call that cannot succeed is refused before anybody is asked.
            outbox.preview(calls[0])
            if question:
                output.confirm(question, yes=self.yes)
            done = []
            with output.progress(title) as show:
                for call in calls:
                    show(f"{title}: {call.description}")
                    identity = new_idempotency_key(call.description)
                    outbox.send(call, identity)
                    done.append(outbox.wait(identity, self.settings.transaction_timeout))
        data = {
            "done": title,
            **details,
            "transactions": [
                {"hash": r.hash, "block": r.block_number, "gas_used": r.gas_used, "gas_cost": str(r.fee)} for r in done
            ],
        }
        output.result(data, f"{title}: done in block {done[-1].block_number} ({done[-1].hash}).")

    def _preview(self, title: str, outbox: Outbox, calls: Sequence[Call], details: dict[str, Any]) -> None:
        previews: list[dict[str, object]] = []
        for number, call in enumerate(calls):
            if number == 0:
                previews.append(outbox.preview(call).to_json())
            else:
                # It stands on the state that the ones before it leave behind, which is not there yet.
                previews.append({"description": call.description, "to": call.to, "data": "0x" + call.data.hex()})
        data = {"dry_run": title, **details, "transactions": previews}

        def text() -> None:
            click.echo(f"{title}: nothing was sent (--dry-run).")
            for preview in previews:
                click.echo("")
                output.fields({name: value for name, value in preview.items() if value is not None})

        output.result(data, text)


def _prompt(text: str) -> str:
    """Ask for a password. Raises ConfigurationError without a terminal."""
    import sys

    if not sys.stdin.isatty():
        raise ConfigurationError(
            "the key needs a password, and there is no terminal to ask for it.",
            hint="Give --password-file or set POIP_PASSWORD.",
        )
    return str(click.prompt(text, hide_input=True, err=True))


_LOCAL_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option("--json", "json_", is_flag=True, help="Print one JSON document."),
    click.option("--config", type=click.Path(path_type=Path), help="Settings file (TOML). [POIP_CONFIG]"),
    click.option("--data", type=click.Path(path_type=Path), help="Data directory, default ~/.poip. [POIP_DATA]"),
)

_SHARED_OPTIONS: tuple[Callable[..., Any], ...] = (
    *_LOCAL_OPTIONS[:2],
    click.option("--deployment", type=click.Path(path_type=Path), help="Deployment file. [POIP_DEPLOYMENT]"),
    click.option("--rpc", "rpc_url", metavar="URL", help="JSON-RPC endpoint. [POIP_RPC_URL]"),
    *_LOCAL_OPTIONS[2:],
)

_KEY_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option("--password-file", type=click.Path(path_type=Path), help="File with the key's password (mode 0600)."),
    click.option("--key", "key_name", metavar="NAME|FILE", help="The key that signs and pays."),
)

_SENDING_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option("--dry-run", is_flag=True, help="Show the transaction and its cost; send nothing."),
    click.option("--yes", "-y", is_flag=True, help="Do not ask."),
)


_KEY_NAMES = ("key_name", "password_file")
_SENDING_NAMES = ("yes", "dry_run")


def command_context(function: Callable[..., R]) -> Callable[..., R]:
    """Gives a command --json, --config, --data, --rpc, --deployment; it gets a `Context` as its first argument."""
    return _with(function, _SHARED_OPTIONS, ())


def local_context(function: Callable[..., R]) -> Callable[..., R]:
    """As `command_context` without --rpc and --deployment: for commands that only look at files of this machine."""
    return _with(function, _LOCAL_OPTIONS, ())


def key_context(function: Callable[..., R]) -> Callable[..., R]:
    """As `command_context`, and --key and --password-file."""
    return _with(function, (*_SHARED_OPTIONS, *_KEY_OPTIONS), _KEY_NAMES)


def sending_context(function: Callable[..., R]) -> Callable[..., R]:
    """As `key_context`, and --yes and --dry-run: for commands that send transactions."""
    options = (*_SHARED_OPTIONS, *_SENDING_OPTIONS, *_KEY_OPTIONS)
    return _with(function, options, (*_KEY_NAMES, *_SENDING_NAMES))


def _with(function: Callable[..., R], options: Sequence[Callable[..., Any]], names: Sequence[str]) -> Callable[..., R]:
    """`function` with the options; those called `names` go into the context, as the shared ones do."""

    @functools.wraps(function)
    def wrapper(
        *arguments: Any,
        json_: bool,
        config: Path | None,
        data: Path | None,
        rpc_url: str | None = None,
        deployment: Path | None = None,
        **keywords: Any,
    ) -> R:
        output.use_json(json_)
        flags = {"data": data, "rpc_url": rpc_url, "deployment": deployment}
        context = Context(
            config=config,
            flags={name: value for name, value in flags.items() if value is not None},
            **{name: keywords.pop(name) for name in names},
        )
        try:
            return function(context, *arguments, **keywords)
        finally:
            context.close()

    decorated: Callable[..., R] = wrapper
    for option in options:
        decorated = option(decorated)
    return decorated


class Amount(click.ParamType[int]):
    """An amount of the token: '1.5', '1.5 POIP', '100 wei'; the command gets wei."""

    name = "amount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse; a wrong amount is wrong usage."""
        if isinstance(value, int):
            return value
        from poip_chain.economic.money import parse_amount

        if str(value).strip().startswith("-"):
            self.fail(f"an amount must be positive, not {str(value)[:60]!r}.", param, ctx)
        try:
            return parse_amount(str(value))
        except PoipError as error:
            self.fail(str(error), param, ctx)


AMOUNT = Amount()


class Hash(click.ParamType[bytes]):
    """32 bytes as 0x-hex; the command gets bytes."""

    name = "hash"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Parse; anything else is wrong usage."""
        if isinstance(value, bytes):
            return value
        text = str(value)
        try:
            data = bytes.fromhex(text.removeprefix("0x"))
        except ValueError:
            data = b""
        if len(data) != 32:
            self.fail(f"{text[:80]!r} is not 32 bytes in hex.", param, ctx)
        return data


HASH = Hash()


def when(timestamp: int) -> str:
    """A Unix time in UTC, '-' for 0."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if timestamp else "-"

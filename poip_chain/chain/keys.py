"""Private keys in keystore v3 files (scrypt, AES-128-CTR), and where their passwords come from.

A key never appears in a repr, a log line or an error. Knows no chain.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eth_keys.datatypes import PrivateKey
from eth_utils.exceptions import ValidationError

from poip_chain.errors import ConfigurationError, InvalidInput, NotFound, Refused
from poip_chain.spec.eip712 import SECP256K1_N
from poip_chain.spec.strict_json import parse_json_object
from poip_chain.spec.types import Address

PasswordSource = Callable[[Path], str]
"""Given the path of a key file, returns its password or raises ConfigurationError."""

DEVELOPMENT_MNEMONIC = "test test test test test test test test test test test junk"
MAX_KEY_FILE_BYTES = 64 * 1024
PASSWORD_VARIABLE = "POIP_PASSWORD"
_SCRYPT_COST = 2**18
_LIGHT_SCRYPT_COST = 2**12


class Key:
    """An address and the private key that signs for it."""

    __slots__ = ("address", "private_key")

    def __init__(self, private_key: PrivateKey) -> None:
        self.private_key = private_key
        self.address = Address(private_key.public_key.to_checksum_address())

    @classmethod
    def from_bytes(cls, secret: bytes) -> Key:
        """The key of a 32-byte secret. Raises InvalidInput if it is no secp256k1 private key."""
        if len(secret) != 32 or not 0 < int.from_bytes(secret, "big") < SECP256K1_N:
            raise InvalidInput("a private key is 32 bytes, neither zero nor above the order of the curve.")
        return cls(PrivateKey(secret))

    @classmethod
    def generate(cls) -> Key:
        """A new random key, in memory only."""
        while True:
            secret = secrets.token_bytes(32)
            if 0 < int.from_bytes(secret, "big") < SECP256K1_N:
                return cls(PrivateKey(secret))

    def __repr__(self) -> str:
        return f"Key({self.address})"

    __str__ = __repr__

    def __reduce__(self) -> str:
        raise TypeError("a key is not pickled: load it again from its file.")


def create(path: Path, password: str, *, key: Key | None = None, light: bool = False) -> Key:
    """Write a new key (or the given one) to a keystore v3 file with mode 0600.

    `light` makes opening it fast and the password weak against guessing: development only.
    Raises Refused if the file exists; nothing is ever overwritten.
    """
    from eth_keyfile.keyfile import create_keyfile_json

    key = key or Key.generate()
    body = create_keyfile_json(
        key.private_key.to_bytes(),
        password.encode(),
        version=3,
        kdf="scrypt",
        iterations=_LIGHT_SCRYPT_COST if light else _SCRYPT_COST,
    )
    write_private(path, json.dumps({**body, "address": key.address[2:].lower()}, indent=2) + "\n")
    return key


def load(path: Path, password_source: PasswordSource) -> Key:
    """Open a key file.

    Raises NotFound if it is absent and ConfigurationError if it is damaged, readable by others, or the password is
    wrong.
    """
    from eth_keyfile.keyfile import decode_keyfile_json

    body = _read(path)
    password = password_source(path)
    try:
        secret = decode_keyfile_json(body, password.encode())
    except (KeyError, TypeError, NotImplementedError, AttributeError) as error:
        raise ConfigurationError(f"{path} is not a keystore v3 file.") from error
    except ValueError as error:
        raise ConfigurationError(f"the password does not open {path}.") from error
    try:
        key = Key.from_bytes(bytes(secret))
    except (InvalidInput, ValidationError) as error:
        raise ConfigurationError(f"{path} holds no valid private key.") from error
    stated = body.get("address")
    if isinstance(stated, str) and stated.lower().removeprefix("0x") != key.address[2:].lower():
        raise ConfigurationError(f"{path} states the address {stated} but holds the key of {key.address}.")
    return key


def address_of(path: Path) -> Address:
    """The address that a key file states, without opening it. Raises NotFound or ConfigurationError."""
    from eth_utils.address import is_address, to_checksum_address

    stated = _read(path, check_mode=False).get("address")
    if not isinstance(stated, str) or not is_address(stated):
        raise ConfigurationError(f"{path} does not state its address.")
    return Address(to_checksum_address(stated))


def password_from_file(password_file: Path) -> PasswordSource:
    """The first line of a file that only its owner can read."""

    def read(_: Path) -> str:
        try:
            _check_mode(password_file)
            text = password_file.read_text()
        except FileNotFoundError as error:
            raise ConfigurationError(f"there is no password file {password_file}.") from error
        return text.splitlines()[0] if text else ""

    return read


def password_from(password_file: Path | None = None, prompt: Callable[[str], str] | None = None) -> PasswordSource:
    """The usual order: the named file, the POIP_PASSWORD variable, `<key>.password` beside the key, then the prompt."""

    def read(path: Path) -> str:
        if password_file is not None:
            return password_from_file(password_file)(path)
        if PASSWORD_VARIABLE in os.environ:
            return os.environ[PASSWORD_VARIABLE]
        beside = path.with_suffix(".password")
        if beside.exists():
            return password_from_file(beside)(path)
        if prompt is not None:
            return prompt(f"Password of {path.name}")
        raise ConfigurationError(
            f"there is no password for {path}.",
            hint=f"Give a password file, set {PASSWORD_VARIABLE}, or put it into {beside} (mode 0600).",
        )

    return read


def development_key(index: int) -> Key:
    """Account `index` of the mnemonic that every development chain funds (m/44'/60'/0'/0/index)."""
    from eth_account import Account

    Account.enable_unaudited_hdwallet_features()
    account = Account.from_mnemonic(DEVELOPMENT_MNEMONIC, account_path=f"m/44'/60'/0'/0/{index}")
    return Key.from_bytes(bytes(account.key))


def create_development_key(path: Path, index: int | None = None) -> Key:
    """A key file with its password beside it, for devnets: account `index` of the development mnemonic, or a new key.

    An existing file is opened instead, so calling it again gives the same key.
    """
    if path.exists():
        return load(path, password_from())
    password = secrets.token_urlsafe(16)
    beside = path.with_suffix(".password")
    # A password that a killed run left behind belongs to no key: it is written anew before the key.
    beside.unlink(missing_ok=True)
    write_private(beside, password + "\n")
    return create(path, password, key=None if index is None else development_key(index), light=True)


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner can read, complete or not at all. Raises Refused if it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError as error:
            raise Refused(
                f"{path} exists already.", hint="Choose another name, or move the file away first."
            ) from error
    finally:
        temporary.unlink(missing_ok=True)


def permissions_problem(path: Path) -> str:
    """What is wrong with a secret file's permissions, '' if only its owner can read it."""
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"{path} can be read by other users (mode {mode:04o})." if mode & 0o077 else ""


def _check_mode(path: Path) -> None:
    problem = permissions_problem(path)
    if problem:
        raise ConfigurationError(problem, hint=f"Run: chmod 600 {path}")


def _read(path: Path, *, check_mode: bool = True) -> dict[str, Any]:
    try:
        if check_mode:
            _check_mode(path)
        if path.stat().st_size > MAX_KEY_FILE_BYTES:
            raise ConfigurationError(f"{path} is too large for a key file.")
        return parse_json_object(path.read_text())
    except FileNotFoundError as error:
        raise NotFound(f"there is no key file {path}.", hint="`poip key new` makes one.") from error
    except (ValueError, InvalidInput) as error:
        raise ConfigurationError(f"{path} is not a keystore v3 file: {error}") from error

"""Text to token ids and back, with the files that a model's registered hashes name.

The chat template is rendered as transformers renders it (Jinja sandbox, the same options and functions), but with fixed
inputs: a template that asks for the date always gets TEMPLATE_DATE, so that the same messages give the same ids for
ever and anyone can recompute a request's prompt_root. Tokenisation is the `tokenizers` library on tokenizer.json alone.

transformers itself is not imported: it costs seconds, and would bring its own version of every rule. A test compares
both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jinja2
from eth_hash.auto import keccak
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from poip_chain.errors import IntegrityError, InvalidInput, NotFound
from poip_chain.service.engine.model import chat_template, tokenizer_hash
from poip_chain.spec.objects import ModelSpec
from poip_chain.spec.strict_json import parse_json

if TYPE_CHECKING:
    import tokenizers

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date of every chat template: the one that Llama 3's template falls back to where no clock is given."""
MAX_FILE_BYTES = 64 * 2**20
MAX_MESSAGES = 1000
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HELD_TOKENS = 16
"""A character has at most four bytes, so more tokens than this without a whole character are no text: let them go."""


NORMALIZED_SHRINK = 4
"""A Unicode normal form makes at most one byte of four (a mathematical letter of four bytes becomes an ASCII one)."""


class TooLong(InvalidInput):
    """A text that no model's context can hold."""

    code = "context_length_exceeded"


class Tokenizer:
    """One model's tokenizer and chat template. Safe for many threads."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._settings = _read_json(directory / "tokenizer_config.json")

    @classmethod
    def load(cls, directory: Path, spec: ModelSpec) -> Tokenizer:
        """The tokenizer in `directory`, if its files are those that `spec` commits to. Raises IntegrityError if not."""
        found = (tokenizer_hash(directory), keccak(chat_template(directory).encode()))
        expected = (spec.tokenizer_hash, spec.chat_template_hash)
        for what, ours, theirs in zip(("tokenizer", "chat template"), found, expected, strict=True):
            if ours != theirs:
                raise IntegrityError(
                    f"the {what} in {directory} has hash 0x{ours.hex()}, the model registry says 0x{theirs.hex()}.",
                    hint="Use the model directory from which the model was registered.",
                )
        return cls(directory)

    def encode_chat(self, messages: Sequence[dict[str, Any]], *, most: int | None = None) -> tuple[int, ...]:
        """Token ids of a conversation, up to the point where the assistant speaks. `most`: see `most_bytes`.

        Raises InvalidInput; TooLong before any work is done on a text that cannot have `most` tokens or fewer.
        """
        return self._encode(self.render_chat(messages), special=False, most=most)

    def encode_text(self, text: str, *, most: int | None = None) -> tuple[int, ...]:
        """Token ids of plain text, with whatever the tokenizer puts before a text (such as BOS); else as encode_chat."""
        return self._encode(text, special=True, most=most)

    def most_bytes(self, tokens: int) -> int:
        """The most UTF-8 bytes that a text of so many tokens is taken to have.

        No token stands for more bytes than the longest in the vocabulary. A normalizer may shrink a text before that,
        which is allowed for as far as the Unicode normal forms go. A tokenizer that drops more than that (long runs of
        spaces, say) could take more text than this; such a text is refused, which is a clear answer and never a wrong
        one.
        """
        shrink = 1 if self._tokenizer.normalizer is None else NORMALIZED_SHRINK
        return tokens * self._longest_token * shrink

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        """The conversation as the model's chat template writes it. Raises InvalidInput if the template refuses it."""
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidInput(
                f"the model's chat template does not take these messages: {str(error)[:300]}",
                hint="Check the roles and their order.",
            ) from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental detokenizer."""
        return Detokenizer(self.decode)

    def _encode(self, text: str, *, special: bool, most: int | None) -> tuple[int, ...]:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidInput("the text holds half of a surrogate pair, which is not Unicode text.") from error
        if most is not None and size > self.most_bytes(most):
            raise TooLong(f"the text has {size} bytes, which is more than {most} tokens can stand for.")
        return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)

    @cached_property
    def _longest_token(self) -> int:
        """Bytes. A byte-level vocabulary writes one character for each byte, any other the text itself."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if "ByteLevel" not in repr(self._tokenizer.decoder):
            return max((len(token.encode()) for token in vocabulary), default=1)
        added = self._tokenizer.get_added_tokens_decoder().values()
        return max([len(token) for token in vocabulary] + [len(token.content.encode()) for token in added], default=1)

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        import tokenizers

        path = self.directory / "tokenizer.json"
        if not path.is_file():
            raise NotFound(f"{path} does not exist.", hint="Prepare the model again with `poip model prepare`.")
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise IntegrityError(f"{path} is not a tokenizer file: {error}") from error

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        tokens = {}
        for name in SPECIAL_TOKENS:
            value = self._settings.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[name] = text
        return tokens

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
        source = chat_template(self.directory)
        if not source:
            raise InvalidInput(
                "this model has no chat template.", hint="Use /v1/completions, or a model made for conversations."
            )
        return environment.from_string(source)


def conversation(messages: Any) -> list[dict[str, str]]:
    """OpenAI chat messages as the template gets them: role and text, nothing else. Raises InvalidInput.

    A content in parts is joined. What this model cannot see (images, tool calls) is refused, not dropped.
    """
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise InvalidInput(f"messages must be a list of 1 to {MAX_MESSAGES} messages.")
    result = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InvalidInput(f"{where} must be an object.")
        given = {name for name, value in message.items() if value is not None}
        if odd := sorted(given - {"role", "content", "name", "refusal", "annotations"}):
            raise InvalidInput(f"{where} has {odd[0]!r:.40}, which this model does not take.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not 0 < len(role) <= 32:
            raise InvalidInput(f"{where}.role must be a short text such as 'user'.")
        if isinstance(content, list):
            content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
        if not isinstance(content, str):
            raise InvalidInput(f"{where}.content must be a text, or a list of text parts.")
        # "developer" is what newer clients call the system's instructions.
        result.append({"role": "system" if role == "developer" else role, "content": content})
    return result


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InvalidInput(f"{where} must be a text part: this model takes nothing but text.")
    return str(part["text"])


class Detokenizer:
    """Turns a stream of token ids into a stream of text that never shows half a character.

    The pieces joined are `decode` of all ids, except that a run of more than MAX_HELD_TOKENS tokens that form no valid
    UTF-8 is let go as it stands.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        # Text depends on neighbours (leading spaces, merged bytes), so a little context is decoded again each time.
        self._context, self._shown = 0, 0

    def push(self, token_id: int) -> str:
        """The text that this token completes, often one word, sometimes nothing."""
        self._ids.append(token_id)
        return self._advance(final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        after = self._decode(self._ids[self._context :])
        held = len(self._ids) - self._shown
        if not final and after.endswith(REPLACEMENT) and held <= MAX_HELD_TOKENS:
            return ""
        if len(after) <= len(before) and not final:
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


class StopStrings:
    """Finds the first of some stop strings in streamed text and holds back what might still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be shown. After a stop string was found: nothing more, and `found` is true."""
        if self.found:
            return ""
        self._held += text
        hits = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if hits:
            self.found = True
            shown, self._held = self._held[: min(hits)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that is a beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; when rendering it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a prompt must not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise IntegrityError(f"{path} is larger than {MAX_FILE_BYTES} bytes.")
        data = parse_json(path.read_bytes())
    except InvalidInput as error:
        raise IntegrityError(f"{path} is not JSON: {error}") from error
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {}

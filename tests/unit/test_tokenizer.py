"""Chat template, tokenisation, incremental detokenisation and stop strings."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.errors import IntegrityError, InvalidInput
from poip_chain.service.engine.model import chat_template, tokenizer_hash
from poip_chain.service.engine.tokenizer import (
    MAX_HELD_TOKENS,
    NORMALIZED_SHRINK,
    StopStrings,
    Tokenizer,
    TooLong,
    conversation,
)
from poip_chain.spec.objects import ModelSpec
from tests.engines.tiny_tokenizer import IM_END, write_tokenizer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 世界 🌍!"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_the_template_is_rendered_and_tokenised(tokenizer: Tokenizer) -> None:
    text = tokenizer.render_chat(CHAT)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGrüße, 世界 🌍!<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode_chat(CHAT).count(IM_END) == 2
    assert tokenizer.decode(tokenizer.encode_text("Grüße 🌍")) == "Grüße 🌍"


def test_a_text_that_no_context_can_hold_is_refused_before_it_is_tokenised(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest token of this vocabulary is <|endoftext|>, 13 bytes: 13 bytes a token may fit, one more cannot."""
    assert tokenizer.most_bytes(2) == 26
    assert len(tokenizer.encode_text("<|endoftext|>" * 2, most=2)) == 2
    monkeypatch.setattr(Tokenizer, "_tokenizer", _NoEncoding(tokenizer._tokenizer))
    for text in ("a" * 27, "ü" * 14):
        with pytest.raises(TooLong, match="more than 2 tokens"):
            tokenizer.encode_text(text, most=2)
    with pytest.raises(TooLong):
        tokenizer.encode_chat([{"role": "user", "content": "a" * 200}], most=2)


class _NoEncoding:
    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        assert name != "encode", "the text was tokenised"
        return getattr(self._real, name)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_no_normal_form_shrinks_a_text_below_what_is_allowed_for(form: Any) -> None:
    """Every character of its own, and every composition: the most that a normalizer takes away."""
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            character = chr(code)
            for text in {character, unicodedata.normalize("NFD", character), unicodedata.normalize("NFKD", character)}:
                made = unicodedata.normalize(form, text)
                assert len(text.encode()) <= NORMALIZED_SHRINK * len(made.encode())


def test_a_normalizer_is_allowed_for(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import normalizers

    path = write_tokenizer(tmp_path) / "tokenizer.json"
    made = tokenizers.Tokenizer.from_file(str(path))
    made.normalizer = normalizers.NFKC()
    made.save(str(path))
    tokenizer = Tokenizer(tmp_path)
    # Mathematical letters: four bytes each, and one token each after NFKC.
    assert len(tokenizer.encode_text("\U0001d41a" * 13, most=13)) == 13
    assert tokenizer.most_bytes(1) == 13 * NORMALIZED_SHRINK


def test_the_template_has_no_clock_and_no_way_out(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path)
    template = directory / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}|{{ bos_token }}|{{ eos_token }}|{{ messages|tojson }}")
    assert Tokenizer(directory).render_chat([{"role": "user", "content": "<ü>"}]) == (
        '26 Jul 2024|<|im_start|>|<|im_end|>|[{"role": "user", "content": "<ü>"}]'
    )
    for hostile in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{% include '/etc/passwd' %}",
        "{{ nothing.there.at.all }}",
        "{{ raise_exception('no') }}",
    ):
        template.write_text(hostile)
        with pytest.raises(InvalidInput, match="chat template"):
            Tokenizer(directory).render_chat(CHAT)


def test_a_generation_block_and_loop_controls_render(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert Tokenizer(directory).render_chat(CHAT) == "Be brief."


def test_files_are_held_against_the_registered_hashes(tmp_path: Path) -> None:
    from eth_hash.auto import keccak

    directory = write_tokenizer(tmp_path)
    spec = ModelSpec(bytes(32), tokenizer_hash(directory), keccak(chat_template(directory).encode()), bytes(32))
    assert Tokenizer.load(directory, spec).encode_text("a")
    with (directory / "chat_template.jinja").open("a") as handle:
        handle.write(" ")
    with pytest.raises(IntegrityError, match="chat template"):
        Tokenizer.load(directory, spec)
    write_tokenizer(tmp_path)
    (directory / "tokenizer_config.json").write_text("{}")
    with pytest.raises(IntegrityError, match="tokenizer"):
        Tokenizer.load(directory, spec)


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidInput, match="surrogate"):
        tokenizer.encode_text("\ud800")


@given(text=st.text(max_size=60))
@settings(max_examples=150)
def test_streamed_text_is_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(token_id) for token_id in ids]
    whole = "".join(pieces) + detokenizer.finish()
    assert whole == tokenizer.decode(ids) == text
    if "�" not in text:
        assert all("�" not in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 258), max_size=MAX_HELD_TOKENS))
@settings(max_examples=150)
def test_any_ids_stream_to_what_they_decode_to(tokenizer: Tokenizer, ids: list[int]) -> None:
    detokenizer = tokenizer.detokenizer()
    assert "".join([*map(detokenizer.push, ids), detokenizer.finish()]) == tokenizer.decode(ids)


def test_endless_garbage_is_let_go(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode_text("é")[1]  # a continuation byte alone
    detokenizer = tokenizer.detokenizer()
    shown = "".join(detokenizer.push(broken) for _ in range(200))
    assert len(shown) >= 200 - 2 * MAX_HELD_TOKENS
    assert set(shown + detokenizer.finish()) == {"�"}


@given(
    text=st.text("abcx ", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(1, 5), max_size=40),
)
def test_stop_strings_cut_at_the_first_that_ends(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher, shown, rest = StopStrings(stops), "", text
    sizes = iter([*cuts, *[1] * len(text)])
    while rest and not matcher.found:
        size = next(sizes)
        shown, rest = shown + matcher.push(rest[:size]), rest[size:]
    shown += matcher.finish()
    present = [stop for stop in stops if stop in text]
    assert matcher.found == bool(present)
    if present:
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(stop) for stop in present)
        assert not any(stop in shown for stop in stops)
    else:
        assert shown == text


GOOD: list[tuple[Any, list[dict[str, str]]]] = [
    ([{"role": "user", "content": "a"}], [{"role": "user", "content": "a"}]),
    ([{"role": "developer", "content": "a"}], [{"role": "system", "content": "a"}]),
    (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"}],
        [{"role": "user", "content": "ab"}],
    ),
    ([{"role": "assistant", "content": "a", "tool_calls": None}], [{"role": "assistant", "content": "a"}]),
]


@pytest.mark.parametrize(("messages", "expected"), GOOD)
def test_messages_are_brought_into_one_form(messages: Any, expected: list[dict[str, str]]) -> None:
    assert conversation(messages) == expected


@pytest.mark.parametrize(
    "messages",
    [
        None,
        {},
        [],
        ["a"],
        [{}] * 1001,
        [{"role": "user"}],
        [{"role": 1, "content": "a"}],
        [{"role": "", "content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "assistant", "content": "a", "tool_calls": [{}]}],
        [{"role": "user", "content": "a", "wish": 1}],
    ],
)
def test_other_messages_are_refused(messages: Any) -> None:
    with pytest.raises(InvalidInput, match="messages"):
        conversation(messages)


@pytest.mark.slow
@pytest.mark.timeout(400)  # importing transformers alone takes a minute on a busy machine
def test_transformers_renders_and_tokenises_the_same(tmp_path: Path) -> None:
    import transformers

    directory = write_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer(directory)
    for chat in (CHAT, [{"role": "user", "content": "  <|im_end|> \n\t x"}], [*CHAT, *CHAT]):
        assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == ours.render_chat(chat)
        ids = theirs.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert tuple(ids) == ours.encode_chat(chat)
    assert tuple(theirs("Grüße 🌍")["input_ids"]) == ours.encode_text("Grüße 🌍")

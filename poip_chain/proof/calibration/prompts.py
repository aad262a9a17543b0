"""Prompts for a calibration: varied content from what every installation has, nothing fetched.

Where the texts come from: `prose` is the reference text that Python carries (pydoc_data.topics, the licence), `code` is
the source of Python's standard library, `data` is JSON and lists made of the standard library's tables, `languages` and
`chat` are sentences written for this file. `random` (token ids drawn evenly), `repeated` (one short cycle of ids for the
whole prompt) and `mixed` (text with random ids strewn in) are there to make distributions flat and numbers unusual, as a
client who wants to frame a node would. `long` is several hundred to a thousand tokens of prose or code. `searched` marks
receipts whose seed was searched for (`search`); its prompts are of the kinds `random`, `mixed` and `prose`.

The same seed and index give the same prompt on the same Python version. Knows the tokenizer's file; no model, no engine.
"""

from __future__ import annotations

import html.entities
import http
import json
import mimetypes
import random
import sysconfig
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from poip_chain.errors import InvalidInput
from poip_chain.service.engine.model import chat_template
from poip_chain.service.engine.tokenizer import Tokenizer

CONTENTS = ("prose", "code", "languages", "data", "chat", "random", "repeated", "mixed", "long", "searched")
"""Raw scores name them by their place here: append, never reorder."""
SEARCHED_KINDS = ("random", "mixed", "prose")
SHORT = (16, 96)
LONG = (400, 1000)
"""Prompt lengths in tokens."""
_SOURCES = (
    "argparse", "ast", "calendar", "cmd", "codecs", "contextlib", "csv", "datetime", "difflib", "fractions", "functools",
    "heapq", "inspect", "ipaddress", "locale", "mailbox", "optparse", "pathlib", "pickle", "pprint", "random", "shlex",
    "smtplib", "statistics", "string", "subprocess", "tarfile", "textwrap", "threading", "tokenize", "turtle", "typing",
)  # fmt: skip

_LANGUAGES = (
    "La marée monte deux fois par jour, et les pêcheurs du village règlent leurs horloges sur elle plutôt que sur la gare.",
    "Der Zug hielt mitten auf der Brücke, und niemand konnte sagen, ob wegen des Nebels oder wegen der Kühe auf dem Gleis.",
    "El panadero abre antes del amanecer; a esa hora solo pasan por la calle los gatos y el camión de la leche.",
    "A biblioteca da cidade guarda mapas tão antigos que metade dos rios desenhados neles já mudou de lugar.",
    "Il ponte è chiuso da martedì, perciò chi abita oltre il fiume deve scendere a piedi fino al mulino vecchio.",
    "De molenaar telt de zakken meel elke avond twee keer, want vorige winter ontbrak er altijd precies één.",
    "Старый маяк больше не светит, но капитаны всё ещё ищут его взглядом, когда выходят из залива в открытое море.",
    "Zimą jezioro zamarza tak mocno, że listonosz skraca sobie drogę i jeździ po nim rowerem do drugiej wsi.",
    "冬天的早上,卖豆浆的人把炉子推到巷口,孩子们背着书包排队,谁也不说话,只看着白气往上升。",
    "駅前の時計は五分進んでいるので、町の人はみんな少し早く家を出て、少し早く帰ってくる。",
    "할머니는 비가 오면 우산을 두 개 들고 나가셔서, 하나는 꼭 버스 정류장에 두고 돌아오신다.",
    "يفتح السوق أبوابه قبل شروق الشمس، ويبدأ الباعة يومهم بترتيب الخضار وشرب الشاي بالنعناع.",
    "बारिश के बाद गाँव की सड़क पर इतना पानी भर जाता है कि बच्चे स्कूल नाव से जाते हैं।",
    "Balıkçılar ağlarını onarırken radyodan hava durumunu dinler, ama sonunda yine martılara bakıp karar verirler.",
    "Vedenpinta laskee syksyllä niin paljon, että vanha kivisilta tulee taas näkyviin järven keskeltä.",
    "Κάθε καλοκαίρι το καΐκι φέρνει στο νησί εφημερίδες μιας εβδομάδας, και όλοι τις διαβάζουν σαν να είναι σημερινές.",
)
_QUESTIONS = (
    "Tell me about the sea.",
    "What is the capital of France, and why is it there?",
    "Write a short poem about a bridge in the fog.",
    "Explain to a child how a lock on a canal works.",
    "Give me three uses for an old bicycle wheel.",
    "Write a Python function that returns the n-th prime number.",
    "Translate into German: the train was late because of the cows.",
    "List the planets and one odd fact about each.",
    "Which is heavier, a litre of water or a litre of oil? Answer in one sentence.",
    "I cannot sleep. What should I try tonight?",
    "Summarise: the miller counts the sacks twice each evening, for last winter one was always missing.",
    "What would happen if the moon were half as far away?",
    "Write an e-mail to my landlord about the broken heating.",
    "Compute 17 * 23 and show the steps.",
    "Describe the taste of salt to someone who has never had any.",
    "Continue the story: the lighthouse had been dark for years when the letter came.",
)


class Prompts:
    """Makes prompts for one model's tokenizer. Raises NotFound or IntegrityError if its files cannot be read."""

    def __init__(self, model_directory: Path, vocab_size: int, seed: int, max_tokens: int = LONG[1]) -> None:
        self._tokenizer = Tokenizer(model_directory)
        self._vocab, self._seed, self.longest = vocab_size, seed, max_tokens

    def prompt(self, content: str, index: int) -> tuple[int, ...]:
        """The token ids of prompt `index` of a kind of content: 1 to `max_tokens` ids. Raises InvalidInput for an unknown
        kind."""
        if content not in CONTENTS:
            raise InvalidInput(f"there is no content {content!r}; known are {', '.join(CONTENTS)}.")
        rng = random.Random(f"{self._seed}:{content}:{index}")
        if content == "searched":
            content = rng.choice(SEARCHED_KINDS)
        length = min(self.longest, rng.randint(*(LONG if content == "long" else SHORT)))
        make: Callable[[random.Random, int], list[int]] = getattr(self, f"_{content}")
        ids = make(rng, length)[:length]
        return tuple(ids) or (self._any(rng),)

    def _prose(self, rng: random.Random, length: int) -> list[int]:
        return self._passage(rng, self._prose_text, length)

    def _code(self, rng: random.Random, length: int) -> list[int]:
        return self._passage(rng, self._code_text(rng.choice(_SOURCES)), length)

    def _long(self, rng: random.Random, length: int) -> list[int]:
        return (self._prose if rng.random() < 0.5 else self._code)(rng, length)

    def _languages(self, rng: random.Random, length: int) -> list[int]:
        return self._encode(" ".join(rng.sample(_LANGUAGES, 3)))

    def _data(self, rng: random.Random, length: int) -> list[int]:
        kind = rng.randrange(4)
        if kind == 0:
            rows: list[Any] = [{"code": s.value, "name": s.phrase, "ok": s < 400} for s in http.HTTPStatus]
        elif kind == 1:
            rows = [[name, value] for name, value in sorted(mimetypes.types_map.items())]
        elif kind == 2:
            rows = [{"entity": name, "code": code} for name, code in sorted(html.entities.name2codepoint.items())]
        else:
            rows = [[rng.randrange(10 ** rng.randrange(1, 7)) for _ in range(4)] for _ in range(40)]
        start = rng.randrange(len(rows))
        text = json.dumps(rows[start:] + rows[:start], indent=rng.choice((None, 1)))
        return self._encode(text[: 8 * length])

    def _chat(self, rng: random.Random, length: int) -> list[int]:
        questions = rng.sample(_QUESTIONS, 2)
        if not chat_template(self._tokenizer.directory):
            return self._encode("\n".join(questions))
        return list(self._tokenizer.encode_chat([{"role": "user", "content": questions[0]}]))

    def _random(self, rng: random.Random, length: int) -> list[int]:
        return [self._any(rng) for _ in range(length)]

    def _repeated(self, rng: random.Random, length: int) -> list[int]:
        cycle = [self._any(rng) for _ in range(rng.choice((1, 1, 2, 3, 5)))]
        return (cycle * length)[:length]

    def _mixed(self, rng: random.Random, length: int) -> list[int]:
        return [self._any(rng) if rng.random() < 0.15 else i for i in self._prose(rng, length)]

    def _any(self, rng: random.Random) -> int:
        return rng.randrange(self._vocab)

    def _passage(self, rng: random.Random, text: str, length: int) -> list[int]:
        start = rng.randrange(max(1, len(text) - 8 * length))
        return self._encode(text[start : start + 8 * length])

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode_text(text))

    @cached_property
    def _prose_text(self) -> str:
        from pydoc_data import topics

        return "\n".join(topics.topics[name] for name in sorted(topics.topics))

    def _code_text(self, name: str) -> str:
        folder = Path(sysconfig.get_path("stdlib"))
        try:
            return (folder / f"{name}.py").read_text(encoding="utf-8")
        except OSError:
            return Path(__file__).read_text(encoding="utf-8")

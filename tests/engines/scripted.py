"""A scripted engine process: stands in for vLLM where tests need an engine that fails on demand, in milliseconds.

Not a model. It speaks the part of vLLM's HTTP API that `service/engine/client.py` uses, and its answers are a function of
prompt, position and seed, drawn by the normative sampler from nine made-up log-probabilities, so that every check of the
client passes. Faults are set while it runs:

    POST /faults {"fault": NAME, "after": N}     after N tokens of each later request

    none            answers properly
    stall           goes silent and keeps the connection
    break           closes the connection
    die             the process exits
    wrong_id        one token that the sampler would not have chosen
    vocabulary      one token id outside the vocabulary
    wrong_prompt    reports another prompt than it was given
    refuse_input    answers as the plugin does when prompt_root does not match: the least likely token, then an end token
    error           status 500 before anything else

    POST /pace {"seconds": S}                    pause before each token
    GET /stats                                   {"requests", "running", "finished", "aborted"}

The answer ends with the end token after `answer_length(prompt)` tokens, unless ignore_eos or max_tokens say otherwise.

Run: python tests/engines/scripted.py --port 0 --port-file FILE
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from poip_chain.spec import sampler

LISTED = 9
FIRST_ORDINARY_ID = 16
MODEL = "poip"


def answer_length(prompt_ids: list[int]) -> int:
    """How many tokens the answer to a prompt has, its end token included: 6 to 21."""
    return 6 + _digest(prompt_ids, -1)[0] % 16


def listed_tokens(prompt_ids: list[int], position: int, vocab_size: int, end_id: int) -> list[tuple[int, float]]:
    """The nine (token id, log-probability) pairs at an output position, likeliest first."""
    digest = _digest(prompt_ids, position)
    span = vocab_size - FIRST_ORDINARY_ID
    start = int.from_bytes(digest[:4], "big")
    ids = [FIRST_ORDINARY_ID + (start + 7 * k) % span for k in range(LISTED)]
    if position == answer_length(prompt_ids) - 1:
        return [(end_id, -0.0001), *((token_id, -300.0 - k) for k, token_id in enumerate(ids[: LISTED - 1]))]
    return [(token_id, -0.75 - 0.4 * k - digest[4 + k] / 1000) for k, token_id in enumerate(ids)]


def choose(listed: list[tuple[int, float]], seed: bytes, position: int, temperature_milli: int) -> int:
    """The normative sampler over the listed tokens alone."""
    key = sampler.position_key(seed, position)

    def score(entry: tuple[int, float]) -> tuple[int, int]:
        noise = sampler.gumbel(sampler.uniform_bits(key, entry[0])) if temperature_milli else 0
        return sampler.noised(sampler.quantise_logit(entry[1]), temperature_milli, noise), -entry[0]

    return max(listed, key=score)[0]


def expected_answer(
    prompt_ids: list[int],
    seed: bytes,
    temperature_milli: int,
    max_tokens: int,
    *,
    vocab_size: int = 1000,
    end_id: int = 2,
) -> list[int]:
    """The output ids that the engine gives without faults and stop ids."""
    ids: list[int] = []
    while len(ids) < max_tokens and (not ids or ids[-1] != end_id):
        ids.append(choose(listed_tokens(prompt_ids, len(ids), vocab_size, end_id), seed, len(ids), temperature_milli))
    return ids


def _digest(prompt_ids: list[int], position: int) -> bytes:
    return hashlib.sha256(json.dumps([prompt_ids, position]).encode()).digest()


class ScriptedEngine(ThreadingHTTPServer):
    """The server; `fault`, `after` and `pace` may change while it runs."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, vocab_size: int, max_model_len: int, end_id: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.vocab_size, self.max_model_len, self.end_id = vocab_size, max_model_len, end_id
        self.fault, self.after, self.pace = "none", 0, 0.0
        self.lock = threading.Lock()
        self.stats = {"requests": 0, "running": 0, "finished": 0, "aborted": 0}

    def count(self, **changes: int) -> None:
        with self.lock:
            for name, change in changes.items():
                self.stats[name] += change

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: ScriptedEngine

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json({})
        elif self.path == "/version":
            self._json({"version": "scripted"})
        elif self.path == "/v1/models":
            self._json({"data": [{"id": MODEL, "max_model_len": self.server.max_model_len}]})
        elif self.path == "/stats":
            with self.server.lock:
                self._json(dict(self.server.stats))
        else:
            self._json({"error": {"message": "no such path"}}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/faults":
            self.server.fault, self.server.after = body["fault"], int(body.get("after", 0))
            self._json({})
        elif self.path == "/pace":
            self.server.pace = float(body["seconds"])
            self._json({})
        elif self.path == "/v1/completions":
            self._complete(body)
        else:
            self._json({"error": {"message": "no such path"}}, 404)

    def _complete(self, body: dict[str, Any]) -> None:
        server = self.server
        if server.fault == "error":
            self._json({"error": {"message": "the script says so"}}, 500)
            return
        server.count(requests=1, running=1)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        try:
            finished = self._tokens(body)
            server.count(running=-1, **({"finished": 1} if finished else {"aborted": 1}))
        except OSError:
            server.count(running=-1, aborted=1)

    def _tokens(self, body: dict[str, Any]) -> bool:
        """Stream; True if the answer was complete."""
        server = self.server
        prompt, arguments = body["prompt"], body["vllm_xargs"]
        seed, temperature = bytes.fromhex(arguments["poip_seed"]), arguments["poip_temperature_milli"]
        last_ids = set(body["stop_token_ids"]) | (set() if body["ignore_eos"] else {server.end_id})
        fault, after = server.fault, server.after
        for position in range(body["max_tokens"]):
            pace = server.pace
            if pace:
                time.sleep(pace)
            listed = listed_tokens(prompt, position, server.vocab_size, server.end_id)
            chosen = choose(listed, seed, position, temperature)
            logprobs = dict(listed)
            if fault != "none" and position >= after:
                if fault == "stall":
                    while True:  # until the other side closes
                        time.sleep(0.05)
                        self._chunk(b": \n\n")
                if fault == "break":
                    return False
                if fault == "die":
                    self.wfile.flush()
                    os._exit(1)
                if fault == "wrong_id":
                    chosen = min(logprobs, key=lambda i: logprobs[i])
                    logprobs[chosen] = -30.0
                if fault == "vocabulary":
                    chosen = server.vocab_size + 5
                    logprobs = {chosen: 0.0, **{i: -400.0 - k for k, i in enumerate(logprobs)}}
                if fault == "refuse_input":
                    chosen = 1 if position == after else server.end_id
                    logprobs[chosen] = -600.0 if position == after else 0.0
            ends = chosen in last_ids
            finish = "stop" if ends else "length" if position == body["max_tokens"] - 1 else None
            choice: dict[str, Any] = {
                "index": 0,
                "text": "",
                "token_ids": [chosen],
                "finish_reason": finish,
                "logprobs": {
                    "token_logprobs": [logprobs[chosen]],
                    "top_logprobs": [{f"token_id:{i}": value for i, value in logprobs.items()}],
                },
            }
            if position == 0:
                choice["prompt_token_ids"] = [*prompt, 7] if fault == "wrong_prompt" else prompt
            self._chunk(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            if finish is not None:
                break
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")
        return True

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--port-file", type=Path)
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--end-id", type=int, default=2)
    parser.add_argument("--pace", type=float, default=0.0)
    given = parser.parse_args()
    server = ScriptedEngine(given.port, given.vocab_size, given.max_model_len, given.end_id)
    server.pace = given.pace
    if given.port_file is not None:
        temporary = given.port_file.with_suffix(".tmp")
        temporary.write_text(str(server.server_address[1]))
        temporary.replace(given.port_file)
    server.serve_forever()


if __name__ == "__main__":
    main()

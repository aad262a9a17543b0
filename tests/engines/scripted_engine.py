"""A scripted stand-in for a vLLM server: it streams the tokens that a test gives it and records what it was asked.

It computes nothing. Tests that need real inference use the `engine` fixture of tests/e2e instead.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Event = dict[str, Any] | bytes
Script = Callable[[dict[str, Any]], Sequence[Event]]


def token_event(
    token: int,
    logprob: float,
    top: dict[int, float],
    *,
    finish: str | None = None,
    prompt: list[int] | None = None,
) -> dict[str, Any]:
    """One streamed event as vLLM sends it."""
    choice: dict[str, Any] = {
        "index": 0,
        "text": "",
        "logprobs": {
            "text_offset": [0],
            "tokens": [f"token_id:{token}"],
            "token_logprobs": [logprob],
            "top_logprobs": [{f"token_id:{t}": p for t, p in top.items()}],
        },
        "finish_reason": finish,
        "stop_reason": None,
        "token_ids": [token],
    }
    if prompt is not None:
        choice["prompt_token_ids"] = prompt
    return {"id": "cmpl-1", "object": "text_completion", "model": "poip", "choices": [choice]}


@dataclass
class ScriptedEngine:
    """An HTTP server on a free port. `script` maps a request body to the events of its answer; bytes are sent raw.

    After the events it sends [DONE] unless `break_off` is set. `hold` keeps the stream open until the client leaves.
    """

    script: Script
    status: int = 200
    break_off: bool = False
    hold: bool = False
    models: Any = field(default_factory=lambda: {"data": [{"id": "poip", "max_model_len": 64}]})
    requests: list[dict[str, Any]] = field(default_factory=list)
    aborted: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> ScriptedEngine:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                answers = {"/health": {}, "/v1/models": engine.models, "/version": {"version": "0.0-scripted"}}
                self._send(200 if self.path in answers else 404, json.dumps(answers.get(self.path)).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                engine.requests.append(body)
                if engine.status != 200:
                    self._send(engine.status, json.dumps({"error": {"message": "scripted refusal"}}).encode())
                    return
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                try:
                    for event in engine.script(body):
                        line = event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n"
                        self.wfile.write(line)
                        self.wfile.flush()
                    if engine.hold:
                        self.connection.settimeout(30)
                        if not self.connection.recv(1):  # the client closed its side
                            engine.aborted.set()
                    elif not engine.break_off:
                        self.wfile.write(b"data: [DONE]\n\n")
                except (BrokenPipeError, ConnectionResetError):
                    engine.aborted.set()

            def _send(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        """The base address."""
        return f"http://127.0.0.1:{self._server.server_port}"

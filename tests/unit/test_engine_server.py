"""How an engine is launched, as far as that can be seen without one."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from poip_chain.service.engine.server import EngineOptions, command, fast_dtype


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 sha_ni", "bfloat16"),
        ("flags\t\t: fpu avx2 amx_tile amx_bf16", "bfloat16"),
        ("Features\t: fp asimd sve bf16 i8mm", "bfloat16"),
        ("flags\t\t: fpu avx avx2 avx512f", "float32"),
        ("", "float32"),
    ],
)
def test_arithmetic_that_this_machine_is_fast_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, dtype: str
) -> None:
    information = tmp_path / "cpuinfo"
    information.write_text(f"processor\t: 0\nmodel name\t: Some bf17 CPU\n{flags}\n")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0")
    assert fast_dtype(information) == dtype
    assert fast_dtype(tmp_path / "absent") == "float32"


def test_a_gpu_engine_uses_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert fast_dtype(tmp_path / "absent") == "bfloat16"


def test_the_operator_has_the_last_word() -> None:
    line = command(EngineOptions(Path("model"), dtype="float16"), 8000)
    assert line[line.index("--dtype") + 1] == "float16"
    assert command(EngineOptions(Path("model")), 8000)[line.index("--dtype") + 1] in ("bfloat16", "float32")

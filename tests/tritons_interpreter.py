"""What tests of the fused loops share: they run on a GPU, and without one in Triton's interpreter.

It must be asked for before Triton is imported, hence a process of its own for each file of such tests.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marlin_gptq.quantization import fused, gptq, grid, loops, refine, solve

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Parameters of a fixture: where such a test runs.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def run(file: str, repository: Path) -> None:
    """The tests of `file` that need no GPU, in the interpreter; skips without Triton, fails where they fail."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton (it comes with torch's CUDA builds for Linux)")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "-k", "cpu", file],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=repository, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def device(kind: str) -> torch.device:
    """One of DEVICES; skips the CPU outside of the interpreter."""
    if kind == "cpu" and not INTERPRETED:
        pytest.skip("runs in the process that test_the_kernels_in_tritons_interpreter starts")
    return torch.device(kind)


def fresh_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loops have been tried or turned off yet; in the interpreter there are fewer candidates for a scale."""
    monkeypatch.setattr(loops, "_tried", {})
    monkeypatch.setattr(loops, "_enabled", True)
    if INTERPRETED:  # each candidate costs the interpreter as much time as it costs a GPU none
        monkeypatch.setattr(grid, "CLIP_RATIOS", grid.CLIP_RATIOS[::15])
        repair(monkeypatch)


def use_fused(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """On a GPU the loops are chosen as always; in the interpreter the choice is made for them."""
    if device.type == "cpu":
        for user in (gptq, refine, solve):
            monkeypatch.setattr(
                user,
                "inner_loops",
                lambda device, columns, *_: loops._fused(columns if columns in fused.GROUP_WIDTHS else None),
            )


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two things that Triton 3.6's interpreter does not do as a GPU does.

    It makes an int of an array of one element, which NumPy 2.4 no longer does; and it cuts float32 off to bfloat16.
    """
    from triton.runtime import interpreter

    patch, convert = interpreter._patch_lang_tensor, interpreter._convert_float

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(values, source, target, mode)
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(interpreter, "_convert_float", rounded)

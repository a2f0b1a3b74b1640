"""The picture of scripts/bench_kernel.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_report_is_drawn(tmp_path: Path, repository: Path, ending: str) -> None:
    spec = importlib.util.spec_from_file_location("bench_plot", repository / "scripts/bench_plot.py")
    assert spec is not None and spec.loader is not None
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    rows = [
        {"k": k, "n": n, "m": m, "times_torch": 2 + m / 16, "chain_times_torch": 2.5}
        for k, n in ((4096, 4096), (8192, 1024))
        for m in (1, 16)
    ]
    target = tmp_path / f"picture.{ending}"
    plot.draw({"rows": rows, "dtype": "float16", "group_size": 128, "device": "a GPU"}, target)
    written = target.read_bytes()
    assert written.startswith(b"\x89PNG" if ending == "png" else b"<?xml") and len(written) > 5000
    if ending == "svg":
        assert b"8192, 1024" in written or written.count(b"<use ") > 20  # text may be drawn as shapes

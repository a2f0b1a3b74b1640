"""scripts/check_architectures.py: what docs/architectures.md says of each architecture holds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
try:
    from check_architectures import ARCHITECTURES, judge
finally:
    sys.path.pop(0)

TEXT = (ROOT / "docs" / "architectures.md").read_text("utf-8")
ROWS = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| ")]
TABLE = {name: cells for name, *cells in ROWS[1:]}
REFUSALS = dict(re.findall(r"^(\[\d+\]) `(.*)`$", TEXT, flags=re.MULTILINE))
# One of each kind: tuples and ALiBi, weights before block 0 and behind the last, scalars, a router further inside, a
# cache of its own.
KINDS = {"falcon with alibi", "opt 350M", "bloom", "apertus", "hunyuan-moe", "minimax"}


def test_the_table_has_every_architecture_and_no_failure() -> None:
    assert TABLE.keys() == ARCHITECTURES.keys()
    assert not [name for name, cells in TABLE.items() if any("FAIL" in cell for cell in cells)]


# Of the others preset `marlin` alone: with their blocks tuned they would take ten minutes, for code that the kinds run.
PAIRS = [pytest.param(name, preset, id=f"{name}-{preset}") for name in sorted(KINDS) for preset in ("marlin", "fast")]
PAIRS += [
    pytest.param(name, "marlin", id=f"{name}-marlin", marks=pytest.mark.slow)
    for name in ARCHITECTURES
    if name not in KINDS
]


@pytest.mark.parametrize(("name", "preset"), PAIRS)
def test_an_architecture_is_as_the_table_says(name: str, preset: str, tmp_path: Path) -> None:
    told = TABLE[name][["marlin", "fast"].index(preset)]
    if told.startswith("refused "):
        told = f"refused: {REFUSALS[told.removeprefix('refused ')]}"
    assert judge(name, preset, tmp_path).removeprefix("works: ") == told

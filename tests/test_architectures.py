"""scripts/check_architectures.py: what docs/architectures.md says of each architecture holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
try:
    from check_architectures import ARCHITECTURES, judge
finally:
    sys.path.pop(0)

ROWS = [line.split(" | ") for line in (ROOT / "docs" / "architectures.md").read_text("utf-8").splitlines()]
TABLE = {row[0].removeprefix("| "): [cell.removesuffix(" |") for cell in row[1:]] for row in ROWS if len(row) == 3}
# One of each kind: tuples and ALiBi, weights before block 0 and behind the last, scalars, a router further inside, a
# cache of its own.
KINDS = {"falcon with alibi", "opt 350M", "bloom", "apertus", "hunyuan-moe", "minimax"}


def test_the_table_has_every_architecture_and_no_failure() -> None:
    assert TABLE.keys() - {"architecture"} == ARCHITECTURES.keys()
    assert not [name for name, cells in TABLE.items() if any("FAIL" in cell for cell in cells)]


@pytest.mark.parametrize("preset", ["marlin", "fast"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_an_architecture_is_as_the_table_says(name: str, preset: str, tmp_path: Path) -> None:
    told = TABLE[name][["marlin", "fast"].index(preset)]
    assert judge(name, preset, tmp_path).removeprefix("works: ") == told

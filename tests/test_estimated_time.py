"""estimated_time.py: what adds to the time of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import SEVEN_B, config_only

from marlin_gptq import QuantizationConfig
from marlin_gptq.estimated_time import seconds
from marlin_gptq.job import Job
from marlin_gptq.modeling.outline import outline


def test_time_grows_with_its_parts(tmp_path: Path) -> None:
    found = outline(config_only(tmp_path / "model", **SEVEN_B), QuantizationConfig())
    few, many = (seconds(found, Job(tokens, 4096, 2, 10**9), 1e14, 1e12) for tokens in (128_000, 256_000))
    assert few < many < 2 * few
    unclipped = seconds(found, Job(128_000, 4096, 2, 10**9, clip=False), 1e14, 1e12)
    tried = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 76
    assert few - unclipped == pytest.approx(1.25 * tried / 1e12)
    assert seconds(found, Job(0, 0, 2, 10**9), 1e14, 1e12) == 0
    plain = Job.of(QuantizationConfig(), 128_000, 4096, 2, 10**9)
    assert seconds(found, plain, 1e14, 1e12) == few
    for changes in (
        {"refine_sweeps": 1},
        {"signed_scales": True},
        {"correct_target": 0.5},
        {"tune_block_steps": 9},
        {"beam_width": 2},
    ):
        more = Job.of(QuantizationConfig(**changes), 128_000, 4096, 2, 10**9)  # type: ignore[arg-type]
        assert seconds(found, more, 1e14, 1e12) > few

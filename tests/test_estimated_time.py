"""estimated_time.py: what adds to the time of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import SEVEN_B, config_only

from marlin_gptq import QuantizationConfig
from marlin_gptq.estimated_time import TRY_PRODUCTS, block_seconds, seconds
from marlin_gptq.job import Job
from marlin_gptq.known_gpus import KNOWN
from marlin_gptq.modeling.outline import outline


def test_time_grows_with_its_parts(tmp_path: Path) -> None:
    found = outline(config_only(tmp_path / "model", **SEVEN_B), QuantizationConfig())
    few, many = (seconds(found, Job(tokens, 4096, 2, 10**9), 1e14) for tokens in (128_000, 256_000))
    assert few < many < 2 * few
    unclipped = seconds(found, Job(128_000, 4096, 2, 10**9, clip=False), 1e14)
    tried = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 76
    assert few - unclipped == pytest.approx(1.25 * TRY_PRODUCTS * tried / 1e14)
    assert seconds(found, Job(0, 0, 2, 10**9), 1e14) == 0
    plain = Job.of(QuantizationConfig(), 128_000, 4096, 2, 10**9)
    assert seconds(found, plain, 1e14) == few
    for changes in (
        {"refine_sweeps": 1},
        {"signed_scales": True},
        {"correct_target": 0.5},
        {"tune_block_steps": 9},
        {"beam_width": 2},
    ):
        more = Job.of(QuantizationConfig(**changes), 128_000, 4096, 2, 10**9)  # type: ignore[arg-type]
        assert seconds(found, more, 1e14) > few


def test_blocks_take_what_their_linears_do(tmp_path: Path) -> None:
    job = Job(128_000, 4096, 2, 10**9)
    found = outline(config_only(tmp_path / "model", **SEVEN_B), QuantizationConfig())
    each = block_seconds(found, job, 1e14)
    assert len(each) == 32 and sum(each) == pytest.approx(seconds(found, job, 1e14)) and len(set(each)) == 1
    less = outline(tmp_path / "model", QuantizationConfig(skip=(r"layers\.0\.",)))
    assert block_seconds(less, job, 1e14)[0] < block_seconds(less, job, 1e14)[1] == each[1]


def test_a_7b_on_the_gpu_that_was_measured(tmp_path: Path) -> None:
    """27 s and 47 s, loading and saving aside (docs/benchmarks.md)."""
    found = outline(config_only(tmp_path / "model", **SEVEN_B), QuantizationConfig())
    for tokens, measured in ((307_705, 27), (605_835, 47)):
        job = Job.of(QuantizationConfig(), tokens, 4004, 2, 10**9)
        assert seconds(found, job, KNOWN["h200"].products) == pytest.approx(measured, rel=0.2)

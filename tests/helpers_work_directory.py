"""Runs with a work directory that can be killed anywhere, and what they write, for several test files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers import random_samples

from marlin_gptq import QuantizationConfig, quantize_model
from marlin_gptq.work_directory import WorkDirectory

CPU = torch.device("cpu")
BLOCKS = 3
SAMPLES = random_samples(6)
TIMES = ("seconds", "output", "costs")


class Killed(BaseException):
    """Stands for a SIGKILL inside one process: no handler of the code under test may catch it."""


def run(source: Path, output: Path, directory: Path | None, config: QuantizationConfig | None = None, **options: Any):
    """Quantize; in `directory`, a new run or, if there is one, that run gone on with."""
    config, samples = config or QuantizationConfig(clip=False), options.pop("samples", SAMPLES)
    options = {"device": CPU, "shard_size": 300_000} | options
    if directory is None:
        return quantize_model(source, output, config, samples, **options)
    begun = (directory / "run.json").exists()
    with WorkDirectory.resume(directory) if begun else WorkDirectory.new(directory, {}) as work:
        if begun and work.finished(output):
            return None
        if begun:
            assert all(map(torch.equal, work.samples(), samples))
        return quantize_model(source, output, config, samples, work=work, **options)


def content_of(directory: Path) -> dict[str, Any]:
    """Every file's bytes; of the log all but times and places, the card (which holds the time) by its other lines."""
    content: dict[str, Any] = {path.name: path.read_bytes() for path in directory.iterdir()}
    log = json.loads(content["quantize_log.json"])
    content["quantize_log.json"] = {key: value for key, value in log.items() if key not in TIMES}
    for record in content["quantize_log.json"]["records"]:
        record.pop("seconds")
    content["README.md"] = [line for line in content["README.md"].decode().splitlines() if "| time |" not in line]
    return content


def blocks_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("block-*.json"))

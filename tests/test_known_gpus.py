"""known_gpus.py: GPUs by the names that drivers have for them."""

from __future__ import annotations

import pytest

from marlin_gptq.known_gpus import KNOWN, USUAL, named


@pytest.mark.parametrize(
    ("device_name", "known"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3090", "3090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L4", "l4"),
    ],
)
def test_drivers_names(device_name: str, known: str) -> None:
    assert named(device_name) == KNOWN[known]


@pytest.mark.parametrize(
    "device_name", ["Tesla V100-SXM2-16GB", "NVIDIA A100X", "NVIDIA L40", "NVIDIA GeForce RTX 3090 Ti", ""]
)
def test_what_is_not_known_is_measured(device_name: str) -> None:
    assert named(device_name) is None


def test_the_usual_one_is_known() -> None:
    assert USUAL in KNOWN and all(gpu.memory >= 24e9 and gpu.products > 1e13 for gpu in KNOWN.values())

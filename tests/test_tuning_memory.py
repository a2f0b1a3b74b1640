"""tuning/memory.py: the plan of a step's memory, and the error where none fits."""

from __future__ import annotations

import pytest
import torch

from marlin_gptq import QuantizationError
from marlin_gptq.device_memory import free_bytes
from marlin_gptq.tuning.memory import Sizes, plan

LLAMA_7B = Sizes(6_476_005_376, 262_410_240, 128, 32, 4096, 11008)


def test_free_memory_counts_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 80)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 30)
    assert free_bytes(torch.device("cuda")) == 55


def test_a_7b_fits_one_large_gpu_with_codes_and_a_small_one_without() -> None:
    whole = plan(LLAMA_7B, batch=16, length=1024, tune_codes=True, free=140 * 10**9)
    assert whole.checkpointing and whole.micro_batch >= 1 and whole.bytes < 126 * 10**9
    small = plan(LLAMA_7B, batch=16, length=1024, tune_codes=False, free=40 * 10**9)
    assert small.checkpointing and small.bytes < 36 * 10**9
    tiny = plan(Sizes(3 * 10**6, 2 * 10**6, 128, 4, 256, 768), batch=16, length=1024, tune_codes=True, free=2 * 10**10)
    assert (tiny.micro_batch, tiny.checkpointing) == (16, False)


def test_too_little_memory_is_one_sentence() -> None:
    with pytest.raises(QuantizationError, match=r"needs about \d+\.\d GB on the device and 24\.0 GB are free; use "):
        plan(LLAMA_7B, batch=16, length=1024, tune_codes=True, free=24 * 10**9)
    with pytest.raises(QuantizationError, match=r"are free; use --tune-steps 0$"):
        plan(LLAMA_7B, batch=1, length=1024, tune_codes=False, free=4 * 10**9)

"""Text to tune on: the calibration documents in windows of one length, and more that the model writes itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from marlin_gptq.errors import InputError

WINDOW = 1024
# Windows of packed calibration text that pass a block at once.
PACKED_BATCH = 8
_PROMPT = 16


def windows(samples: list[Tensor], length: int) -> Tensor:
    """The documents one after the other, cut into windows: int64 [windows, length]; the tail is dropped.

    Teacher and student see the same windows, so it does no harm that attention crosses documents.
    """
    tokens = torch.cat(samples)
    count = len(tokens) // length
    if count == 0:
        raise InputError(f"samples: got {len(tokens)} tokens, tuning needs at least one window of {length}")
    return tokens[: count * length].view(count, length)


def window_length(samples: list[Tensor], context: int | None) -> int:
    """1024 tokens, or what the model's context or the text holds."""
    return min(WINDOW, context or WINDOW, sum(map(len, samples)))


def packed(samples: list[Tensor], context: int | None, batch: int = PACKED_BATCH) -> list[Tensor]:
    """The documents as batches of equal windows, int64 [batch, T] each: fewer and fuller forward passes."""
    return list(windows(samples, window_length(samples, context)).split(batch))


@torch.no_grad()
def written_by_model(
    model: Any, samples: list[Tensor], *, count: int, length: int, batch: int, seed: int, progress: Any = None
) -> Tensor:
    """`count` windows int64 [count, length] sampled from the model itself at temperature 1, on the CPU.

    Each begins with a few tokens from a random place of a calibration document. More text than anybody collected, from
    the distribution that is to be kept (Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language
    Models", arXiv 2305.17888).
    """
    tokens = torch.cat(samples)
    prompt = min(_PROMPT, length - 1, len(tokens))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - prompt + 1, (count,), generator=generator)
    prompts = tokens[starts[:, None] + torch.arange(prompt)]
    device = next(model.parameters()).device
    sampler = torch.Generator(device=device).manual_seed(seed)
    written = []
    for first in range(0, count, batch):
        ids = prompts[first : first + batch].to(device)
        parts, cache = [ids], None
        for _ in range(length - prompt):
            output = model(input_ids=parts[-1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            probabilities = torch.softmax(output.logits[:, -1].float(), dim=-1)
            parts.append(torch.multinomial(probabilities, 1, generator=sampler))
        written.append(torch.cat(parts, dim=1).cpu())
        if progress is not None:
            progress(min(first + batch, count), count)
    return torch.cat(written)

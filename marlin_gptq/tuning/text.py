"""Text to tune on: the calibration documents in windows of one length, and more that the model writes itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from marlin_gptq.errors import InputError, QuantizationError
from marlin_gptq.modeling.attention import sdpa_configs, shares_keys
from marlin_gptq.modeling.decoding import Decoder, why_not
from marlin_gptq.modeling.sampling import draw

WINDOW = 1024
# Windows of packed calibration text that pass a block at once.
PACKED_BATCH = 8
_PROMPT = 16
# Tokens between two reports of progress while text is written.
_TOLD = 64


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

    Draws come from a generator of their own: the same seed on the same device gives the same text. `progress` is told
    (windows written, windows in all), a part of a batch as so many windows.
    """
    tokens = torch.cat(samples)
    prompt = min(_PROMPT, length - 1, len(tokens))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - prompt + 1, (count,), generator=generator)
    prompts = tokens[starts[:, None] + torch.arange(prompt)]
    device = next(model.parameters()).device
    sampler = torch.Generator(device=device).manual_seed(seed)
    graphs = _recorded(model, length)
    decoder: Decoder | None = None
    written: list[Tensor] = []
    if progress is not None:
        progress(0, count)
    for ids in prompts.split(batch):
        if decoder is None or decoder.batch != len(ids):  # the last batch may be smaller
            decoder = None  # its cache goes before there is another
            decoder = Decoder(model, len(ids), length, graphs=graphs)
        window = torch.empty(len(ids), length, dtype=torch.int64, device=device)
        window[:, :prompt] = ids.to(device)
        logits = decoder.prefill(window[:, :prompt])
        for place in range(prompt, length):
            if place > prompt:
                decoder.tokens.copy_(window[:, place - 1])
                logits = decoder.step()
            window[:, place] = draw(logits, sampler)
            if progress is not None and ((place + 1) % _TOLD == 0 or place + 1 == length):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # the host asks for steps long before they are done
                share = len(ids) * (place + 1 - prompt) // (length - prompt)
                progress(sum(map(len, written)) + share, count)
        if not torch.isfinite(logits).all():  # once NaN is among a text's keys and values it stays
            raise QuantizationError(
                f"logits: NaN or Inf in {str(logits.dtype).removeprefix('torch.')} after {length} tokens that the "
                "model wrote itself; check the checkpoint, or use --tune-written 0"
            )
        written.append(window.cpu())
    return torch.cat(written)


def _recorded(model: Any, length: int) -> bool:
    """Whether steps are recorded, on a cache of fixed size: launched one by one, small kernels wait for the host.

    Not where query heads share keys with an attention other than sdpa: with a cache of fixed size transformers then
    copies all of it out for every query head at every step, which costs a large batch more than the waiting.
    """
    copied = shares_keys(model.config) and not sdpa_configs(model)
    return not copied and not why_not(model, length, graphs=True, compiled=False)

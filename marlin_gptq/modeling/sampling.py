"""The next token, from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Logits [B, V] → token ids int64 [B].

    temperature 0 takes the most likely token; else tokens are drawn from softmax(logits / temperature), of which only
    the smallest set of most likely tokens with a probability of at least `top_p` together stays (nucleus sampling:
    Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020). ValueError for values out of range.
    """
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}, expected 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected more than 0 and at most 1")
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p == 1:
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    ranked, order = probabilities.sort(dim=-1, descending=True)
    ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)  # what lies before a token suffices
    return order.gather(-1, torch.multinomial(ranked, 1, generator=generator))[:, 0]


def draw(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Logits [B, V] → token ids int64 [B] drawn from softmax(logits), without waiting for the device.

    As `sample` at temperature 1, with no check of the logits: of exponential times with rates softmax(logits) the
    first to come is that of token v with just its probability, and multiplying all rates by one number changes no
    order (the "Gumbel-max trick" in logarithms: Gumbel, "Statistical Theory of Extreme Values", 1954).
    """
    times = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    # A time of 0 is one that float32 could not tell from it.
    return (logits - times.clamp_(min=torch.finfo(torch.float32).tiny).log_()).argmax(-1)

"""The exceptions users meet. Each carries one sentence: what came, what is needed, how to get there.

The command line maps all of them to exit code 2 without a traceback.
"""

from __future__ import annotations

LONGEST = 2_000  # characters


class MarlinGPTQError(Exception):
    """Base of everything a user can cause and mend."""

    def __str__(self) -> str:
        """The sentence, cut where a value in it, from somebody else's file, would make it endless."""
        sentence = super().__str__()
        return sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST]} …"


class InputError(MarlinGPTQError, ValueError):
    """An argument, file or model that cannot be used as asked."""


class CheckpointError(MarlinGPTQError):
    """Checkpoint files or tensors that are missing, truncated or do not fit together."""


class QuantizationError(MarlinGPTQError):
    """Numbers that cannot be quantized (NaN, Inf, a Hessian that resists damping); names the layer."""

"""The currency of the project: codes and scales of one linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers and the steps of their grids.

    codes       uint8 [out_features, in_features], values 0 … 15.
    scales      [out_features, groups] in the stored dtype (that of the model).
    zeros       uint8 [out_features, groups], or None for a symmetric grid, whose zero is code 8.
    group_size  input features per scale; -1 is the whole row.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int

    def dequantize(self) -> Tensor:
        """scale · (code − zero), float32 [out_features, in_features]."""
        columns = self.codes.shape[1] // self.scales.shape[1]
        zeros = 8.0 if self.zeros is None else self.zeros.float().repeat_interleave(columns, dim=1)
        return (self.codes.float() - zeros) * self.scales.float().repeat_interleave(columns, dim=1)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The output features start … stop − 1 as a weight of their own."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return QuantizedWeight(self.codes[start:stop], self.scales[start:stop], zeros, self.group_size)


def join_rows(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Weights of the same inputs and groups as one, their output features one after the other: inverse of `rows`."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
        parts[0].group_size,
    )


def columns_per_group(in_features: int, group_size: int) -> int:
    """Input features that share a scale; ValueError if the groups do not fill the row."""
    if group_size == -1:
        return in_features
    if in_features % group_size:
        raise ValueError(f"group_size: got {group_size}, which does not divide in_features {in_features}")
    return group_size


def round_to_codes(weight: Tensor, scales: Tensor) -> Tensor:
    """Nearest codes of a symmetric grid, uint8; `scales` broadcasts against `weight`."""
    return torch.round(weight / scales.float()).add_(8).clamp_(0, 15).to(torch.uint8)

"""MarlinLinear: a linear layer held as packed 4-bit codes, run by the kernel on a GPU, in plain torch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marlin_gptq.formats import marlin
from marlin_gptq.kernel import gemm, set_overlap, why_not
from marlin_gptq.quantization.weight import QuantizedWeight, columns_per_group


class MarlinLinear(nn.Module):
    """y = x · Wᵀ + bias with W [out_features, in_features] in the Marlin layout.

    Buffers, of the names they have on disk (K, N: the features padded to what the kernel takes):
        qweight  int32 [K/16, 2N]
        scales   float16 or bfloat16 [groups, N], stored order
        qzeros   int32 [groups, N/8], zero points of an asymmetric grid, or None (code 8 is zero)
        bias     [out_features] of the dtype of the scales, or None

    N is out_features rounded up to 64; K is in_features rounded up to 16, which only a group size of -1 can need.
    Padding has scale 0: it adds nothing to any output. Raises ValueError for a group size that does not divide
    in_features.
    """

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        *,
        bias: bool = False,
        symmetric: bool = True,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        groups = in_features // columns_per_group(in_features, group_size)
        k, n = padded_features(in_features, out_features)
        self.register_buffer("qweight", torch.zeros(k // 16, 2 * n, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.zeros(groups, n, dtype=dtype, device=device))
        zeros = None if symmetric else torch.zeros(groups, n // 8, dtype=torch.int32, device=device)
        self.register_buffer("qzeros", zeros)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self._dense: Tensor | None = None

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> MarlinLinear:
        """Pack a QuantizedWeight; `bias` [out_features] is stored in the dtype of the scales."""
        out_features, in_features = weight.codes.shape
        layer = cls(
            in_features,
            out_features,
            weight.group_size,
            bias=bias is not None,
            symmetric=weight.zeros is None,
            dtype=weight.scales.dtype,
            device="meta",
        )
        layer.qweight, layer.scales = pack(weight)
        if weight.zeros is not None:
            layer.qzeros = pack_zeros(weight.zeros)
        if bias is not None:
            layer.bias = bias.to(weight.scales.dtype)
        return layer

    def dequantize(self) -> Tensor:
        """scale · (code − zero), float32 [out_features, in_features]."""
        return dequantize(self.tensors())[: self.out_features, : self.in_features]

    def hold_dense(self, hold: bool) -> None:
        """Where no kernel runs: keep the dequantized weight between calls (8 times the memory), or let it go."""
        self._dense = self.dequantize() if hold else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] in the dtype of the scales → [..., out_features].

        On other devices than CUDA float32 is taken as well and computed in float32.
        """
        return linear(x, self.tensors(), self.group_size, self.in_features, self.out_features, self._dense)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors this layer has on disk, by name, in the layout of the file."""
        named = {"qweight": self.qweight, "scales": self.scales, "qzeros": self.qzeros, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def prepare_for_device(self) -> None:
        """Called when the weights are there, on the device that is to run them, and after every move to another one.

        The place for a run-time layout: whatever it puts in place of the buffers, `tensors` gives the layout of the
        file back. At present the Marlin layout runs as it is. On a GPU with the kernel all writing is waited for, and
        kernels may from then on read weights ahead of the work in front of them (`marlin_gptq.kernel.set_overlap`).
        """
        if self.qweight.is_cuda and not why_not(self.qweight.device.index):
            torch.cuda.synchronize(self.qweight.device)
            set_overlap(True)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> MarlinLinear:
        super()._apply(fn, recurse)  # .to(device), .cuda(), …
        if self._dense is not None:
            self.hold_dense(True)
        self.prepare_for_device()
        return self


def prepare_for_device(model: nn.Module) -> None:
    """Every MarlinLinear of the model: see MarlinLinear.prepare_for_device."""
    for module in model.modules():
        if isinstance(module, MarlinLinear):
            module.prepare_for_device()


def linear(
    x: Tensor,
    tensors: dict[str, Tensor],
    group_size: int,
    in_features: int,
    out_features: int,
    dense: Tensor | None = None,
) -> Tensor:
    """x [..., in_features] times the weight that `tensors` (MarlinLinear.tensors) hold → [..., out_features].

    dense: the same weight, float32 [out_features, in_features], where it was kept.
    """
    rows = x.reshape(-1, in_features)
    scales, bias = tensors["scales"], tensors.get("bias")
    if dense is not None or (x.dtype == torch.float32 and not x.is_cuda):
        weight = dequantize(tensors)[:out_features, :in_features] if dense is None else dense
        y = F.linear(rows.float(), weight, None if bias is None else bias.float()).to(x.dtype)
        return y.reshape(*x.shape[:-1], out_features)
    k, n = padded_features(in_features, out_features)
    if k != in_features:
        rows = F.pad(rows, (0, k - in_features))
    if bias is not None and n != out_features:
        bias = F.pad(bias, (0, n - out_features))
    zeros = {"qzeros": tensors["qzeros"]} if "qzeros" in tensors else {}
    # One group is stored per column, whatever it is called.
    per_column = scales.shape[0] == 1
    y = gemm(rows.contiguous(), tensors["qweight"], scales, bias, -1 if per_column else group_size, **zeros)
    return y[:, :out_features].reshape(*x.shape[:-1], out_features)


def dequantize(tensors: dict[str, Tensor]) -> Tensor:
    """scale · (code − zero), float32 [N, K], padding included."""
    zeros = marlin.unpack_zeros(tensors["qzeros"]) if "qzeros" in tensors else None
    codes, scales = marlin.unpack_codes(tensors["qweight"]), marlin.unpack_scales(tensors["scales"])
    return QuantizedWeight(codes, scales, zeros, -1).dequantize()


def padded_features(in_features: int, out_features: int) -> tuple[int, int]:
    """(K, N) as stored: in_features rounded up to a tile of 16, out_features to one of 64."""
    return -(-in_features // marlin.TILE_K) * marlin.TILE_K, -(-out_features // marlin.TILE_N) * marlin.TILE_N


def pack(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """(qweight, scales) as MarlinLinear stores them, padded with code 8 and scale 0."""
    out_features, in_features = weight.codes.shape
    k, n = padded_features(in_features, out_features)
    codes = F.pad(weight.codes, (0, k - in_features, 0, n - out_features), value=marlin.ZERO_CODE)
    scales = F.pad(weight.scales, (0, 0, 0, n - out_features))
    return marlin.pack_codes(codes), marlin.pack_scales(scales)


def pack_zeros(zeros: Tensor) -> Tensor:
    """Zero points uint8 [out_features, groups] → qzeros as MarlinLinear stores them, padded with code 8."""
    n = padded_features(marlin.TILE_K, zeros.shape[0])[1]
    return marlin.pack_zeros(F.pad(zeros, (0, 0, 0, n - zeros.shape[0]), value=marlin.ZERO_CODE))

"""MarlinLinear: a linear layer held as packed 4-bit codes, run by the kernel on a GPU, in plain torch elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marlin_gptq.formats import marlin
from marlin_gptq.kernel import gemm
from marlin_gptq.quantization.weight import QuantizedWeight, columns_per_group


class MarlinLinear(nn.Module):
    """y = x · Wᵀ + bias with W [out_features, in_features] in the Marlin layout.

    Buffers, of the names they have on disk (K, N: the features padded to what the kernel takes):
        qweight  int32 [K/16, 2N]
        scales   float16 or bfloat16 [groups, N], stored order
        qzeros   int32 [groups, N/8], zero points of an asymmetric grid, or None (code 8 is zero)
        input_order  int32 [in_features], or None: act-order groups that moved. Column j of the packed weight is input
                 feature input_order[j]; activations are gathered in this order before the product, which is exact
        bias     [out_features] of the dtype of the scales, or None

    N is out_features rounded up to 64; K is in_features rounded up to 16, which only a group size of -1 can need.
    Padding has scale 0: it adds nothing to any output. Raises ValueError for a group size that does not
    divide in_features.
    """

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    input_order: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        *,
        bias: bool = False,
        symmetric: bool = True,
        act_order: bool = False,
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
        order = torch.arange(in_features, dtype=torch.int32, device=device) if act_order else None
        self.register_buffer("input_order", order)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self._dense: Tensor | None = None

    @classmethod
    def from_quantized(
        cls, weight: QuantizedWeight, bias: Tensor | None = None, input_order: Tensor | None = None
    ) -> MarlinLinear:
        """Pack a QuantizedWeight; `bias` [out_features] is stored in the dtype of the scales.

        input_order  int32 [in_features]: column j of the weight is this input feature; None where they are in place.
        """
        out_features, in_features = weight.codes.shape
        layer = cls(
            in_features,
            out_features,
            weight.group_size,
            bias=bias is not None,
            symmetric=weight.zeros is None,
            act_order=input_order is not None,
            dtype=weight.scales.dtype,
            device="meta",
        )
        layer.qweight, layer.scales = pack(weight)
        if weight.zeros is not None:
            layer.qzeros = pack_zeros(weight.zeros)
        if input_order is not None:
            layer.input_order = input_order.to(torch.int32)
        if bias is not None:
            layer.bias = bias.to(weight.scales.dtype)
        return layer

    def dequantize(self) -> Tensor:
        """scale · (code − zero), float32 [out_features, in_features], input features in their natural order."""
        packed = self._dequantize_packed()
        if self.input_order is None:
            return packed
        natural = torch.empty_like(packed)
        natural[:, self.input_order.long()] = packed
        return natural

    def _dequantize_packed(self) -> Tensor:
        """The same with columns in the order of the packed weight."""
        codes = marlin.unpack_codes(self.qweight)
        scales = marlin.unpack_scales(self.scales)
        zeros = None if self.qzeros is None else marlin.unpack_zeros(self.qzeros)
        return QuantizedWeight(codes, scales, zeros, -1).dequantize()[: self.out_features, : self.in_features]

    def hold_dense(self, hold: bool) -> None:
        """Where no kernel runs: keep the dequantized weight between calls (8 times the memory), or let it go."""
        self._dense = self.dequantize() if hold else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] in the dtype of the scales → [..., out_features].

        On other devices than CUDA float32 is taken as well and computed in float32.
        """
        rows = x.reshape(-1, self.in_features)
        # Zero points are not in the kernel's op yet: the dequantized weight computes them.
        if self._dense is not None or self.qzeros is not None or (x.dtype == torch.float32 and not x.is_cuda):
            weight = self.dequantize() if self._dense is None else self._dense
            bias = None if self.bias is None else self.bias.float()
            y = F.linear(rows.float(), weight, bias).to(x.dtype)
            return y.reshape(*x.shape[:-1], self.out_features)
        k, n = padded_features(self.in_features, self.out_features)
        if self.input_order is not None:
            rows = rows.index_select(1, self.input_order)
        if k != self.in_features:
            rows = F.pad(rows, (0, k - self.in_features))
        bias = self.bias
        if bias is not None and n != self.out_features:
            bias = F.pad(bias, (0, n - self.out_features))
        y = gemm(rows.contiguous(), self.qweight, self.scales, bias, self._kernel_group_size())
        return y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )

    def _kernel_group_size(self) -> int:
        # One group is stored per column, whatever it is called.
        return -1 if self.scales.shape[0] == 1 else self.group_size


def pack_zeros(zeros: Tensor) -> Tensor:
    """Zero points uint8 [out_features, groups] → `qzeros` as MarlinLinear stores them, padded with 0."""
    return marlin.pack_zeros(F.pad(zeros, (0, 0, 0, -zeros.shape[0] % marlin.TILE_N)))


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

"""MarlinLinear: a linear layer held as packed 4-bit codes, run by the kernel on a GPU, in plain torch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marlin_gptq.formats import marlin
from marlin_gptq.kernel import gemm, set_overlap, why_not
from marlin_gptq.modeling import run_time
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
    Padding has scale 0: it adds nothing to any output. Raises ValueError for a group size that does not divide
    in_features.

    Where the kernel reads another layout (`run_time`), `blocks` and `column_scales` stand in place of qweight, scales
    and qzeros, which are None then; `tensors` and the state dict give them as ever.
    """

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    input_order: Tensor | None
    bias: Tensor | None
    blocks: Tensor | None
    column_scales: Tensor | None

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
        self.register_buffer("blocks", None, persistent=False)
        self.register_buffer("column_scales", None, persistent=False)
        self._blocks_are: tuple[Any, ...] = ()  # how to read them: what Blocks has after its tensors
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
        packed = dequantize(self.tensors())[: self.out_features, : self.in_features]
        if self.input_order is None:
            return packed
        natural = torch.empty_like(packed)
        natural[:, self.input_order.long()] = packed
        return natural

    def hold_dense(self, hold: bool) -> None:
        """Where no kernel runs: keep the dequantized weight between calls (8 times the memory), or let it go."""
        self._dense = self.dequantize() if hold else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] in the dtype of the scales → [..., out_features].

        On other devices than CUDA float32 is taken as well and computed in float32.
        """
        weight = self._blocks() or self.tensors()
        if self.input_order is not None and self._dense is None:
            x = x.index_select(-1, self.input_order)
        return linear(x, weight, self.bias, self.group_size, self.in_features, self.out_features, self._dense)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors this layer has on disk, by name, in the layout of the file."""
        blocks = self._blocks()
        if blocks is None:
            named = {"qweight": self.qweight, "scales": self.scales, "qzeros": self.qzeros}
        else:
            named = dict(run_time.from_blocks(blocks))
        named |= {"input_order": self.input_order, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def prepare_for_device(self) -> None:
        """Called when the weights are there, on the device that is to run them.

        Brings them into the layout of that device. On a GPU with the kernel all writing is waited for, and kernels
        may from then on read weights ahead of the work in front of them (`marlin_gptq.kernel.set_overlap`).
        """
        held = self.blocks if self.blocks is not None else self.qweight
        if self.blocks is None and run_time.wanted(held.device):
            blocks = run_time.to_blocks(self.tensors(), self.group_size)
            self.blocks, self.column_scales, *rest = blocks
            self._blocks_are = tuple(rest)
            self.qweight = self.scales = self.qzeros = None  # type: ignore[assignment]  # see the docstring
        if held.is_cuda and not why_not(held.device.index):
            torch.cuda.synchronize(held.device)
            set_overlap(True)

    def restore_stored_layout(self) -> None:
        """Undo the layout of `prepare_for_device`: the buffers are those of the file."""
        if self.blocks is None:
            return
        tensors = self.tensors()
        self.blocks = self.column_scales = None
        self._blocks_are = ()
        for name in ("qweight", "scales", "qzeros"):
            setattr(self, name, tensors.get(name))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> MarlinLinear:
        self.restore_stored_layout()  # casts reach the scales, other devices get what they read
        super()._apply(fn, recurse)  # .to(device), .cuda(), …
        if self._dense is not None:
            self.hold_dense(True)
        self.prepare_for_device()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({f"{prefix}{name}": tensor for name, tensor in self.tensors().items()})

    def _load_from_state_dict(self, *arguments: Any) -> None:
        prepared = self.blocks is not None
        self.restore_stored_layout()
        super()._load_from_state_dict(*arguments)
        if prepared:
            self.prepare_for_device()

    def _blocks(self) -> run_time.Blocks | None:
        return None if self.blocks is None else run_time.Blocks(self.blocks, self.column_scales, *self._blocks_are)


def prepare_for_device(model: nn.Module) -> None:
    """Every MarlinLinear of the model: see MarlinLinear.prepare_for_device."""
    for module in model.modules():
        if isinstance(module, MarlinLinear):
            module.prepare_for_device()


def linear(
    x: Tensor,
    weight: dict[str, Tensor] | run_time.Blocks,
    bias: Tensor | None,
    group_size: int,
    in_features: int,
    out_features: int,
    dense: Tensor | None = None,
) -> Tensor:
    """x [..., in_features] times a weight → [..., out_features].

    weight: tensors in the layout of the file (MarlinLinear.tensors), or blocks. bias: [out_features] or None.
    dense: the same weight, float32 [out_features, in_features], where it was kept.
    """
    rows = x.reshape(-1, in_features)
    if dense is not None or (x.dtype == torch.float32 and not x.is_cuda):
        if dense is None:
            tensors = run_time.from_blocks(weight) if isinstance(weight, run_time.Blocks) else weight
            dense = dequantize(tensors)[:out_features, :in_features]
        y = F.linear(rows.float(), dense, None if bias is None else bias.float()).to(x.dtype)
        return y.reshape(*x.shape[:-1], out_features)
    k, n = padded_features(in_features, out_features)
    if k != in_features:
        rows = F.pad(rows, (0, k - in_features))
    if bias is not None and n != out_features:
        bias = F.pad(bias, (0, n - out_features))
    rows = rows.contiguous()
    if isinstance(weight, run_time.Blocks):
        y = run_time.gemm(rows, weight, bias)
    else:
        scales = weight["scales"]
        zeros = {"qzeros": weight["qzeros"]} if "qzeros" in weight else {}
        # One group is stored per column, whatever it is called.
        y = gemm(rows, weight["qweight"], scales, bias, -1 if scales.shape[0] == 1 else group_size, **zeros)
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

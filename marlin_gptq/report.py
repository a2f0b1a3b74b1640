"""What a quantization tells while it runs and when it is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.costs import Cost
from marlin_gptq.quantization.weight import QuantizedWeight


@dataclass(frozen=True)
class LinearRecord:
    """What became of one linear.

    relative_error  squared output error over squared output under the calibration Hessian (of the weights alone for
                    method rtn); damp_percent is what the factorisation took, 0 for rtn; tokens are those of the
                    calibration text that reached the linear (of an expert: that were routed to it), 0 for rtn. Scales
                    are without their signs.
    """

    name: str
    block: int
    in_features: int
    out_features: int
    relative_error: float
    damp_percent: float
    scale_min: float
    scale_mean: float
    scale_max: float
    seconds: float
    tokens: int


@dataclass(frozen=True)
class BlockRecord:
    """What became of tuning a block by itself.

    error_before, error_after  squared difference of the block's outputs from those of the full-precision model, over
                  the squares of these, the mean over the tokens of `samples_judged` samples that nothing was learnt
                  from; error_after is None where the tuning ended in NaN or Inf.
    kept          whether the tuned block is the result; if not, it is the one before.
    codes_changed share of the codes that the tuning changed.
    """

    block: int
    error_before: float
    error_after: float | None
    kept: bool
    samples_judged: int
    codes_changed: float


@dataclass(frozen=True)
class ProgressEvent:
    """Sent as work goes on: `done` of `total` linears are finished; stage is calibrate, quantize, tune block or write.

    note  how far a block's own tuning is, for people.

    Before, for rounding under both sides, `done` of `total` passes through a block (gradients) are finished. After, if
    the model is tuned end to end, `done` of `total` windows written by the model (write text), blocks run (teacher) or
    steps (tune, whose relative_error is the KL in nats).
    """

    stage: str
    block: int
    blocks: int
    linear: str | None
    done: int
    total: int
    relative_error: float | None
    note: str = ""


@dataclass(frozen=True)
class QuantizeReport:
    """The result, as it stands in quantize_log.json.

    inner_loops  what GPTQ's inner loops ran in: "torch", "triton" and its version for the fused GPU kernels, or both.
    quantized_share  of the weights in the blocks' matrices; left are the others: how many of which, and why.
    """

    output: Path
    base_model: str
    config: QuantizationConfig
    calibration: dict[str, Any]
    device: str
    dtype: str
    seconds: float
    bytes_before: int
    bytes_after: int
    peak_gpu_bytes: int | None
    unknown_tensors: list[str]
    costs: dict[str, Cost] = field(default_factory=dict)
    tuning: dict[str, Any] | None = None
    records: list[LinearRecord] = field(default_factory=list)
    tuned_blocks: list[BlockRecord] = field(default_factory=list)
    inner_loops: str = "torch"
    quantized_share: float = 1.0
    left: dict[str, int] = field(default_factory=dict)

    @property
    def small_share(self) -> str:
        """A sentence where less than half of the blocks' weights is quantized, else nothing."""
        if self.quantized_share >= 0.5:
            return ""
        most = sorted(self.left, key=lambda name: -self.left[name])
        return (
            f"only {100 * self.quantized_share:.0f} % of the weights in the decoder blocks are quantized; "
            "in 16 bits stay " + ", ".join(most[:6]) + (f" and {len(most) - 6} more" if len(most) > 6 else "")
        )

    @property
    def mean_relative_error(self) -> float:
        return sum(record.relative_error for record in self.records) / max(1, len(self.records))

    @property
    def worst(self) -> LinearRecord | None:
        return max(self.records, key=lambda record: record.relative_error, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; sizes in bytes, times in seconds."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content |= {
            "output": str(self.output),
            "config": self.config.to_dict(),
            "records": [asdict(record) for record in self.records],
            "tuned_blocks": [asdict(record) for record in self.tuned_blocks],
            "mean_relative_error": self.mean_relative_error,
        }
        return content


def linear_record(
    name: str,
    block: int,
    weight: QuantizedWeight,
    error: float,
    damp_percent: float,
    seconds: float,
    tokens: int,
) -> LinearRecord:
    """The record of a quantized linear, with the statistics of its scales."""
    out_features, in_features = weight.codes.shape
    scales = weight.scales.float().abs()
    return LinearRecord(
        name=name,
        block=block,
        in_features=in_features,
        out_features=out_features,
        relative_error=error,
        damp_percent=damp_percent,
        scale_min=float(scales.min()),
        scale_mean=float(scales.mean()),
        scale_max=float(scales.max()),
        seconds=seconds,
        tokens=tokens,
    )


def rescaled(record: LinearRecord, weight: QuantizedWeight) -> LinearRecord:
    """The record of a linear whose scales became those of `weight` by tuning; its error stays that before it."""
    scales = weight.scales.float().abs()
    return replace(
        record, scale_min=float(scales.min()), scale_mean=float(scales.mean()), scale_max=float(scales.max())
    )

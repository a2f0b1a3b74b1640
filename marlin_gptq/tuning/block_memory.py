"""What the tuning of one block takes of the device. Pure functions of an `Outline`."""

from __future__ import annotations

from dataclasses import dataclass

from marlin_gptq.modeling.outline import BlockOutline, Outline
from marlin_gptq.quantization.weight import columns_per_group
from marlin_gptq.tuning.memory import Sizes, fixed_bytes

# Tokens of the samples that pass forward and backward together, and what is made do with where memory does not allow as
# many: a backward pass keeps all that was computed. 0 is one sample at a time.
TUNED_TOKENS = 8192
FEWER_TOKENS = (4096, 2048, 1024, 0)
# Values per token and channel that a block's backward pass keeps or makes, of float32 and of the computing dtype.
# Measured on a CPU, never on a GPU: three runs took 0.8 to 1.1 times what is counted with them.
BACKWARD_HIDDEN, BACKWARD_INNER = 18, 8


@dataclass(frozen=True)
class TunedBlocks:
    """The tuning of each block by itself (tuning/block.py).

    steps, batch, step_tokens  how many, and samples and tokens in each; moving: whether codes move too.
    sequence                   tokens of the longest sample, or window, that attention sees.

    What `tuning_bytes` counts are attention's scores written out, which blocks without a mask do not need on a GPU.
    """

    steps: int
    batch: int
    step_tokens: int
    moving: bool
    sequence: int


def tuning_bytes(
    outline: Outline, block: BlockOutline, tuned: TunedBlocks, tokens: int, together: int, compute_bytes: int
) -> int:
    """Of tuning one block, beside its weights before and after they were solved.

    tokens    of the calibration text in all.
    together  of the samples that pass the block together, unless one alone has more.
    """
    widest = max(max(x.in_features, x.out_features) for x in block.linears)
    sizes = Sizes(
        weights=sum(x.in_features * x.out_features for x in block.quantized),
        others=0,
        group_size=min(columns_per_group(x.in_features, x.group_size or -1) for x in block.quantized),
        blocks=1,
        hidden_size=outline.hidden,
        intermediate_size=widest,
    )
    pack = min(tokens, tuned.batch * tuned.sequence, max(tuned.sequence, together))
    values = backward_bytes(outline, block, pack, tuned.sequence, compute_bytes)
    gradient = (4 + compute_bytes) * max(x.in_features * x.out_features for x in block.quantized)
    samples = 4 * pack * outline.hidden * compute_bytes  # those of a step, and where a recorded step reads them
    dequantized = sizes.weights * compute_bytes
    return fixed_bytes(sizes, tuned.moving) + dequantized + values + gradient + samples


def backward_bytes(outline: Outline, block: BlockOutline, pack: int, sequence: int, compute_bytes: int) -> int:
    """What a block's backward pass keeps or makes of `pack` tokens, in samples of at most `sequence`."""
    widest = max((max(x.in_features, x.out_features) for x in block.linears), default=0)
    values = pack * (4 * BACKWARD_HIDDEN * outline.hidden + compute_bytes * BACKWARD_INNER * widest)
    return values + outline.heads * sequence * 4 * (pack + 2 * sequence)  # scores of all samples, and what makes one's

"""What is asked of a run, and how it keeps within its memory: what estimates are made from."""

from __future__ import annotations

from dataclasses import dataclass

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.modeling.output_gradients import GRADIENT_TOKENS
from marlin_gptq.modeling.packed import PACK_TOKENS
from marlin_gptq.tuning.block_memory import TUNED_TOKENS, TunedBlocks
from marlin_gptq.tuning.text import WINDOW

# Tokens of a usual calibration document, where only the longest is known.
_USUAL_TOKENS = 1000


@dataclass(frozen=True)
class Job:
    """What is asked of a run.

    tokens, longest  calibration tokens in all and of the longest sample; 0 for method rtn.
    compute_bytes    per value in the forward: 2 on a GPU, 4 elsewhere.
    stored_bytes     per 16-bit value of the result: 2.
    shard_size       of the output, in bytes: one shard is filled in host memory while another is written.
    signed, act_order, plain, sweeps, corrected, beams  the techniques of the recipe beside GPTQ: `signed_scales`,
                     `act_order`, whether `clip_hessian` is "plain", `refine_sweeps`, whether there is a
                     `correct_target`, `beam_width`.
    weighted         tokens are weighted, so that a Hessian's inputs are there twice in float32.
    block_size       columns that GPTQ finishes before it updates the rest.
    tuned            blocks are tuned one by one, or None.
    two_sided        rounding under both sides.
    """

    tokens: int
    longest: int
    compute_bytes: int
    shard_size: int
    clip: bool = True
    true_sequential: bool = False
    stored_bytes: int = 2
    signed: bool = False
    act_order: str = "none"
    plain: bool = False
    sweeps: int = 0
    corrected: bool = False
    tuned: TunedBlocks | None = None
    beams: int = 1
    weighted: bool = False
    block_size: int = 128
    two_sided: bool = False

    @property
    def graded(self) -> int:
        """Tokens whose gradients are taken for rounding under both sides."""
        return min(self.tokens, max(self.longest, GRADIENT_TOKENS)) if self.two_sided else 0

    @classmethod
    def of(cls, config: QuantizationConfig, tokens: int, longest: int, compute_bytes: int, shard_size: int) -> Job:
        """The pass over the blocks that `config` asks for; its end-to-end tuning is not part of it."""
        tuned = None
        if config.tunes_blocks and tokens:
            window = min(longest, WINDOW) if config.pack else longest
            taken = min(tokens, max(window, config.tune_batch * min(window, _USUAL_TOKENS)))
            tuned = TunedBlocks(config.tune_block_steps, config.tune_batch, taken, config.tune_codes, window)
        return cls(
            tokens,
            longest,
            compute_bytes,
            shard_size,
            clip=config.clip,
            true_sequential=config.true_sequential,
            signed=config.signed_scales,
            act_order=config.act_order,
            plain=config.clip_hessian == "plain",
            sweeps=config.refine_sweeps,
            corrected=config.correct_target > 0,
            tuned=tuned,
            beams=config.beam_width,
            weighted=config.token_cap > 0 or config.equal_samples,
            block_size=config.block_size,
            two_sided=config.two_sided,
        )


@dataclass(frozen=True)
class Plan:
    """How a run keeps within its memory.

    place         where activations wait between two blocks: device, host or disk.
    hessian_bytes of Hessians summed in one pass through a block; None is all of them. Less means more passes.
    rows          of a stacked weight solved at once; None is all of them.
    pack_tokens   of samples that pass a block together, unless one alone has more; 0 is one sample at a time.
    side_by_side  bytes that weights solved at the same time may take; 0 is one after the other.
    tuned_tokens  of samples that pass a block together while it is tuned, as pack_tokens.
    staged        true-sequential calibration goes through a block once; what it keeps meanwhile waits on the device.
    """

    place: str = "device"
    hessian_bytes: int | None = None
    rows: int | None = None
    pack_tokens: int = PACK_TOKENS
    side_by_side: int = 0
    tuned_tokens: int = TUNED_TOKENS
    staged: bool = False

"""What is known about a quantization before any work: whether it can be done as asked, how large its result will be."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.device_memory import free_bytes
from marlin_gptq.disk import require_space
from marlin_gptq.errors import InputError, QuantizationError
from marlin_gptq.estimated_time import tuning_products
from marlin_gptq.job import Job, Plan
from marlin_gptq.memory_plan import tuning_within
from marlin_gptq.modeling.architecture import (
    block_linears,
    known_names,
    other_matrices,
    read_config,
    require_divisible,
    require_full_precision,
)
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.classes import has_language_head, text_config
from marlin_gptq.modeling.experts import expert_lists
from marlin_gptq.modeling.linear import padded_features
from marlin_gptq.modeling.outline import outline
from marlin_gptq.modeling.streamed_weights import stored_dtype
from marlin_gptq.overrides import require_matches
from marlin_gptq.quantization.weight import columns_per_group
from marlin_gptq.tuning.memory import Sizes, plan
from marlin_gptq.tuning.text import WINDOW

# Multiplications a second that a core of a CPU does in the tuning of blocks (3.3e10 measured on one), and how long that
# may take without being asked for.
CPU_PRODUCTS, MOST_CPU_MINUTES = 3e10, 5


def require_quantizable(
    model_dir: Path,
    output: Path,
    config: QuantizationConfig,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | None = None,
    kept: bool = False,
    processes: int = 1,
    limited: bool = False,
) -> list[str]:
    """Refuse, before any work and from config and file headers alone, what would fail.

    device  of the tuning, if it is known already; kept, processes, limited: see `require_combination`.
    InputError for a model that cannot be quantized as asked, CheckpointError if the result would not fit on the disk
    of `output`, QuantizationError if the tuning would not fit the device. Returns what is to be told about the result.
    """
    require_full_precision(model_dir, read_config(model_dir))
    require_head(config, read_config(model_dir))
    stream = BlockStream(model_dir, device=torch.device("cpu"))
    linears = linears_of(stream, config)
    require_combination(config, kept=kept, processes=processes, limited=limited, experts=has_experts(stream))
    size = output_bytes(stream, linears, config, result_dtype(model_dir, dtype))
    require_space(output, 2 * size if config.tunes else size)  # the tuning writes its own beside that of the blocks
    if device is not None and config.tunes:
        require_memory(model_dir, config, device)
    if device is not None and config.tunes_blocks:
        require_block_memory(model_dir, config, device)
    return [note for note in (_kept_matrices(stream, config), _unseen_range(model_dir, config, dtype)) if note]


def _unseen_range(model_dir: Path, config: QuantizationConfig, dtype: torch.dtype | None) -> str:
    """A sentence about activations that may pass float16's range where no text is run that would show it."""
    if config.method != "rtn" or result_dtype(model_dir, dtype) != torch.float16:
        return ""
    if stored_dtype(TensorStore(model_dir), quantized=False) != torch.bfloat16:
        return ""
    return (
        "a bfloat16 model becomes float16, and round-to-nearest runs no text that would show activations beyond its "
        "range; --dtype bfloat16 keeps the range"
    )


def _kept_matrices(stream: BlockStream, config: QuantizationConfig) -> str:
    """A sentence about what stays as it is beside routers and what was skipped; "" for nothing."""
    blocks = [(stream.block_module(index), stream.block_name(index)) for index in range(stream.n_blocks)]
    found = {
        name: matrix.numel()
        for block in blocks
        for name, matrix in other_matrices(*block).items()
        if not config.skips(name)
    }
    if not found:
        return ""
    whole = sum(tensor.numel() for block, _ in blocks for tensor in block.parameters())
    first = ", ".join(list(found)[:2]) + (", …" if len(found) > 2 else "")
    return (
        f"{len(found)} tensors of the blocks that no linear holds (depth-wise convolutions, norms by head and the "
        f"like: {first}) stay as they are, {sum(found.values()) / whole:.2%} of the blocks' values"
    )


def require_combination(
    config: QuantizationConfig, *, kept: bool, processes: int, limited: bool, experts: bool
) -> None:
    """InputError for techniques that do not work together with the way the run is done, or with the model.

    kept       a work directory keeps the finished blocks.
    processes  that work on it together.
    limited    a most of GPU memory is given.
    experts    the model has several experts.
    """
    if experts and config.method == "gptq" and config.correct_target:
        raise InputError(
            f"correct_target: got {config.correct_target:g} for a model with experts, whose tokens go to other experts "
            "in full precision than in the quantized model, so that their inputs cannot be compared; use --preset "
            "marlin (or --correct-target 0)"
        )
    if experts and config.method == "gptq" and config.two_sided:
        raise InputError(
            "two_sided: got true for a model with experts, whose gradients most experts see of too few tokens; use "
            "--no-two-sided (or --preset marlin)"
        )
    _require_tunable_blocks(config, experts=experts)
    if not config.tunes:
        return
    asked = f"tune_steps: got {config.tune_steps}"
    if kept:
        raise InputError(
            f"{asked} together with a work directory, which keeps blocks but no steps of the end-to-end tuning; use "
            "--tune-steps 0 (or --preset marlin), or leave --work-dir out"
        )
    if processes > 1:
        raise InputError(
            f"{asked} in {processes} processes, but the end-to-end tuning runs in one; use --tune-steps 0 (or --preset "
            "marlin), or start a single process"
        )
    if limited:
        raise InputError(
            f"{asked} together with --max-gpu-memory, which the end-to-end tuning cannot keep: the whole model is on "
            "the GPU in it; use --tune-steps 0 (or --preset marlin), or leave --max-gpu-memory out"
        )
    if experts:
        raise InputError(
            f"{asked} for a model with experts, which the end-to-end tuning does not know; use --tune-steps 0 (or "
            "--preset marlin)"
        )


def require_head(config: QuantizationConfig, model: Any) -> None:
    """InputError for techniques that need a language model's head, or a model of text alone, of a transformers config
    `model` that has none or more."""
    if config.method != "gptq" or not (config.tunes or config.two_sided):
        return
    asked = f"tune_steps: got {config.tune_steps}" if config.tunes else "two_sided: got true"
    name = next(iter(model.architectures or []), model.model_type)
    if not has_language_head(model):
        raise InputError(
            f"{asked} for a {name}, which has no language model's head, whose loss would tell what matters; use "
            "--preset marlin (or --tune-steps 0 and --no-two-sided)"
        )
    if config.tunes and text_config(model) is not model:
        raise InputError(
            f"{asked} for a {name}, and the end-to-end tuning knows models of text alone; use --tune-steps 0 (or "
            "--preset marlin)"
        )


def _require_tunable_blocks(config: QuantizationConfig, *, experts: bool) -> None:
    """The same for the tuning of each block by itself."""
    if not config.tune_block_steps:
        return
    asked = f"tune_block_steps: got {config.tune_block_steps}"
    if config.method != "gptq":
        raise InputError(
            f"{asked} with method {config.method}, which runs no calibration text through the blocks; use "
            "--tune-block-steps 0, or --method gptq"
        )
    if experts:
        raise InputError(
            f"{asked} for a model with experts, which the tuning of blocks does not know; use --tune-block-steps 0"
        )


def within_reach(
    model_dir: Path, config: QuantizationConfig, device: torch.device, free: int | None = None
) -> tuple[QuantizationConfig, str]:
    """`config` less the block tuning that this run cannot have, and a sentence about that ("" for nothing).

    For the default recipe; others are refused instead (`require_quantizable`). Reads config.json alone.
    free  bytes of the GPU that it may take, if not all that is free.
    """
    reason = _why_no_tuned_blocks(model_dir, config, device, free) if config.tunes_blocks else ""
    if not reason:
        return config, ""
    without = replace(config, tune_block_steps=0)
    return without, f"preset {config.preset} runs without its block tuning: {reason}"


def require_gpu_for_tuning(config: QuantizationConfig, device: torch.device) -> None:
    """InputError for a preset's end-to-end tuning without a GPU; steps that somebody chose are not asked about."""
    if config.tunes and device.type != "cuda":
        raise InputError(
            f"--preset {config.preset}: its end-to-end tuning takes days without a GPU, and this run computes on the "
            "CPU; use --tune-steps 0 for all of the preset but the tuning (a number of steps of your own runs too), or "
            "a GPU (--device cuda)"
        )


def _why_no_tuned_blocks(model_dir: Path, config: QuantizationConfig, device: torch.device, free: int | None) -> str:
    """What speaks against the tuning of each block by itself, "" for nothing."""
    try:
        made = outline(model_dir, config)
    except InputError:
        return ""  # `require_quantizable` says it, or first what no setting mends
    if any(linear.expert for block in made.blocks for linear in block.linears):
        return "it does not know experts"
    if any(name.endswith(".A_log") and len(shape) == 2 for block in made.blocks for name, shape in block.others):
        # As in Mamba: a step of the scan for each token, whose gradient writes one of the length of the whole text.
        return "gradients of a scan token by token take hours (--tune-block-steps decides it)"
    if device.type == "cuda":
        try:
            require_block_memory(model_dir, config, device, free)
        except QuantizationError as error:
            return str(error).split(";")[0]
        return ""
    length = _window(model_dir)
    job = Job.of(config, config.tune_batch * length, length, 4, 0)
    minutes = tuning_products(made, job) / (CPU_PRODUCTS * torch.get_num_threads()) / 60
    if minutes <= MOST_CPU_MINUTES:
        return ""
    return f"on this CPU it would take about {minutes / 60:.1f} hours (--tune-block-steps decides it)"


def _window(model_dir: Path) -> int:
    return min(WINDOW, getattr(read_config(model_dir), "max_position_embeddings", None) or WINDOW)


def require_memory(model_dir: Path, config: QuantizationConfig, device: torch.device) -> None:
    """QuantizationError, before any work, if the tuning that `config` asks for does not fit the GPU."""
    if device.type != "cuda":
        return
    plan(
        tuned_sizes(model_dir, config),
        batch=config.tune_batch,
        length=WINDOW,
        tune_codes=config.tune_codes,
        free=free_bytes(device),
    )


def require_block_memory(
    model_dir: Path, config: QuantizationConfig, device: torch.device, free: int | None = None
) -> None:
    """The same for the tuning of each block by itself, whatever the text: more is known when its samples are there."""
    if device.type == "cuda":
        length = _window(model_dir) if config.pack else 1
        free = free_bytes(device) if free is None else free
        tuning_within(outline(model_dir, config), Job.of(config, length, length, 2, 0), Plan("host"), free)


def tuned_sizes(model_dir: Path, config: QuantizationConfig) -> Sizes:
    """A model as the tuning will see it, from its config.json alone."""
    made, settings = outline(model_dir, config), text_config(read_config(model_dir))
    linears = [linear for block in made.blocks for linear in block.linears]
    quantized = [linear for block in made.blocks for linear in block.quantized]
    kept = [linear.in_features * linear.out_features for linear in linears if linear.group_size is None]
    others = [prod(shape) for _, shape in (*made.outer, *(other for block in made.blocks for other in block.others))]
    return Sizes(
        weights=sum(linear.in_features * linear.out_features for linear in quantized),
        others=sum(kept) + sum(others) + sum(linear.bias * linear.out_features for linear in linears),
        group_size=min(columns_per_group(linear.in_features, linear.group_size or -1) for linear in quantized),
        blocks=len(made.blocks),
        hidden_size=made.hidden,
        intermediate_size=getattr(settings, "intermediate_size", None) or 4 * made.hidden,
    )


def result_dtype(model_dir: Path, asked: torch.dtype | None) -> torch.dtype:
    """The dtype of the result: as asked, else that of the checkpoint; float32 becomes float16."""
    stored = stored_dtype(TensorStore(model_dir), quantized=False)
    return asked or (stored if stored in (torch.float16, torch.bfloat16) else torch.float16)


def linears_of(stream: BlockStream, config: QuantizationConfig) -> list[dict[str, nn.Linear]]:
    """The linears to quantize, block by block; InputError if a group does not fit or there is nothing to do."""
    linears = []
    for index in range(stream.n_blocks):
        linears.append(block_linears(stream.block_module(index), stream.block_name(index), config))
        require_divisible(linears[-1], config)
    blocks = [stream.block_module(index) for index in range(stream.n_blocks)]
    require_matches(config, *known_names(stream.model, stream.prefix, blocks))
    if not any(linears):
        patterns = [*config.skip, *(rule.match for rule in config.overrides if rule.bits == 16)]
        raise InputError(f"skip: {', '.join(patterns)} leaves no linear to quantize")
    return linears


def carried_tensors(stream: BlockStream, linears: list[dict[str, nn.Linear]]) -> list[str]:
    """Names of tensors in the files that the architecture has no place for, and the result holds as they are.

    These are, say, layers that predict several tokens, or a classifier's head. InputError for one that belongs to a
    linear to be quantized, which would be computed without it; zero biases of old tools are left out.
    """
    file_name = stream.weights.file_name
    quantized = {file_name(f"{name}.weight").removesuffix(".weight") for block in linears for name in block}
    carried = []
    for name in stream.weights.unknown_tensors():
        parts = name.split(".")
        owner = next((one for end in range(1, len(parts)) if (one := ".".join(parts[:end])) in quantized), None)
        if owner is None:
            carried.append(name)
        elif name != f"{owner}.bias" or bool(stream.store.get(name).any()):
            raise InputError(
                f"{name}: the architecture has no place for it, and {owner} would be quantized without it; merge it "
                f"into the weight, or --skip '{re.escape(owner)}'"
            )
    return carried


def left_in_16_bits(
    stream: BlockStream, linears: list[dict[str, nn.Linear]], config: QuantizationConfig
) -> tuple[float, dict[str, int]]:
    """(share of the weights in the blocks' matrices that is quantized, number of the others by name and reason).

    Names are those within a block, the numbers of experts left out.
    """
    left: dict[str, int] = {}
    quantized = 0
    for index, chosen in enumerate(linears):
        for name, parameter in stream.block_module(index).named_parameters():
            full = f"{stream.block_name(index)}.{name}"
            module = full.removesuffix(".weight")
            if parameter.dim() < 2:
                continue
            if module in chosen:
                quantized += parameter.numel()
                continue
            own = re.sub(r"\.\d+(?=\.|$)", "", name.removesuffix(".weight"))
            entry = f"{own} ({_reason(module, full, config)})"
            left[entry] = left.get(entry, 0) + parameter.numel()
    return quantized / (quantized + sum(left.values())), left


def _reason(module: str, parameter: str, config: QuantizationConfig) -> str:
    """Why a matrix stays in 16 bits."""
    for name in (module, parameter):
        if pattern := next((pattern for pattern in config.skip if re.search(pattern, name)), None):
            return f"--skip {pattern}"
        if (rule := config.override(name)) is not None and rule.bits == 16:
            return f"--config {rule.match}"
    return "never quantized"


def has_experts(stream: BlockStream) -> bool:
    """Whether some block sends each token to a few of several experts."""
    return any(expert_lists(stream.block_module(index)) for index in range(stream.n_blocks))


def output_bytes(
    stream: BlockStream, linears: list[dict[str, nn.Linear]], config: QuantizationConfig, target: torch.dtype
) -> int:
    """Bytes of all tensors of the result, exactly; safetensors headers and small files come on top."""
    replaced = {name: linear for block in linears for name, linear in block.items()}
    size = 0
    for name, linear in replaced.items():
        k, n = padded_features(linear.in_features, linear.out_features)
        groups = linear.in_features // columns_per_group(linear.in_features, config.group_size_of(name))
        size += k * n // 2 + groups * n * target.itemsize
    for name, elements, dtype in stream.weights.elements():
        if name.removesuffix(".weight") not in replaced:
            size += elements * (dtype or target).itemsize
    return size + sum(stream.store.size(name) for name in carried_tensors(stream, linears))

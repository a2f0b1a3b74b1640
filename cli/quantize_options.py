"""Arguments and options of marlin-quantize but for the steps of a recipe (techniques.py), and its examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from marlin_gptq.cli import techniques
from marlin_gptq.cli.options import DATASETS, Choice
from marlin_gptq.config import DEFAULT_PRESET, PRESETS
from marlin_gptq.known_gpus import KNOWN

EXAMPLES = """\b
Examples:
  marlin-quantize meta-llama/Llama-2-7b-hf --wbits 4 -o llama-2-7b-marlin
  marlin-quantize ./my-llama --wbits 4 -o my-llama-marlin --dataset texts.jsonl --group-size 64
  marlin-quantize examples/tiny-llama --wbits 4 -o tiny-marlin --dataset demo --preset marlin    (no network, no GPU)
  marlin-quantize ./my-llama -o my-llama-marlin --preset best    (tunes the whole model end to end: more accurate)
  marlin-quantize ./my-llama -o my-llama-marlin --preset best --tune-steps 0    (all of best but the tuning)
  marlin-quantize ./my-llama --wbits 4 -o my-llama-w4a16 --format compressed-tensors    (for vLLM, SGLang)
  marlin-quantize ./my-llama -o my-llama-marlin --preset marlin --work-dir work    (keeps finished blocks in ./work)
  marlin-quantize --resume work    (goes on with that run after an interruption)

Afterwards: marlin-eval perplexity llama-2-7b-marlin --baseline meta-llama/Llama-2-7b-hf
"""

_WHAT: tuple[Callable[..., Any], ...] = (
    click.argument("model", required=False),
    click.option("--wbits", type=int, default=4, show_default=True, help="Bits per weight: 4."),
    click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to write.  [required]"),
    click.option(
        "--group-size",
        type=Choice(["128", "64", "32", "-1"]),
        default="128",
        show_default=True,
        help="Input features that share a scale; -1 is the whole row.",
    ),
    click.option(
        "--damp", type=float, default=None, help="Damping over the Hessian's mean diagonal.  [default: the preset's]"
    ),
    click.option("--n-samples", type=click.IntRange(1), default=256, show_default=True, help="Calibration documents."),
    click.option(
        "--seq-len",
        type=click.IntRange(2),
        default=None,
        help="Longest calibration document in tokens; longer ones are left out.  "
        "[default: 4096, or the model's context]",
    ),
    click.option(
        "--dataset",
        default="redpajama",
        show_default=True,
        metavar="NAME|PATH|ID",
        help=f"Calibration text: {DATASETS}. Every document is one sample of its own length. A .txt file "
        "is one document; if it exceeds --seq-len, it is cut at its blank lines. demo needs no network.",
    ),
    click.option(
        "--special-tokens",
        is_flag=True,
        help="Begin each calibration document as the tokenizer would (with <s>, say).",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of the documents' order."),
    click.option(
        "--method",
        type=Choice(["gptq", "rtn"]),
        default="gptq",
        show_default=True,
        help="rtn is plain round-to-nearest, without calibration.",
    ),
    click.option(
        "--preset",
        type=Choice(list(PRESETS)),
        default=DEFAULT_PRESET,
        show_default=True,
        help="Recipe: fast tunes each block for itself, best the whole model, which the device's memory must hold, "
        "marlin is that of the original Marlin repository. The options below change single steps.",
    ),
)
_HOW: tuple[Callable[..., Any], ...] = (
    click.option(
        "--format",
        "to",
        type=Choice(["marlin", "gptq", "awq", "compressed-tensors"]),
        default="marlin",
        show_default=True,
        help="Format of OUTPUT; gptq and awq hold float16 scales only, so that --dtype auto is float16 with them.",
    ),
    click.option(
        "--dtype",
        type=Choice(["auto", "float16", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Dtype of scales and unquantized weights; auto keeps the model's.",
    ),
    click.option("--skip", multiple=True, metavar="REGEX", help="Leave linears of such names alone; repeatable."),
    click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path),
        metavar="FILE.yaml",
        help="Other settings for some linears, regular expression: {bits: 4 or 16, group_size: N, skip: true}; the "
        "first that matches decides, 16 bits means left in full precision.",
    ),
    click.option(
        "--shard-size",
        default="1GB",
        show_default=True,
        help="Largest size of a weight file; one fills in memory while the one before is written.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it is a model directory."),
    click.option(
        "--work-dir",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Keep every finished block in this directory, so that --resume DIR can go on after an interruption.",
    ),
    click.option(
        "--processes",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        metavar="N",
        help="Share the work among N processes on this machine, each with a GPU of its own; torchrun does the same.",
    ),
    click.option(
        "--resume",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Go on with the run of a --work-dir: with the arguments it was started with, other ones are refused.",
    ),
    click.option(
        "--spill",
        type=Choice(["auto", "none", "host", "disk"]),
        default="auto",
        show_default=True,
        help="Where activations wait between two blocks: on the device (none), in host memory, in a file; auto: on the "
        "device if they fit, else in host memory.",
    ),
    click.option(
        "--max-gpu-memory",
        metavar="SIZE",
        help="Take at most this much GPU memory (12GB, say), at the price of time.",
    ),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Read MODEL's config only; print types and sizes of the result, and estimates of memory and time.",
    ),
    click.option(
        "--gpu",
        type=Choice(list(KNOWN)),
        help="With --dry-run: estimate for this GPU, which need not be here.  [default: the one here]",
    ),
)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add them all, the recipe's steps after the recipe."""
    for option in (*reversed(_HOW), techniques.options, *reversed(_WHAT)):
        command = option(command)
    return command

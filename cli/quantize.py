"""marlin-quantize: a checkpoint in, a 4-bit Marlin checkpoint out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from marlin_gptq import __version__
from marlin_gptq.checkpoint import resolve_model
from marlin_gptq.cli import failures, options, techniques
from marlin_gptq.cli.progress import Display
from marlin_gptq.config import DEFAULT_PRESET, PRESETS, QuantizationConfig
from marlin_gptq.errors import InputError

EXAMPLES = """\b
Examples:
  marlin-quantize meta-llama/Llama-2-7b-hf --wbits 4 -o llama-2-7b-marlin
  marlin-quantize ./my-llama --wbits 4 -o my-llama-marlin --dataset texts.jsonl --group-size 64
  marlin-quantize examples/tiny-llama --wbits 4 -o tiny-marlin --dataset demo --preset marlin    (no network, no GPU)
  marlin-quantize ./my-llama --wbits 4 -o my-llama-marlin --tune-steps 0    (little memory: all of best but the tuning)

Afterwards: marlin-eval perplexity llama-2-7b-marlin --baseline meta-llama/Llama-2-7b-hf
"""


@click.command(
    "marlin-quantize",
    cls=failures.Command,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("model")
@click.option("--wbits", type=int, default=4, show_default=True, help="Bits per weight: 4.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--group-size",
    type=click.Choice(["128", "64", "32", "-1"]),
    default="128",
    show_default=True,
    help="Input features that share a scale; -1 is the whole row.",
)
@click.option(
    "--damp", type=float, default=None, help="Damping over the Hessian's mean diagonal.  [default: the preset's]"
)
@click.option("--n-samples", type=click.IntRange(1), default=256, show_default=True, help="Calibration documents.")
@click.option(
    "--seq-len",
    type=click.IntRange(2),
    default=None,
    help="Longest calibration document in tokens; longer ones are left out.  [default: 4096, or the model's context]",
)
@click.option(
    "--dataset",
    default="redpajama",
    show_default=True,
    metavar="NAME|PATH|ID",
    help=f"Calibration text: {options.DATASETS}. Every document is one sample of its own length. A .txt file "
    "is one document; if it exceeds --seq-len, it is cut at its blank lines. demo needs no network.",
)
@click.option(
    "--special-tokens",
    is_flag=True,
    help="Begin each calibration document as the tokenizer would (with <s>, say).",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the documents' order.")
@click.option(
    "--method",
    type=click.Choice(["gptq", "rtn"]),
    default="gptq",
    show_default=True,
    help="rtn is plain round-to-nearest, without calibration.",
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default=DEFAULT_PRESET,
    show_default=True,
    help="Recipe: best tunes the whole model and needs it in the device's memory, fast tunes for a short time, "
    "marlin is that of the original Marlin repository. The options below change single steps of it.",
)
@techniques.options
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float16", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Dtype of scales and unquantized weights; auto keeps the model's.",
)
@click.option("--skip", multiple=True, metavar="REGEX", help="Leave linears of such names alone; repeatable.")
@click.option(
    "--shard-size",
    default="1GB",
    show_default=True,
    help="Largest size of a weight file; as much waits in memory before it is written.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@options.model_options
@click.version_option(__version__)
def main(**arguments: Any) -> None:
    """Quantize MODEL (a directory or a hub id) to 4 bits and pack it for the Marlin kernel."""
    output: Path = arguments["output"]
    try:
        _quantize(**arguments)
    except KeyboardInterrupt as error:
        kept = "; what stood there before is unchanged" if output.exists() else ""
        raise failures.Interrupted(f"interrupted: nothing was written under {output}{kept}") from error


def _quantize(
    model: str,
    output: Path,
    wbits: int,
    group_size: str,
    damp: float | None,
    n_samples: int,
    seq_len: int | None,
    dataset: str,
    special_tokens: bool,
    seed: int,
    method: str,
    preset: str,
    dtype: str,
    skip: tuple[str, ...],
    shard_size: str,
    overwrite: bool,
    device: str,
    revision: str | None,
    offline: bool,
    as_json: bool,
    debug: bool,
    **chosen: Any,
) -> None:
    display = Display()
    if wbits != 4:
        raise InputError(f"--wbits: got {wbits}, the Marlin format holds 4-bit codes only; use --wbits 4")
    changes = techniques.changes(chosen) | ({} if damp is None else {"damp_percent": damp})
    preset = preset if method == "gptq" else "marlin"  # rounding has no recipe
    config = QuantizationConfig.from_preset(preset, group_size=int(group_size), method=method, skip=skip, **changes)
    shard_bytes = options.parse_size(shard_size)
    require_free_name(output, overwrite)

    from marlin_gptq.calibration import DEFAULT_SEQ_LEN, sequence_length
    from marlin_gptq.pipeline import quantize_model, require_quantizable

    options.quiet_libraries(display.say)
    where, target = options.torch_device(device), options.torch_dtype(dtype)
    model_dir = resolve_model(model, revision=revision, offline=offline)
    if output.exists() and output.samefile(model_dir):
        raise InputError(f"{output}: is the model itself; give another --output")
    require_quantizable(model_dir, output, config, target)

    samples: list[Any] = []
    calibration: dict[str, Any] = {}
    if method == "gptq":
        length = sequence_length(seq_len, options.context_length(model_dir))
        if seq_len is None and length < DEFAULT_SEQ_LEN:
            display.say(f"note: calibration documents of at most {length} tokens, the model's context")
        samples = _read_samples(display, model_dir, dataset, n_samples, length, seed, special_tokens, offline)
        tokens = sum(len(sample) for sample in samples)
        calibration = {
            "dataset": dataset, "n_samples": len(samples), "seq_len": length, "seed": seed,
            "special_tokens": special_tokens, "tokens": tokens,
        }  # fmt: skip
    recipe = f"gptq, preset {preset}" if method == "gptq" else method
    display.say(f"quantizing {model} on {where.type}: {recipe}, 4 bits, group size {group_size}")
    with display.quantizing() as progress:
        report = quantize_model(
            model_dir,
            output,
            config,
            samples,
            device=where,
            dtype=target,
            shard_size=shard_bytes,
            overwrite=overwrite,
            base_model=None if Path(model).is_dir() else model,
            calibration=calibration,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps({"model": model} | report.to_dict()))
    else:
        click.echo(summary(report))


def require_free_name(output: Path, overwrite: bool) -> None:
    """InputError, before any work, for an output that exists or cannot be made."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; give a directory as --output")
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists already; give another --output, or --overwrite to replace it")
    ancestor = _existing(output.absolute().parent)
    if not ancestor.is_dir():
        raise InputError(f"{output}: cannot be made, {ancestor} is a file")


def summary(report: Any) -> str:
    """What was made, for people."""
    lines = [
        f"written    {report.output}",
        f"size       {options.show_size(report.bytes_before)} -> {options.show_size(report.bytes_after)}",
    ]
    if report.worst is not None:
        lines += [
            f"linears    {len(report.records)}",
            f"error      mean {report.mean_relative_error:.5f}, worst {report.worst.relative_error:.5f} "
            f"({report.worst.name})",
        ]
    if report.tuning is not None:
        tuning = report.tuning
        lines.append(
            f"tuning     KL {tuning['kl_before']:.5f} -> {tuning['kl_after']:.5f} on "
            f"{tuning['windows_judged']} windows kept aside" + ("" if tuning["kept"] else ": not kept")
        )
    lines += [
        f"time       {options.show_time(report.seconds)} on {report.device}",
        f"next       marlin-eval perplexity {report.output}",
    ]
    return "\n".join(lines)


def _read_samples(
    display: Display,
    model_dir: Path,
    dataset: str,
    n_samples: int,
    length: int,
    seed: int,
    special_tokens: bool,
    offline: bool,
) -> list[Any]:
    from marlin_gptq.calibration import calibration_samples, load_tokenizer

    display.say(f"reading calibration text: {dataset}")
    samples = calibration_samples(
        load_tokenizer(model_dir),
        dataset,
        n_samples=n_samples,
        seq_len=length,
        seed=seed,
        special_tokens=special_tokens,
        offline=offline,
    )
    sizes = [len(sample) for sample in samples]
    display.say(f"{len(sizes)} samples of {min(sizes)} to {max(sizes)} tokens, {sum(sizes)} in all")
    return samples


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


if __name__ == "__main__":
    main()

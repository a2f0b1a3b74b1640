"""marlin-eval: how good a model is, and what computed the answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from marlin_gptq import __version__
from marlin_gptq.cli import evaluate_report, evaluate_tasks, evaluate_throughput, failures, options
from marlin_gptq.cli.progress import Display
from marlin_gptq.text_sources import require_source

if TYPE_CHECKING:
    from marlin_gptq.eval.divergence import Comparison, Divergence
    from marlin_gptq.eval.perplexity import PerplexityResult

Row = tuple[str, "PerplexityResult"]

HELP = {"help_option_names": ["-h", "--help"]}

EXAMPLES = """\b
Examples:
  marlin-eval perplexity llama-2-7b-marlin --baseline meta-llama/Llama-2-7b-hf
  marlin-eval perplexity llama-2-7b-marlin --dataset redpajama --seq-len 4096 --json
  marlin-eval perplexity tiny-marlin --dataset texts.jsonl --device cpu
"""


@click.group("marlin-eval", cls=failures.Group, no_args_is_help=False, context_settings=HELP)
@click.version_option(__version__)
def main() -> None:
    """Evaluate full-precision and quantized models."""


for command in (
    evaluate_throughput.throughput,
    evaluate_tasks.harness,
    evaluate_tasks.mmlu,
    evaluate_report.report,
    evaluate_tasks.lm_eval,
):
    main.add_command(command)


@main.command("perplexity", epilog=EXAMPLES, context_settings=HELP)
@click.argument("model")
@click.option(
    "--dataset",
    default="wikitext2",
    show_default=True,
    metavar="NAME|PATH|ID",
    help=f"Text: {options.DATASETS}. wikitext2 (embedded) and .txt files are one running text, measured by "
    "the GPTQ papers' protocol; all others are documents, weighted by token.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(2),
    default=None,
    help="Tokens per window.  [default: 4096, or the model's context]",
)
@click.option(
    "--baseline", metavar="MODEL", help="A second model (directory or hub id) to compare with: KL, top-1 agreement."
)
@click.option("--no-divergence", is_flag=True, help="With --baseline: compare perplexities only, which is quicker.")
@click.option("--batch-size", type=click.IntRange(1), help="Windows per forward.  [default: by their length]")
@click.option(
    "--n-samples",
    type=click.IntRange(1),
    help="Documents to take, chosen by --seed.  [default: 256 of a streamed dataset, all of a local one]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the choice of documents.")
@click.option("--limit", type=click.IntRange(1), help="Only the first windows: for tests, no true figure.")
@click.option(
    "--dtype",
    type=options.Choice(["auto", "float16", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="Computing dtype; auto is the model's on a GPU and float32 elsewhere.",
)
@options.model_options
def perplexity(
    model: str,
    dataset: str,
    seq_len: int | None,
    baseline: str | None,
    no_divergence: bool,
    batch_size: int | None,
    n_samples: int | None,
    seed: int,
    limit: int | None,
    dtype: str,
    device: str,
    revision: str | None,
    offline: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Token perplexity of MODEL (a directory or a hub id, full-precision or quantized), block by block.

    With --baseline also the KL divergence of MODEL's next-token distributions from the baseline's, and how often both
    put the same token first.
    """
    display = Display()
    require_source(dataset, split="evaluation", offline=offline)
    directory, base = options.open_models(display.say, model, baseline, revision, offline)
    from marlin_gptq.calibration import DEFAULT_SEQ_LEN, sequence_length
    from marlin_gptq.eval.divergence import compare_models
    from marlin_gptq.eval.perplexity import evaluate_perplexity

    where, computing = options.torch_device(device), options.torch_dtype(dtype)
    contexts = [length for path in (directory, base) if path and (length := options.context_length(path))]
    length = sequence_length(seq_len, min(contexts, default=None))
    if seq_len is None and length < DEFAULT_SEQ_LEN:
        display.say(f"note: windows of {length} tokens, the model's context")

    settings: dict[str, Any] = {
        "device": where, "dtype": computing, "batch_size": batch_size, "n_samples": n_samples, "seed": seed,
        "limit": limit, "offline": offline,
    }  # fmt: skip
    if base is None or baseline is None:
        with display.counting(f"perplexity of {model}") as progress:
            result = evaluate_perplexity(directory, dataset, length, progress=progress, **settings)
        rows, comparison = [(model, result)], None
    else:
        with display.counting(f"{model} beside {baseline}") as progress:
            comparison = compare_models(
                directory, base, dataset, length, divergence=not no_divergence, progress=progress, **settings
            )
        rows = [(model, comparison.model), (baseline, comparison.baseline)]
    hint = kernel_hint(result.kernel for _, result in rows)
    if as_json:
        click.echo(json.dumps(as_object(rows, dataset, hint, comparison)))
    else:
        print_table(rows, dataset, hint, comparison)


def kernel_hint(kernels: Iterable[str]) -> str | None:
    """How to get the CUDA kernel, if a quantized model ran without it."""
    from marlin_gptq.kernel import library

    if not any(kernel.startswith("reference") for kernel in kernels):
        return None
    status = library.status()
    return "It is compiled here and runs on an NVIDIA GPU (--device cuda)." if status.available else status.hint


def as_object(rows: list[Row], dataset: str, hint: str | None, comparison: Comparison | None = None) -> dict[str, Any]:
    """The JSON object of one evaluation; the second row, if there is one, is the baseline."""
    (model, result), *others = rows
    content: dict[str, Any] = {"model": model, "dataset": dataset} | result.to_dict() | {"hint": hint}
    content |= {"baseline": None, "difference": None}
    for name, other in others:
        content["baseline"] = {"model": name} | other.to_dict()
        content["difference"] = {
            "perplexity": result.perplexity - other.perplexity,
            "perplexity_percent": 100 * (result.perplexity / other.perplexity - 1),
            "nll": result.nll - other.nll,
            "comparable": result.tokens == other.tokens,
        }
    found = comparison.divergence if comparison else None
    content["divergence"] = found.to_dict() if found else None
    if comparison and comparison.missing:
        content["divergence_missing"] = comparison.missing
    return content


def print_table(rows: list[Row], dataset: str, hint: str | None, comparison: Comparison | None = None) -> None:
    """The figures side by side on stdout."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("model", "perplexity", "tokens", "tokens/s", "computed by")
    for column in table.columns[1:4]:
        column.justify, column.no_wrap = "right", True
    for name, result in rows:
        speed = f"{result.tokens_per_second:.0f}"
        table.add_row(escape(name), f"{result.perplexity:.4f}", str(result.tokens), speed, escape(result.kernel))
    (_, result), *others = rows
    for _, other in others:
        change = result.perplexity - other.perplexity
        table.add_row("difference", f"{change:+.4f}", "", "", f"{100 * change / other.perplexity:+.2f} %")
    options.table_console().print(table)
    if comparison and comparison.divergence:
        click.echo(divergence_line(comparison.divergence))
    click.echo(f"{dataset}: {result.protocol}")
    if comparison and comparison.missing:
        click.echo(f"note: {comparison.missing}")
    if hint:
        click.echo(f"note: the reference path ran, not the CUDA kernel. {hint}")


def divergence_line(found: Divergence) -> str:
    """KL and top-1 agreement with their standard errors."""
    kl = options.with_error(found.kl_nats, found.kl_nats_standard_error, ".5f")
    top1 = options.with_error(found.top1_agreement_percent, found.top1_agreement_percent_standard_error, ".2f")
    return f"KL(baseline ‖ model) {kl} nats per token, top-1 agreement {top1} %, over {found.tokens} tokens"


if __name__ == "__main__":
    main()

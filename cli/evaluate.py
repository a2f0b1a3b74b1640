"""marlin-eval: how good a model is, and what computed the answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from marlin_gptq import __version__
from marlin_gptq.checkpoint import resolve_model
from marlin_gptq.cli import failures, options
from marlin_gptq.cli.progress import Display

if TYPE_CHECKING:
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
@click.option("--baseline", metavar="MODEL", help="A second model (directory or hub id) to compare with.")
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
    type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
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
    """Token perplexity of MODEL (a directory or a hub id, full-precision or quantized), block by block."""
    from marlin_gptq.calibration import DEFAULT_SEQ_LEN, sequence_length
    from marlin_gptq.eval.perplexity import evaluate_perplexity

    display = Display()
    options.quiet_libraries(display.say)
    where, computing = options.torch_device(device), options.torch_dtype(dtype)
    directories = [(model, resolve_model(model, revision=revision, offline=offline))]
    if baseline is not None:
        directories.append((baseline, resolve_model(baseline, offline=offline)))
    contexts = [length for _, path in directories if (length := options.context_length(path))]
    length = sequence_length(seq_len, min(contexts, default=None))
    if seq_len is None and length < DEFAULT_SEQ_LEN:
        display.say(f"note: windows of {length} tokens, the model's context")

    rows: list[Row] = []
    for name, path in directories:
        with display.counting(f"perplexity of {name}") as progress:
            result = evaluate_perplexity(
                path,
                dataset,
                length,
                device=where,
                dtype=computing,
                batch_size=batch_size,
                n_samples=n_samples,
                seed=seed,
                limit=limit,
                offline=offline,
                progress=progress,
            )
        rows.append((name, result))
    hint = kernel_hint(rows)
    if as_json:
        click.echo(json.dumps(as_object(rows, dataset, hint)))
    else:
        print_table(rows, dataset, hint)


def kernel_hint(rows: list[Row]) -> str | None:
    """How to get the CUDA kernel, if a quantized model ran without it."""
    from marlin_gptq.kernel import library

    if not any(result.kernel.startswith("reference") for _, result in rows):
        return None
    status = library.status()
    return "It is compiled here and runs on an NVIDIA GPU (--device cuda)." if status.available else status.hint


def as_object(rows: list[Row], dataset: str, hint: str | None) -> dict[str, Any]:
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
    return content


def print_table(rows: list[Row], dataset: str, hint: str | None) -> None:
    """The figures side by side on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
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
    console.print(table)
    click.echo(f"{dataset}: {result.protocol}")
    if any(other.tokens != result.tokens for _, other in others):
        click.echo("note: the models tokenize this text differently, so their perplexities are not comparable")
    if hint:
        click.echo(f"note: the reference path ran, not the CUDA kernel. {hint}")


if __name__ == "__main__":
    main()

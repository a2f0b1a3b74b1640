"""marlin-convert: a 4-bit checkpoint from one format to another, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from marlin_gptq import __version__
from marlin_gptq.cli import failures, options
from marlin_gptq.cli.progress import Display
from marlin_gptq.destination import conversion_inputs, require_destination

TARGETS = ("marlin", "gptq", "awq", "compressed-tensors", "original")
EXAMPLES = """\b
Examples:
  marlin-convert llama-2-7b-marlin --to compressed-tensors -o llama-2-7b-w4a16     (for vLLM, SGLang, transformers)
  marlin-convert TheBloke/Llama-2-7B-GPTQ --to marlin -o llama-2-7b-marlin         (a hub id works too)
  marlin-convert llama-2-7b-marlin --to original -o llama-2-7b.marlin.g128
  marlin-convert llama-2-7b.marlin.g128 --base meta-llama/Llama-2-7b-hf --to gptq -o llama-2-7b-gptq

What a format cannot hold is refused by name, before anything is written.
"""


@click.command(
    "marlin-convert",
    cls=failures.Command,
    unused=failures.UNUSED,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("model")
@click.option(
    "--to",
    required=True,
    type=options.Choice(TARGETS),
    help="Format of the result; original is a state dict of the original Marlin repository, one file.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory (or file) to write.")
@click.option(
    "--base",
    metavar="PATH|ID",
    help="Where MODEL is a state dict of the original Marlin repository: the model it was made from.",
)
@click.option(
    "--gptq-version",
    type=options.Choice(["1", "2"]),
    help="How a GPTQ result stores zero points: 1 less one, 2 as they are.  [default: 1 if symmetric, else 2]",
)
@click.option("--shard-size", default="1GB", show_default=True, help="Largest size of a weight file.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it is a model directory (or a state dict).")
@options.source_options
@click.version_option(__version__)
def main(**arguments: Any) -> None:
    """Convert MODEL (a 4-bit directory or hub id: Marlin, GPTQ, AWQ, compressed-tensors; or a *.marlin.g128 file).

    Codes, scales and zero points keep every bit.
    """
    with failures.writing(arguments["output"]):
        _convert(**arguments)


def _convert(
    model: str,
    to: str,
    output: Path,
    base: str | None,
    gptq_version: str | None,
    shard_size: str,
    overwrite: bool,
    revision: str | None,
    offline: bool,
    as_json: bool,
    debug: bool,
) -> None:
    display = Display()
    shard_bytes = options.parse_size(shard_size)
    path, file = Path(model), to == "original"
    inputs = conversion_inputs(path, None if base is None else Path(base))
    if path.exists() or not overwrite:  # else its files must be known first: what are copies of them?
        require_destination(output, overwrite=overwrite, inputs=inputs, file=file)
    path = options.find_checkpoint(display.say, model, revision, offline)
    base_dir = None if base is None else options.find_model(display.say, base, None, offline)
    require_destination(output, overwrite=overwrite, inputs=conversion_inputs(path, base_dir), file=file)
    options.load_libraries(display.say)
    from marlin_gptq.conversion.convert import convert_checkpoint

    with display.counting("convert") as progress:
        report = convert_checkpoint(
            path,
            output,
            to,
            base=base_dir,
            gptq_version=None if gptq_version is None else int(gptq_version),
            shard_size=shard_bytes,
            overwrite=overwrite,
            progress=progress,
        )
    for warning in report.warnings:
        display.say(f"warning: {warning}")
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    click.echo(
        "\n".join(
            (
                f"written    {report.output}",
                f"format     {report.source_format} -> {report.format}, {report.linears} linears, bit for bit",
                f"size       {options.show_size(report.bytes_before)} -> {options.show_size(report.bytes_after)}",
                f"time       {options.show_time(report.seconds)}",
            )
        )
    )


if __name__ == "__main__":
    main()

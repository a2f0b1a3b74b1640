"""marlin-inspect: what a 4-bit checkpoint is, and whether it is a quantization of a given model."""

from __future__ import annotations

import json
from typing import Any

import click

from marlin_gptq import __version__
from marlin_gptq.cli import failures, options
from marlin_gptq.cli.progress import Display

EXAMPLES = """\b
Examples:
  marlin-inspect llama-2-7b-marlin
  marlin-inspect llama-2-7b-gptq --json
  marlin-inspect llama-2-7b-marlin --verify meta-llama/Llama-2-7b-hf
  marlin-inspect llama-2-7b-gptq --verify llama-2-7b-marlin      (a conversion: every error must be 0)
"""


@click.command(
    "marlin-inspect",
    cls=failures.Command,
    unused=failures.UNUSED,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("model")
@click.option(
    "--verify",
    "original",
    metavar="PATH|ID",
    help="Compare the dequantized weights with those of this model: full precision, or another 4-bit form.",
)
@click.option(
    "--base",
    metavar="PATH|ID",
    help="Where MODEL is a state dict of the original Marlin repository: the model it was made from.",
)
@options.source_options
@click.version_option(__version__)
def main(
    model: str,
    original: str | None,
    base: str | None,
    revision: str | None,
    offline: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Say what MODEL is (a 4-bit directory or hub id of any format, or a *.marlin.g128 file): format, layers, scales,
    checksums. With --verify, how far its weights are from the original's; unrelated weights are an error."""
    display = Display()
    path = options.find_checkpoint(display.say, model, revision, offline)
    base_dir = None if base is None else options.find_model(display.say, base, None, offline)
    original_dir = None if original is None else options.find_model(display.say, original, None, offline)
    options.load_libraries(display.say)
    from marlin_gptq.conversion.describe import describe_checkpoint

    with display.counting("inspect") as progress:
        found = describe_checkpoint(path, base=base_dir, original=original_dir, progress=progress)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
        return
    _print(found)


def _print(found: Any) -> None:
    group = "the whole row" if found.group_size == -1 else found.group_size
    lines = [
        f"checkpoint {found.path}",
        f"format     {found.format}, {found.bits} bits, group size {group}, "
        f"{'symmetric' if found.symmetric else 'asymmetric (zero points)'}, "
        f"act-order {'yes' if found.act_order else 'no'}",
        f"model      {found.model_type}, scales {found.scale_dtype}",
        f"size       {options.show_size(found.size)} in {found.tensors} tensors, "
        f"{options.show_size(found.quantized_size)} of them quantized",
        f"linears    {len(found.linears)} quantized, {len(found.kept)} of the decoder blocks left in 16 bits",
    ]
    click.echo("\n".join(lines))
    _print_linears(found)
    click.echo("\n".join(f"sha256     {digest}  {name}" for name, digest in found.checksums.items()))
    if found.verified:
        worst = max(found.verified, key=lambda one: one.relative_error)
        mean = sum(one.relative_error for one in found.verified) / len(found.verified)
        click.echo(f"verified   relative error mean {mean:.5f}, worst {worst.relative_error:.5f} ({worst.name})")
        if found.differing:
            click.echo(f"differing  {len(found.differing)} other tensors, first {found.differing[0]}")
        else:
            click.echo("others     every tensor that is not quantized is the original's")


def _print_linears(found: Any) -> None:
    from rich.table import Table

    table = Table()
    names = ["linear", "out × in", "groups", "|scale|", "zeros", "sha256"]
    for name in [*names, *(["rel. error", "max steps", "> ½ step"] if found.verified else [])]:
        table.add_column(name, justify="left" if name in ("linear", "sha256") else "right", no_wrap=True)
    for index, one in enumerate(found.linears):
        row = [
            one.name,
            f"{one.out_features} × {one.in_features}",
            str(one.groups),
            f"{one.scale_min:.2e} … {one.scale_max:.2e}",
            "8" if one.zero_min == one.zero_max == 8 else f"{one.zero_min} … {one.zero_max}",
            one.digest[:12],
        ]
        if found.verified:
            checked = found.verified[index]
            row += [f"{checked.relative_error:.5f}", f"{checked.largest:.2f}", f"{100 * checked.beyond:.2f} %"]
        table.add_row(*row)
    options.table_console().print(table)


if __name__ == "__main__":
    main()

"""Options of marlin-quantize that change single steps of a preset's recipe; each is one field of QuantizationConfig."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from marlin_gptq.cli.options import Choice

_OPTIONS = (
    click.option("--clip/--no-clip", default=None, help="Search for clipped scales."),
    click.option(
        "--true-sequential/--no-true-sequential", default=None, help="Calibrate on the quantized linears before.",
    ),
    click.option(
        "--signed-scales/--no-signed-scales", default=None,
        help="Search negative scales too: the full range of codes.",
    ),
    click.option(
        "--clip-hessian", type=Choice(["conditional", "plain"]),
        help="Judge clipping as if later columns made up for errors, or not.",
    ),
    click.option(
        "--act-order", type=Choice(["none", "groups", "columns"]),
        help="Quantize columns of large inputs first: inside and across whole groups, or freely. Groups stay in place.",
    ),
    click.option(
        "--beam-width", type=int, metavar="K",
        help="Keep the K best beginnings of each row's codes from column to column (K-best search); 1: plain GPTQ.",
    ),
    click.option(
        "--token-cap", type=float, metavar="X", help="Limit a token's weight to X times the median; 0: no limit.",
    ),
    click.option(
        "--equal-samples/--no-equal-samples", default=None,
        help="Weigh every calibration sample the same, whatever its length, instead of every token.",
    ),
    click.option("--correct-target", type=float, metavar="SHARE", help="Correct weights for quantized inputs, 0 to 1."),
    click.option("--refine-sweeps", type=int, metavar="N", help="Sweeps over scales and codes after the pass."),
    click.option(
        "--two-sided/--no-two-sided", default=None,
        help="Round under both sides of a linear: its inputs, and the gradients of the loss by its outputs.",
    ),
    click.option("--pack/--no-pack", default=None, help="Calibrate on equal windows of the documents laid end to end."),
    click.option("--tune-steps", type=int, metavar="N", help="Steps of end-to-end tuning; 0: none."),
    click.option(
        "--tune-codes/--no-tune-codes", default=None, help="Tune codes too, not only scales and norm weights.",
    ),
    click.option("--tune-batch", type=int, metavar="N", help="Windows of text in a step of the tuning."),
    click.option("--tune-rate", type=float, metavar="RATE", help="Learning rate of codes, in units of a code."),
    click.option(
        "--tune-scale-rate", type=float, metavar="RATE", help="Learning rate of scales and norm weights, relative.",
    ),
    click.option(
        "--tune-written", type=int, metavar="N", help="Windows of text that the model writes itself to tune on.",
    ),
    click.option(
        "--tune-block-steps", type=int, metavar="N",
        help="Steps of tuning of each block by itself, which needs one block on the device; 0: none.",
    ),
)  # fmt: skip


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add them all; one that is not given leaves the preset's value."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def changes(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of QuantizationConfig that were given."""
    return {name: value for name, value in given.items() if value is not None}

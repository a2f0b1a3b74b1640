"""What a quantization came to, in a few lines for people."""

from __future__ import annotations

import shlex
from typing import Any

from marlin_gptq.cli import options


def summary(report: Any, to: str = "marlin") -> str:
    """What was made, for people."""
    loops = f", inner loops in {report.inner_loops}" if report.peak_gpu_bytes is not None else ""
    lines = [
        f"written    {report.output}",
        f"recipe     {report.config.recipe}",
        f"size       {options.show_size(report.bytes_before)} -> {options.show_size(report.bytes_after)}",
    ]
    if report.worst is not None:
        lines += [
            f"linears    {len(report.records)}, {100 * report.quantized_share:.1f} % of the weights in the blocks",
            f"error      mean {report.mean_relative_error:.5f}, worst {report.worst.relative_error:.5f} "
            f"({report.worst.name})",
        ]
    if report.tuned_blocks:
        kept = [record for record in report.tuned_blocks if record.kept]
        ratios = [1 - (record.error_after or 0.0) / record.error_before for record in kept]
        lines.append(
            f"blocks     {len(kept)} of {len(report.tuned_blocks)} better for their tuning"
            + (f", by {100 * sum(ratios) / len(ratios):.1f} % of their error" if kept else "")
        )
    if report.tuning is not None:
        tuning = report.tuning
        lines.append(
            f"tuning     KL {tuning['kl_before']:.5f} -> {tuning['kl_after']:.5f} on "
            f"{tuning['windows_judged']} windows kept aside" + ("" if tuning["kept"] else ": not kept")
        )
    lines += [f"stages     {stages(report)}"]
    lines += [
        f"time       {options.show_time(report.seconds)} on {report.device}{loops}",
        f"next       {_next(report) if to == 'marlin' else 'docs/serving.md'}",
    ]
    return "\n".join(lines)


def _next(report: Any) -> str:
    """A command to go on with, as a shell takes it; perplexity is asked of what gives logits."""
    from marlin_gptq.modeling.architecture import read_config
    from marlin_gptq.modeling.classes import has_language_head

    command = "marlin-eval perplexity" if has_language_head(read_config(report.output)) else "marlin-inspect"
    return f"{command} {shlex.quote(str(report.output))}"


def stages(report: Any) -> str:
    """Seconds of each stage of a run, and all together, from the start of the command."""
    spent = {name: cost["seconds"] for name, cost in report.costs.items()}
    shown = [f"{name} {seconds:.1f}" for name, seconds in spent.items() if seconds >= 0.05]
    return f"{', '.join(shown)}: {sum(spent.values()):.1f} s in all"

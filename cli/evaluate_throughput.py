"""marlin-eval throughput: how fast, beside a baseline under the same harness."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marlin_gptq.cli import failures, options
from marlin_gptq.cli.evaluate_tasks import HELP
from marlin_gptq.cli.progress import Display
from marlin_gptq.errors import InputError

if TYPE_CHECKING:
    from marlin_gptq.eval.throughput import Request

EXAMPLES = """\b
Examples:
  marlin-eval throughput llama-2-7b-marlin --baseline meta-llama/Llama-2-7b-hf
  marlin-eval throughput llama-2-7b-marlin --batch 1,4 --prompt 128 --new-tokens 64 --no-graphs
  marlin-eval throughput llama-2-7b-marlin --batch 16 --no-compile --json > speed.json
"""
PROTOCOL = (
    "random tokens, {prompt} in and {new_tokens} out, greedy; medians of {repeats} after one that is not counted; "
    "decode counts the tokens after the first"
)


class Numbers(click.ParamType):
    """Comma-separated numbers from 1."""

    name = "N,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        words = [word.strip() for word in str(value).split(",")]
        if not all(word.isdecimal() and int(word) > 0 for word in words):
            self.fail(f"{value!r}: expected numbers from 1 with commas between, such as 1,16,64.", param, ctx)
        return [int(word) for word in words]


@click.command("throughput", cls=failures.Command, epilog=EXAMPLES, context_settings=HELP)
@click.argument("model")
@click.option("--baseline", metavar="MODEL", help="A second model (directory or hub id) under the same harness.")
@click.option("--batch", type=Numbers(), default="1,16,64", show_default=True, help="Sequences at once.")
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a prompt.")
@click.option("--new-tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens to decode.")
@click.option(
    "--graphs/--no-graphs", default=True, show_default=True,
    help="On a GPU: measure decode steps as CUDA graphs too, not only launched from Python.",
)  # fmt: skip
@click.option(
    "--compile/--no-compile", "compiled", default=None,
    help="Measure decode steps through torch.compile too, half a minute more for each batch.  [default: on a GPU]",
)  # fmt: skip
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed requests of each kind.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the tokens.")
@click.option(
    "--dtype", type=options.Choice(["auto", "float16", "bfloat16", "float32"]), default="auto", show_default=True,
    help="Computing dtype; auto is the model's on a GPU and float32 elsewhere.",
)  # fmt: skip
@options.model_options
def throughput(model: str, baseline: str | None, as_json: bool, debug: bool, **arguments: Any) -> None:
    """Time to first token, prompt and decode tokens per second, and memory of MODEL (a directory or a hub id).

    The model runs alone on one device, as transformers runs it; with --baseline the other one after it, alike.
    """
    display = Display()
    directory, beside = options.open_models(display.say, model, baseline, arguments["revision"], arguments["offline"])
    where, computing = options.torch_device(arguments["device"]), options.torch_dtype(arguments["dtype"])
    named = [(model, directory)]
    if baseline is not None and beside is not None:
        named.append((baseline, beside))

    from marlin_gptq.eval.throughput import Request, require_room
    from marlin_gptq.modeling.architecture import read_config
    from marlin_gptq.modeling.classes import text_config

    requests = [Request(batch, arguments["prompt"], arguments["new_tokens"]) for batch in arguments["batch"]]
    for name, directory in named:
        require_room(text_config(read_config(directory)), requests, name)
    compiled = where.type == "cuda" if arguments["compiled"] is None else arguments["compiled"]
    modes = modes_of(where.type, arguments["graphs"], compiled)
    if where.type != "cuda" and arguments["graphs"]:
        display.say("note: no CUDA graphs on a CPU, decode steps run from Python")
    content: dict[str, Any] = {
        "model": model,
        "baseline": baseline,
        "device": device_name(where),
        "protocol": PROTOCOL.format(**arguments),
        "complete": False,
        "rows": [],
        "models": [],
    } | {key: arguments[key] for key in ("prompt", "new_tokens", "repeats", "seed")}
    stopped = False
    try:
        for name, directory in named:
            _measure(display, content, name, directory, where, computing, requests, modes, arguments)
        content["complete"] = True
    except KeyboardInterrupt:
        stopped = True
    add_ratios(content)
    if as_json:
        click.echo(json.dumps(content))
    else:
        print_table(content)
    if stopped:
        raise failures.Interrupted("interrupted: the figures above are those that were finished")
    if all(row["error"] for row in content["rows"]):
        raise InputError(f"nothing was measured: {content['rows'][0]['error']}")


def modes_of(device: str, graphs: bool, compiled: bool) -> list[str]:
    """The modes of eval/throughput.py that the options ask for on this kind of device."""
    recorded = graphs and device == "cuda"
    modes = ["eager"] + (["graphs"] if recorded else [])
    return modes + ([("compile+graphs" if recorded else "compile")] if compiled else [])


def _measure(
    display: Display,
    content: dict[str, Any],
    name: str,
    directory: Path,
    where: Any,
    computing: Any,
    requests: list[Request],
    modes: list[str],
    arguments: dict[str, Any],
) -> None:
    import torch

    from marlin_gptq.eval.harness_model import kernel_name
    from marlin_gptq.eval.throughput import measure, memory
    from marlin_gptq.eval.whole_model import load_whole

    display.say(f"loading {name}")
    loaded = load_whole(directory, where, computing)
    dtype = str(next(loaded.parameters()).dtype).removeprefix("torch.")
    content["models"].append({"model": name, "dtype": dtype, "kernel": kernel_name(loaded, where)} | memory(loaded))
    runs, total = arguments["repeats"] + 1, (arguments["repeats"] + 1) * len(requests) * len(modes)
    done = 0
    with display.counting(f"throughput of {name}") as progress:

        def one_more() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        settings = {"repeats": arguments["repeats"], "seed": arguments["seed"], "progress": one_more}
        for number, speed in enumerate(measure(loaded, requests, modes, **settings), 1):
            if speed.error:
                display.say(f"{name}, {speed.mode}: {speed.error}")
            content["rows"].append({"model": name} | speed.to_dict())
            if done < number * runs:
                done = number * runs
                progress(done, total)
    del loaded
    gc.collect()
    if where.type == "cuda":
        torch.cuda.empty_cache()


def add_ratios(content: dict[str, Any]) -> None:
    """For each row of the model with a row of the baseline to it: how many times as fast."""
    content["ratios"] = []
    found = {(row["model"], row["mode"], row["batch"]): row for row in content["rows"] if not row["error"]}
    for (name, mode, batch), row in found.items():
        other = found.get((content["baseline"], mode, batch))
        if name == content["model"] and other is not None and other is not row:
            ratio = {key: row[key] / other[key] for key in ("prefill_tokens_per_second", "decode_tokens_per_second")}
            content["ratios"].append({"mode": mode, "batch": batch} | ratio)
    if len(content["models"]) == 2:
        one, other = content["models"]
        content["memory_ratio"] = {key: one[key] / other[key] for key in ("weights", "linears")}


def print_table(content: dict[str, Any]) -> None:
    """The figures on stdout."""
    from rich.markup import escape
    from rich.table import Table

    from marlin_gptq.eval.throughput import MEANINGS

    columns = (
        "model",
        "mode",
        "batch",
        "first token",
        "prompt tokens/s",
        "decode tokens/s",
        "ms a step",
        "peak memory",
    )
    table = Table(*columns)
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for row in content["rows"]:
        start = (escape(row["model"]), row["mode"], str(row["batch"]))
        if row["error"]:
            table.add_row(*start, "-", "-", "-", "-", "-")
            continue
        table.add_row(
            *start,
            f"{1000 * row['time_to_first_token']:.1f} ms",
            f"{row['prefill_tokens_per_second']:.0f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{1000 * row['decode_step_seconds']:.2f}",
            options.show_size(row["peak_memory"]) if row["peak_memory"] else "",
        )
    for ratio in content["ratios"]:
        rates = (f"{ratio[key]:.2f} x" for key in ("prefill_tokens_per_second", "decode_tokens_per_second"))
        table.add_row("x baseline", ratio["mode"], str(ratio["batch"]), "", *rates, "", "")
    options.table_console().print(table)
    for row in content["rows"]:
        if row["error"]:
            click.echo(f"{row['model']}, {row['mode']}: {row['error']}")
    for entry in content["models"]:
        sizes = f"{options.show_size(entry['weights'])}, linears of the blocks {options.show_size(entry['linears'])}"
        click.echo(f"{entry['model']}: {entry['dtype']}, weights {sizes}; {entry['kernel']}")
    if "memory_ratio" in content:
        ratio = content["memory_ratio"]
        click.echo(f"weights: {ratio['weights']:.3f} x baseline, linears of the blocks {ratio['linears']:.3f} x")
    for mode in dict.fromkeys(row["mode"] for row in content["rows"]):
        click.echo(f"{mode}: {MEANINGS[mode]}")
    click.echo(f"{content['device']}: {content['protocol']}")


def device_name(where: Any) -> str:
    """The name of the GPU, or cpu."""
    import torch

    return torch.cuda.get_device_name(where) if where.type == "cuda" else where.type

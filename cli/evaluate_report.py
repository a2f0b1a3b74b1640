"""marlin-eval report: everything about a quantized model on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from marlin_gptq.cli import failures, harness_options, options
from marlin_gptq.cli.evaluate_tasks import HELP, Named, mmlu_tasks, run_models
from marlin_gptq.cli.progress import Display
from marlin_gptq.errors import InputError
from marlin_gptq.eval.result_files import require_as_asked, require_result_file, write_json, write_text
from marlin_gptq.text_sources import require_source

EXAMPLES = """\b
Examples:
  marlin-eval report llama-2-7b-marlin --baseline meta-llama/Llama-2-7b-hf --tasks mmlu --datasets wikitext2,redpajama
  marlin-eval report tiny-marlin --baseline examples/tiny-llama --data-dir mmlu    (needs no network)
"""


@click.command("report", cls=failures.Command, epilog=EXAMPLES, context_settings=HELP)
@click.argument("model")
@click.option("--baseline", metavar="MODEL", help="The full-precision model (directory or hub id) it was made from.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("report.html"), show_default=True,
    help="The page; the same figures stand in a .json file beside it.",
)  # fmt: skip
@click.option(
    "--datasets", default="wikitext2", show_default=True, metavar="NAME,…",
    help=f"Texts for perplexity and divergence, each {options.DATASETS}.",
)  # fmt: skip
@click.option("--seq-len", type=click.IntRange(2), help="Tokens per window.  [default: 4096, or the model's context]")
@click.option("--tasks", default="", metavar="NAME,…", help="Tasks of lm-eval, for instance mmlu.")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), metavar="DIR",
    help="MMLU from the original CSV files (DIR/test, DIR/dev); needs no network.",
)  # fmt: skip
@click.option("--subjects", default="", metavar="NAME,…", help="Only these subjects of --data-dir.")
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples in prompts of tasks.  [default: the task's own]")
@click.option(
    "--batch-size", type=harness_options.BatchSize(), default="auto", show_default=True,
    help="Sequences per forward of tasks.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), help="Only the first windows and questions: for tests only.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of document and few-shot choice.")
@click.option(
    "--throughput",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measurements to show: JSON, a list of objects.",
)
@click.option("--no-card", is_flag=True, help="Leave the model card (README.md in MODEL) as it is.")
@click.option(
    "--dtype", type=options.Choice(["auto", "float16", "bfloat16", "float32"]), default="auto", show_default=True,
    help="Computing dtype; auto is the model's on a GPU and float32 elsewhere.",
)  # fmt: skip
@options.model_options
def report(model: str, baseline: str | None, output: Path, as_json: bool, debug: bool, **arguments: Any) -> None:
    """One page on MODEL: perplexity, divergence, tasks, layers, time and memory; also as JSON and in its model card."""
    display = Display()
    if output.suffix == ".json":
        raise InputError(f"{output}: the figures go to a .json file beside the page; give a page: report.html")
    figures_file, speeds = output.with_suffix(".json"), arguments["throughput"]
    if speeds is not None and speeds.exists() and figures_file.exists() and figures_file.samefile(speeds):
        raise InputError(f"{output}: its figures go to {figures_file}, the file of --throughput; give another --output")
    for file in (output, figures_file):
        require_result_file(file)
    offline, datasets = arguments["offline"], _names(arguments["datasets"])
    directory, base = options.open_models(display.say, model, baseline, arguments["revision"], offline)
    harness_options.quiet_harness(display.say)
    for dataset in datasets:
        require_source(dataset, split="evaluation", offline=offline)
    harness_options.use_offline(offline, display.say, hub=bool(_names(arguments["tasks"])))

    from marlin_gptq.eval import report as figures
    from marlin_gptq.eval.task_record import TaskRecord, versions

    where = options.torch_device(arguments["device"])
    settings = {
        "datasets": datasets,
        "tasks": _names(arguments["tasks"]) + (["mmlu (CSV files)"] if arguments["data_dir"] else []),
        "device": where.type,
    } | {name: arguments[name] for name in ("seq_len", "num_fewshot", "batch_size", "limit", "seed", "dtype")}
    shown, beside = display_name(model), None if baseline is None else display_name(baseline)
    content = figures.empty_report(shown, beside, settings, versions())
    content["quantization"] = figures.read_quantization(directory)
    if arguments["throughput"]:
        content["throughput"] = figures.read_throughput(arguments["throughput"])
    suite = _suite(arguments)
    complete = False
    record = None if suite is None else TaskRecord(suite, settings, content["versions"])
    try:
        _perplexities(display, content, directory, base, where, datasets, arguments)
        if record is not None:
            models: list[Named] = [(shown, directory, None)]
            if beside is not None and base is not None:
                models.append((beside, base, None))
            run_models(display, record, models, where, arguments | {"refuse_truncation": False})
            record.finish()
        complete = True
    except KeyboardInterrupt as error:
        some = content["perplexity"] or (record is not None and record.finished_tasks)
        what = "holds what was finished" if some else "was not written, nothing was finished"
        raise failures.Interrupted(f"interrupted: {output} {what}") from error
    finally:
        if record is not None and record.finished_tasks:
            content["tasks"] = record.to_dict()
        if complete or content["perplexity"] or content["tasks"]:
            written = _write(display, content, output, complete, directory if _ours(model, arguments) else None)
    page, numbers = written
    if as_json:
        click.echo(numbers.read_text("utf-8").strip())
    else:
        click.echo(f"written    {page}\nfigures    {numbers}")
    require_as_asked(output, page, numbers)


def display_name(model: str) -> str:
    """A hub id as it is; of a directory its own name, as a page is shown to others."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _suite(arguments: dict[str, Any]) -> Any:
    names, subjects = _names(arguments["tasks"]), _names(arguments["subjects"])
    if subjects and arguments["data_dir"] is None:
        raise InputError("--subjects: chooses among the files of --data-dir; give it too")
    suite = None
    if arguments["data_dir"] is not None:
        suite = mmlu_tasks(arguments["data_dir"], arguments["num_fewshot"] or 0, subjects)
        names = [name for name in names if name != "mmlu"]  # that is what the files are
    if names:
        from marlin_gptq.eval.harness import load_suite

        more = load_suite(names)
        if suite is None:
            return more
        suite.tasks, suite.groups = more.tasks | suite.tasks, more.groups | suite.groups
    return suite


def _perplexities(
    display: Display, content: dict[str, Any], directory: Path, base: Path | None, where: Any, datasets: list[str],
    arguments: dict[str, Any],
) -> None:  # fmt: skip
    from marlin_gptq.calibration import sequence_length
    from marlin_gptq.eval.divergence import compare_models
    from marlin_gptq.eval.perplexity import evaluate_perplexity
    from marlin_gptq.eval.report import add_perplexity

    contexts = [size for path in (directory, base) if path and (size := options.context_length(path))]
    length = sequence_length(arguments["seq_len"], min(contexts, default=None))
    settings: dict[str, Any] = {
        "device": where, "dtype": options.torch_dtype(arguments["dtype"]), "seed": arguments["seed"],
        "limit": arguments["limit"], "offline": arguments["offline"],
    }  # fmt: skip
    for dataset in datasets:
        with display.counting(f"perplexity on {dataset}") as progress:
            if base is None:
                result = evaluate_perplexity(directory, dataset, length, progress=progress, **settings)
                add_perplexity(content, dataset, result, None)
            else:
                found = compare_models(directory, base, dataset, length, progress=progress, **settings)
                add_perplexity(content, dataset, found.model, found)


def _write(
    display: Display, content: dict[str, Any], output: Path, complete: bool, card: Path | None
) -> tuple[Path, Path]:
    from marlin_gptq.eval.report import finish, markdown
    from marlin_gptq.eval.report_html import page
    from marlin_gptq.output_directory import fill_card

    finish(content, complete=complete)
    written = write_text(output, page(content)), write_json(output.with_suffix(".json"), content)
    if card is not None and complete:
        display.say(f"model card filled: {fill_card(card, markdown(content, written[0].name))}")
    return written


def _ours(model: str, arguments: dict[str, Any]) -> bool:
    """Whether the card may be written: a directory on this machine, quantized by us, not one of the hub's cache."""
    from marlin_gptq.output_directory import LOG_FILE

    return not arguments["no_card"] and (Path(model) / LOG_FILE).is_file()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]

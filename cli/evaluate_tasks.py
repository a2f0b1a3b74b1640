"""marlin-eval harness, mmlu and lm-eval: tasks of lm-eval on our models."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marlin_gptq.cli import failures, harness_options, options
from marlin_gptq.cli.progress import Display
from marlin_gptq.cli.task_tables import print_results, result_line
from marlin_gptq.errors import InputError
from marlin_gptq.eval.result_files import require_as_asked, require_result_file
from marlin_gptq.near_names import near_path

if TYPE_CHECKING:
    from marlin_gptq.eval.harness import Suite, TaskResult
    from marlin_gptq.eval.task_record import TaskRecord

Named = tuple[str, Path, "Path | None"]  # what the user calls it, its directory, an original state dict

HELP = {"help_option_names": ["-h", "--help"]}

HARNESS_EXAMPLES = """\b
Examples:
  marlin-eval harness llama-2-7b-marlin --tasks hellaswag,arc_easy --baseline meta-llama/Llama-2-7b-hf -o tasks.json
  marlin-eval harness --pretrained meta-llama/Llama-2-7b-hf --marlin-checkpoint checkpoint.marlin.g128 --tasks piqa
"""
MMLU_EXAMPLES = """\b
Examples:
  marlin-eval mmlu llama-2-7b-marlin --baseline meta-llama/Llama-2-7b-hf --num-fewshot 5
  marlin-eval mmlu llama-2-7b-marlin --data-dir mmlu --subjects anatomy,astronomy    (needs no network)
"""
LM_EVAL_EXAMPLES = """\b
Examples:
  marlin-eval lm-eval -- --model marlin --model_args pretrained=llama-2-7b-marlin --tasks mmlu --batch_size auto
  marlin-eval lm-eval -- --model marlin --model_args pretrained=BASE,marlin_checkpoint=FILE --tasks piqa
  marlin-eval lm-eval -- ls tasks
"""


@click.command("harness", cls=failures.Command, epilog=HARNESS_EXAMPLES, context_settings=HELP)
@click.argument("model", required=False)
@click.option("--tasks", required=True, metavar="NAME,…", help="Tasks, groups, tags, patterns, YAML files of lm-eval.")
@click.option("--include-path", type=click.Path(path_type=Path), metavar="DIR", help="A directory with tasks of yours.")
@harness_options.task_options
@options.model_options
def harness(tasks: str, include_path: Path | None, **arguments: Any) -> None:
    """Tasks of lm-eval on MODEL (a directory or a hub id, full-precision or quantized).

    With --baseline both models answer the same questions, and each difference comes with a paired test: exact McNemar
    for right-or-wrong scores, a z-test of the per-question differences for others.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks: got no name; give one or more, separated by commas")
    display, models = _begin(arguments)
    display.say("reading lm-eval's tasks")
    from marlin_gptq.eval.harness import load_suite

    _evaluate(display, models, load_suite(names, include_path), {"tasks": names}, **arguments)


@click.command("mmlu", cls=failures.Command, epilog=MMLU_EXAMPLES, context_settings=HELP)
@click.argument("model", required=False)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), metavar="DIR",
    help="The original CSV files (DIR/test, DIR/dev) in place of the hub's copy; needs no network.",
)  # fmt: skip
@click.option("--subjects", default="", metavar="NAME,…", help="Only these of the 57 subjects, with --data-dir.")
@harness_options.task_options
@options.model_options
def mmlu(data_dir: Path | None, subjects: str, **arguments: Any) -> None:
    """MMLU on MODEL: lm-eval's own task, from the hub or from the original CSV files."""
    chosen = [name.strip() for name in subjects.split(",") if name.strip()]
    display, models = _begin(arguments)
    display.say("reading the questions")
    arguments["num_fewshot"] = arguments["num_fewshot"] or 0
    _evaluate(
        display, models, mmlu_tasks(data_dir, arguments["num_fewshot"], chosen),
        {"tasks": ["mmlu"], "data_dir": None if data_dir is None else str(data_dir)},
        **arguments,
    )  # fmt: skip


@click.command(
    "lm-eval",
    cls=failures.Command,
    epilog=LM_EVAL_EXAMPLES,
    context_settings={"ignore_unknown_options": True} | HELP,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """lm-eval itself, with every option it has and the model `marlin`; its arguments follow `--`."""
    display = Display()
    display.say("starting lm-eval")
    options.load_libraries(display.say)
    from lm_eval.__main__ import cli_evaluate

    from marlin_gptq.eval.harness_model import marlin_model_class

    marlin_model_class()
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except (ValueError, KeyError, FileNotFoundError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"lm-eval: {error}") from error
    finally:
        sys.argv = before


def mmlu_tasks(data_dir: Path | None, num_fewshot: int, subjects: list[str]) -> Suite:
    """MMLU from a folder of CSV files, or from the hub."""
    from marlin_gptq.eval.harness import load_suite
    from marlin_gptq.eval.mmlu import mmlu_suite

    if data_dir is not None:
        return mmlu_suite(data_dir, num_fewshot, subjects)
    return load_suite([f"mmlu_{name}" for name in subjects] or ["mmlu"])


def _begin(arguments: dict[str, Any]) -> tuple[Display, list[Named]]:
    """Everything that can be refused before tasks are read; the models to evaluate, the baseline last."""
    display = Display()
    model, base, checkpoint = (arguments[name] for name in ("model", "pretrained", "marlin_checkpoint"))
    if (base is None) != (checkpoint is None):
        raise InputError("--pretrained and --marlin-checkpoint belong together: a base model and its state dict")
    if (model is None) == (base is None):
        raise InputError("MODEL: give either a model directory or hub id, or --pretrained with --marlin-checkpoint")
    if arguments["output"] is not None:
        require_result_file(arguments["output"])
    if checkpoint is not None and not checkpoint.is_file():
        meant = near_path(str(checkpoint)) or ";"
        raise InputError(f"{checkpoint}: no such file{meant} --marlin-checkpoint wants a torch state dict")
    named, baseline, offline = model or base, arguments["baseline"], arguments["offline"]
    compared = baseline if checkpoint is None else None  # a state dict is quantized whatever its base model is
    directory, beside = options.open_models(display.say, named, compared, arguments["revision"], offline)
    if baseline is not None and beside is None:
        beside = options.find_model(display.say, baseline, None, offline)
    harness_options.quiet_harness(display.say)
    harness_options.use_offline(offline, display.say, hub=arguments.get("data_dir") is None)
    options.torch_device(arguments["device"])
    models: list[Named] = [(str(checkpoint or named), directory, checkpoint)]
    if beside is not None:
        models.append((baseline, beside, None))
    return display, models


def _evaluate(display: Display, models: list[Named], suite: Suite, chosen: dict[str, Any], **arguments: Any) -> None:
    from marlin_gptq.eval.task_record import TaskRecord, versions

    where = options.torch_device(arguments["device"])
    kept = ("num_fewshot", "limit", "seed", "batch_size", "dtype")
    settings = chosen | {name: arguments[name] for name in kept} | {"device": where.type}
    record = TaskRecord(suite, settings, versions(), arguments["output"])
    try:
        run_models(display, record, models, where, arguments)
    except KeyboardInterrupt as error:
        _show(record, arguments["as_json"])
        at = f", kept in {record.file}" if record.file else ""
        raise failures.Interrupted(f"interrupted: {record.finished_tasks} tasks were finished{at}") from error
    record.finish()
    _show(record, arguments["as_json"])
    if record.file is not None:
        require_as_asked(arguments["output"], record.file)


def run_models(
    display: Display,
    record: TaskRecord,
    models: list[Named],
    where: Any,
    arguments: dict[str, Any],
) -> None:
    """Each model through all tasks, one in memory at a time."""
    from marlin_gptq.eval.harness import open_model, run_suite

    for name, directory, checkpoint in models:
        lm = open_model(
            directory,
            device=where,
            dtype=options.torch_dtype(arguments["dtype"]),
            batch_size=arguments["batch_size"],
            marlin_checkpoint=checkpoint,
            truncate=not arguments["refuse_truncation"],
        )
        record.begin(name, lm.kernel_name())

        def finished(result: TaskResult) -> None:
            record.add(result)
            display.say(result_line(result))

        with display.counting(name) as progress:
            run_suite(
                lm,
                record.suite,
                num_fewshot=arguments["num_fewshot"],
                limit=arguments["limit"],
                seed=arguments["seed"],
                progress=progress,
                finished=finished,
            )
        del lm
        gc.collect()  # the model holds itself in cycles, and the next one wants its memory


def _show(record: TaskRecord, as_json: bool) -> None:
    content = record.to_dict()
    if as_json:
        click.echo(json.dumps(content))
    elif record.finished_tasks:
        print_results(content)

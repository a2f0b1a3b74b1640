"""Results of tasks for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from marlin_gptq.cli import options

if TYPE_CHECKING:
    from marlin_gptq.eval.harness import TaskResult


def result_line(result: TaskResult) -> str:
    """A finished task, for stderr."""
    figures = "  ".join(
        f"{metric_name(key)} {options.with_error(entry['value'], entry['standard_error'], '.4f')}"
        for key, entry in result.metrics.items()
    )
    return f"{result.task}: {figures}  ({result.questions} questions, {options.show_time(result.seconds)})"


def print_results(content: dict[str, Any]) -> None:
    """Groups, then tasks, the baseline beside the model if there is one."""
    from rich.markup import escape
    from rich.table import Table

    models = [content[place] for place in ("model", "baseline") if content[place]]
    rows = {(row["task"], row["metric"]): row for row in content["comparison"]}
    figures = ("model", "baseline", "difference", "p") if rows else ("model",)
    table = Table("task", "metric", "questions", "shots", *figures)
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    results = [*models[0]["groups"], *models[0]["tasks"]]
    other = {result["task"]: result for model in models[1:] for result in [*model["groups"], *model["tasks"]]}
    for result in results:
        for key, entry in result["metrics"].items():
            cells = [options.with_error(entry["value"], entry["standard_error"], ".4f")]
            row = rows.get((result["task"], key))
            if row:
                beside = other[result["task"]]["metrics"][key]
                cells += [
                    options.with_error(beside["value"], beside["standard_error"], ".4f"),
                    options.with_error(row["difference"], row["difference_standard_error"], "+.4f"),
                    "" if row["p_value"] is None else f"{row['p_value']:.3f}",
                ]
            table.add_row(
                escape(result["task"]), metric_name(key), str(result["questions"]), str(result["num_fewshot"]), *cells
            )
    options.table_console().print(table)
    for place, model in zip(("model", "baseline"), models, strict=False):
        click.echo(f"{place}: {model['name']}, {model['computed_by']}")
    tests = sorted({row["test"] for row in content["comparison"] if row["test"]})
    if tests:
        click.echo(f"p: two-sided, over the same questions ({'; '.join(tests)}); from 0.05 upward: no difference shown")
    for note in content["notes"]:
        click.echo(f"note: {note}")
    if not content["complete"]:
        click.echo("note: INCOMPLETE, only the finished tasks")


def metric_name(key: str) -> str:
    """`acc,none` → acc; another filter than none stands in brackets."""
    metric, _, chosen = key.partition(",")
    return metric if chosen == "none" else f"{metric} ({chosen})"

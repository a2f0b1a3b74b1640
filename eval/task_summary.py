"""What the results of tasks add up to: group averages as lm-eval forms them, and model against baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from marlin_gptq.eval.harness import Suite, TaskResult
from marlin_gptq.eval.paired import paired_test


def group_results(suite: Suite, results: Sequence[TaskResult]) -> list[TaskResult]:
    """The groups of the suite all of whose tasks are there, aggregated by lm-eval's own rule.

    A group that weighs by size has as scores those of all its questions, so that a paired test covers them all.
    """
    by_name = {result.task: result for result in results}
    flat = {result.task: _as_lm_eval(result) for result in results}
    found = []
    for name, group in suite.groups.items():
        members = [task.task_name for task in group.get_all_tasks()]
        if not members or not all(member in by_name for member in members) or not group.has_aggregation:
            continue
        content: dict[str, Any] = dict(group.aggregate(flat))
        weighted = {entry.metric: entry.weight_by_size for entry in group.aggregate_metric_list}
        metrics, scores = {}, {}
        for key, value in content.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            error = content.get(f"{metric}_stderr,{chosen}")
            first = by_name[members[0]].metrics.get(key, {})
            metrics[key] = {
                "value": float(value),
                "standard_error": None if error in (None, "N/A") else float(error),
                "higher_is_better": first.get("higher_is_better"),
            }
            if weighted.get(metric) and all(key in by_name[member].scores for member in members):
                scores[key] = [score for member in members for score in by_name[member].scores[key]]
        found.append(
            TaskResult(
                task=name,
                num_fewshot=by_name[members[0]].num_fewshot,
                questions=sum(by_name[member].questions for member in members),
                metrics=metrics,
                truncated_prompts=sum(by_name[member].truncated_prompts for member in members),
                seconds=sum(by_name[member].seconds for member in members),
                scores=scores,
            )
        )
    return found


def compare(model: Sequence[TaskResult], baseline: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """One row a task and metric that both have: values, difference, its standard error, and a paired test.

    The test is there for metrics that are means over questions; for others the row says that there is none.
    """
    others = {result.task: result for result in baseline}
    rows = []
    for result in model:
        other = others.get(result.task)
        if other is None:
            continue
        for key, own in result.metrics.items():
            if key not in other.metrics:
                continue
            row: dict[str, Any] = {
                "task": result.task,
                "metric": key,
                "questions": result.questions,
                "value": own["value"],
                "baseline_value": other.metrics[key]["value"],
                "difference": own["value"] - other.metrics[key]["value"],
            }
            one, two = result.scores.get(key), other.scores.get(key)
            if one is not None and two is not None and len(one) == len(two):
                tested = paired_test(one, two).to_dict()
                row |= {name: value for name, value in tested.items() if name not in ("difference", "questions")}
            else:
                row |= {"test": None, "p_value": None, "difference_standard_error": None}
            rows.append(row)
    return rows


def _as_lm_eval(result: TaskResult) -> dict[str, Any]:
    content: dict[str, Any] = {"sample_len": result.questions}
    for key, entry in result.metrics.items():
        metric, _, chosen = key.partition(",")
        content[key] = entry["value"]
        content[f"{metric}_stderr,{chosen}"] = "N/A" if entry["standard_error"] is None else entry["standard_error"]
    return content

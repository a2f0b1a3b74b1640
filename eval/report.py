"""The figures of a report: measured, or read from the quantized directory; as JSON, and in part for the model card."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from marlin_gptq.errors import InputError
from marlin_gptq.eval.divergence import Comparison
from marlin_gptq.eval.perplexity import PerplexityResult
from marlin_gptq.model_directory import read_json
from marlin_gptq.output_directory import LOG_FILE


def empty_report(
    model: str, baseline: str | None, settings: dict[str, Any], versions: dict[str, str]
) -> dict[str, Any]:
    """A report without figures yet; `add_perplexity` and the keys `tasks`, `quantization`, `throughput` fill it."""
    return {
        "complete": False,
        "model": model,
        "baseline": baseline,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "perplexity": [],
        "tasks": None,
        "quantization": None,
        "throughput": None,
        "settings": settings,
        "versions": versions,
        "device": device_name(settings.get("device", "cpu")),
        "missing": [],
    }


def add_perplexity(content: dict[str, Any], dataset: str, result: PerplexityResult, found: Comparison | None) -> None:
    """One dataset: the model's perplexity, the baseline's, and the divergence or why there is none."""
    entry: dict[str, Any] = {"dataset": dataset, "model": result.to_dict(), "baseline": None, "divergence": None}
    if found is not None:
        entry["baseline"] = found.baseline.to_dict()
        entry["difference_percent"] = 100 * (result.perplexity / found.baseline.perplexity - 1)
        entry["divergence"] = found.divergence.to_dict() if found.divergence else None
        if found.missing:
            entry["divergence_missing"] = found.missing
    content["perplexity"].append(entry)


def read_quantization(directory: Path) -> dict[str, Any] | None:
    """The log that marlin-quantize left, without the path it wrote to; None where there is none.

    Raises InputError for a log that is no JSON object with records.
    """
    file = directory / LOG_FILE
    if not file.is_file():
        return None
    content = read_json(file)
    if not isinstance(content.get("records"), list):
        raise InputError(f"{file}: holds no list `records`; it is not a log of marlin-quantize")
    content.pop("output", None)
    return content


def read_throughput(file: Path) -> list[dict[str, Any]]:
    """Measured rows from a JSON file: a list of flat objects, an object with such a list, or one flat object."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file; --throughput wants a JSON file of measured rows") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: not a JSON file ({error})") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list) and value]
        content = lists[0] if lists else [content]
    rows = content if isinstance(content, list) else []
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: expected a list of objects, one per measurement")
    return [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in rows]


def finish(content: dict[str, Any], *, complete: bool) -> None:
    """Say what is not in the report."""
    missing = content["missing"] = []
    if not complete:
        missing.append("The run was interrupted: only what was finished stands here.")
    if content["baseline"] is None:
        missing.append("No baseline was given, so nothing is compared (--baseline).")
    if content["tasks"] is None:
        missing.append("No tasks were run (--data-dir for MMLU, --tasks for any task of lm-eval).")
    if content["quantization"] is None:
        missing.append(f"The directory has no {LOG_FILE}, so time, memory and error of quantization are not known.")
    if content["throughput"] is None:
        missing.append("Throughput was not measured (--throughput takes a JSON file of measurements).")
    content["complete"] = complete


def markdown(content: dict[str, Any], report_name: str) -> str:
    """The headline figures as a table for the model card."""
    rows = []
    for entry in content["perplexity"]:
        one, other, found = entry["model"], entry["baseline"], entry["divergence"]
        limited = " (LIMITED)" if "LIMITED" in one["protocol"] else ""
        name = f"perplexity, {entry['dataset']}, windows of {one['seq_len']}{limited}"
        rows.append((name, f"{one['perplexity']:.4f}", f"{other['perplexity']:.4f}" if other else ""))
        if found:
            rows.append((f"KL from the baseline, {entry['dataset']}{limited}", f"{found['kl_nats']:.5f} nats", "0"))
            agreement = f"{found['top1_agreement_percent']:.2f} %"
            rows.append((f"top-1 agreement, {entry['dataset']}{limited}", agreement, "100 %"))
    for row in task_rows(content, groups_first=True)[:8]:
        name = f"{row['task']}, {row['metric']}, {row['shots']}-shot{row['limited']}"
        rows.append((name, row["value"], row["baseline"]))
    table = "\n".join(f"| {name} | {value} | {base} |" for name, value, base in rows)
    packages = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    head = f"| figure | this model | {content['baseline'] or 'baseline'} |\n|---|---|---|\n"
    measured = f"Measured {content['date']} on {content['device']} with {packages}; details in {report_name}."
    return f"{head}{table}\n\n{measured}"


def task_rows(content: dict[str, Any], *, groups_first: bool) -> list[dict[str, str]]:
    """One row a group or task and metric, formatted; only groups (and tasks outside them) if `groups_first`."""
    tasks = content["tasks"]
    if not tasks or not tasks["model"]:
        return []
    compared = {(row["task"], row["metric"]): row for row in tasks["comparison"]}
    groups, singles = tasks["model"]["groups"], tasks["model"]["tasks"]
    chosen = (groups or singles) if groups_first else singles
    limited = " (LIMITED)" if tasks["settings"].get("limit") else ""
    rows = []
    for result in chosen:
        for key, entry in result["metrics"].items():
            row = compared.get((result["task"], key))
            metric, _, filtered = key.partition(",")
            rows.append(
                {
                    "task": result["task"],
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "questions": str(result["questions"]),
                    "shots": str(result["num_fewshot"]),
                    "limited": limited,
                    "value": _with_error(entry["value"], entry["standard_error"]),
                    "baseline": f"{row['baseline_value']:.4f}" if row else "",
                    "difference": _with_error(row["difference"], row["difference_standard_error"], "+") if row else "",
                    "p": "" if not row or row["p_value"] is None else f"{row['p_value']:.3f}",
                }
            )
    return rows


def device_name(kind: str) -> str:
    """`cpu`, or the GPU's name."""
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")

"""A report as one page that needs nothing else: its style and plots stand inside it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marlin_gptq.eval.report import task_rows
from marlin_gptq.eval.report_plots import error_plot, scale_plot
from marlin_gptq.eval.report_throughput import shown_size, throughput_notes, throughput_table
from marlin_gptq.eval.result_files import TITLE_END


def page(content: dict[str, Any]) -> str:
    """HTML of the figures in `content` (see report.py)."""
    name = content["model"].rstrip("/").rpartition("/")[2]
    parts = [
        f"<h1>{_text(name)}</h1>",
        f'<p class="soft">{_text(_subtitle(content))}</p>',
        *(f'<p class="note">{_text(note)}</p>' for note in _notes(content)),
        _cards(content),
        _perplexity(content),
        _tasks(content),
        _layers(content),
        _quantization(content),
        _throughput(content),
        _settings(content),
    ]
    body = "\n".join(part for part in parts if part)
    style = (Path(__file__).parent / "report.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(name)}{TITLE_END}\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _subtitle(content: dict[str, Any]) -> str:
    beside = f" beside {content['baseline']}" if content["baseline"] else ""
    return f"Evaluation of {content['model']}{beside}, {content['date']}, on {content['device']}"


def _notes(content: dict[str, Any]) -> list[str]:
    notes = []
    if content["settings"].get("limit"):
        notes.append("LIMITED run (--limit): the figures are for tests only and comparable with no others.")
    return notes + content["missing"]


def _cards(content: dict[str, Any]) -> str:
    cards: list[tuple[str, str]] = []
    for entry in content["perplexity"]:
        before = f"{entry['baseline']['perplexity']:.2f} → " if entry["baseline"] else ""
        cards.append((f"{before}{entry['model']['perplexity']:.2f}", f"perplexity, {entry['dataset']}"))
    for entry in content["perplexity"][:1]:
        if entry["divergence"]:
            cards.append((f"{entry['divergence']['kl_nats']:.4f}", "KL from the baseline, nats per token"))
            cards.append((f"{entry['divergence']['top1_agreement_percent']:.1f} %", "same first choice (top-1)"))
    for row in task_rows(content, groups_first=True)[:1]:
        shown = [_short(figure) for figure in (row["baseline"], row["value"].split(" ")[0]) if figure]
        cards.append((" → ".join(shown), f"{row['task']}, {row['metric']}, {row['shots']}-shot"))
    log = content["quantization"]
    if log:
        cards.append((f"{shown_size(log['bytes_before'])} → {shown_size(log['bytes_after'])}", "size of the weights"))
        cards.append((_time(log["seconds"]), f"to quantize, on {log['device']}"))
    return (
        '<div class="cards">'
        + "".join(
            # a line may break at the arrow, not between a number and its unit
            f'<div class="card"><b>{_text(value).replace(" ", "&nbsp;").replace("&nbsp;→&nbsp;", "&nbsp;→ ")}</b>'
            f"<span>{_text(label)}</span></div>"
            for value, label in cards
        )
        + "</div>"
    )


def _short(figure: str) -> str:
    """A share as percent, as papers give accuracy; any other number as it is."""
    number = float(figure)
    return f"{100 * number:.2f} %" if 0 <= number <= 1 else figure


def _perplexity(content: dict[str, Any]) -> str:
    if not content["perplexity"]:
        return ""
    rows, protocols = [], []
    for entry in content["perplexity"]:
        one, other, found = entry["model"], entry["baseline"], entry["divergence"]
        rows.append(
            [
                entry["dataset"],
                f"{one['perplexity']:.4f}",
                f"{other['perplexity']:.4f}" if other else "",
                f"{entry['difference_percent']:+.2f} %" if other else "",
                _error(found, "kl_nats", ".5f") if found else "",
                _error(found, "top1_agreement_percent", ".2f") if found else "",
                str(one["tokens"]),
                f"{one['tokens_per_second']:.0f}",
            ]
        )
        protocols.append(f"<b>{_text(entry['dataset'])}</b>: {_text(one['protocol'])}.")
        if entry.get("divergence_missing"):
            protocols.append(_text(f"{entry['dataset']}: {entry['divergence_missing']}."))
    head = ["dataset", "model", "baseline", "change", "KL, nats", "top-1, %", "tokens", "tokens/s"]
    computed = content["perplexity"][0]["model"]["kernel"]
    about = (
        f"Token perplexity, computed by: {computed}. KL is the mean over tokens of KL(baseline ‖ model) of the "
        "next-token distributions, with its standard error (a window is the unit). Tokens per second are those of "
        "this evaluation, which reads every block from disk: no measure of serving."
    )
    lines = "".join(f'<p class="soft">{line}</p>' for line in (_text(about), *protocols))
    return f"<h2>Perplexity and divergence</h2>{_table(head, rows)}{lines}"


def _tasks(content: dict[str, Any]) -> str:
    tasks = content["tasks"]
    if not tasks or not tasks["model"]:
        return ""
    keys = ["task", "metric", "questions", "shots", "value", "baseline", "difference", "p"]
    head = ["task", "metric", "questions", "shots", "model", "baseline", "difference", "p"]
    compared = bool(tasks["comparison"])
    shown = len(keys) if compared else 5
    parts = ["<h2>Tasks</h2>"]
    if tasks["model"]["groups"]:
        rows = [[row[key] for key in keys[:shown]] for row in task_rows(content, groups_first=True)]
        parts += [_table(head[:shown], rows, left=2), "<h2>Tasks one by one</h2>"]
    rows = [[row[key] for key in keys[:shown]] for row in task_rows(content, groups_first=False)]
    parts.append(_table(head[:shown], rows, left=2))
    about = "Values and their standard errors by lm-eval; groups averaged as lm-eval does."
    if compared:
        tests = sorted({row["test"] for row in tasks["comparison"] if row["test"]})
        about += (
            f" p: two-sided, over the same questions ({'; '.join(tests)}). From 0.05 upward these questions show no "
            "difference; among many tasks some fall below by chance."
        )
    return "".join(parts) + "".join(f'<p class="soft">{_text(line)}</p>' for line in (about, *tasks["notes"]))


def _layers(content: dict[str, Any]) -> str:
    records = (content["quantization"] or {}).get("records")
    if not records:
        return ""
    method = content["quantization"]["config"].get("method")
    measure = (
        "squared error of the weights over their squares"
        if method == "rtn"
        else "squared output error over squared output on the calibration text"
    )
    worst = sorted(records, key=lambda row: -row["relative_error"])[:5]
    rows = [
        [row["name"], f"{row['relative_error']:.5f}", f"{row['damp_percent']:g}", f"{row['scale_mean']:.3g}"]
        for row in worst
    ]
    return (
        '<h2>Layer by layer</h2><div class="plots">'
        f"<figure>{error_plot(records)}<figcaption>Relative error of each linear: {measure}.</figcaption></figure>"
        f"<figure>{scale_plot(records)}<figcaption>Scales of each linear: mean (mark), smallest to largest (bar)."
        "</figcaption></figure></div>"
        f"<p>The five linears with the largest error:</p>{_table(['linear', 'error', 'damping', 'mean scale'], rows)}"
    )


def _quantization(content: dict[str, Any]) -> str:
    log = content["quantization"]
    if not log:
        return ""
    gpu = log.get("peak_gpu_bytes")
    pairs = [
        ("time", f"{_time(log['seconds'])} on {log['device']}"),
        ("largest GPU memory", shown_size(gpu) if gpu else "no GPU was used"),
        ("weights before and after", f"{shown_size(log['bytes_before'])} → {shown_size(log['bytes_after'])}"),
        ("linears", str(len(log["records"]))),
        ("mean relative error", f"{log['mean_relative_error']:.5f}"),
        ("dtype of scales", log["dtype"]),
    ]
    pairs += [(f"calibration: {key}", _setting(value)) for key, value in (log.get("calibration") or {}).items()]
    pairs += [(key, _setting(value)) for key, value in log["config"].items()]
    return f"<h2>Quantization</h2>{_pairs(pairs)}"


def _throughput(content: dict[str, Any]) -> str:
    rows = content["throughput"]
    if not rows:
        return "<h2>Throughput</h2><p>Not measured.</p>"
    head, cells, words = throughput_table(rows)
    notes = "".join(f'<p class="soft">{_text(line)}</p>' for line in throughput_notes(rows))
    return f"<h2>Throughput</h2>{_table(head, cells, left=words)}{notes}"


def _settings(content: dict[str, Any]) -> str:
    pairs = [(key, _setting(value)) for key, value in content["settings"].items() if value is not None]
    versions = list(content["versions"].items())
    return f"<h2>Settings of this evaluation</h2>{_pairs(pairs)}<h2>Versions</h2>{_pairs(versions)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns are text, the others numbers. A narrow screen shows each row as names and values."""
    kinds = ["" if place < left else ' class="n"' for place in range(len(head))]
    top = "".join(f"<th{kind}>{_text(name)}</th>" for kind, name in zip(kinds, head, strict=True))

    def line(row: Sequence[str]) -> str:
        cells = zip(kinds, head, row, strict=True)
        return "".join(f'<td{kind} data-head="{_text(name)}">{_text(cell)}</td>' for kind, name, cell in cells)

    body = "".join(f"<tr>{line(row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="rows"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><td>{_text(key.replace('_', ' '))}</td><td>{_text(value)}</td></tr>" for key, value in pairs)
    return f'<table class="pairs"><tbody>{rows}</tbody></table>'


def _error(found: dict[str, Any], key: str, form: str) -> str:
    error = found[f"{key}_standard_error"]
    return format(found[key], form) + ("" if error is None else f" ± {error:{form}}")


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _text(value: Any) -> str:
    return html.escape(str(value))

#!/usr/bin/env python3
"""Measure what each technique is worth: variants x models x calibration seeds, one table in the end.

    python scripts/ablation.py build/ablation --data ../shared/data/calib/calib.jsonl \
        --model examples/tiny-llama --model ../shared/data/small-llama --seeds 0 1 2 --jobs 4

Every run quantizes with `quantize_model`, and measures the directory that was written as `marlin-eval perplexity`
does: on the first windows of WikiText-2 test and on documents of DATA that were not calibrated on with that seed, of
which one half is for choosing settings ("validation") and the other for reporting ("held-out"). Results are kept in
OUT/results.jsonl run by run; started again, only what is missing is done. OUT/table.md has mean and standard
deviation over seeds, OUT/plot.svg the same as bars.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from marlin_gptq import QuantizationConfig, quantize_model
from marlin_gptq.calibration import calibration_samples, load_tokenizer, token_ids
from marlin_gptq.config import PRESETS
from marlin_gptq.eval.divergence import compare_models
from marlin_gptq.text_sources import load_documents

# What the pass itself can do: everything of `best` but the tuning.
_PASS = {name: value for name, value in PRESETS["best"].items() if not name.startswith("tune")}
# What `fast` was before its blocks were tuned: one pass, with a corrected target and both sides.
_ONE_PASS = {
    "tune_block_steps": 0,
    "refine_sweeps": 1,
    "tune_rate": 1e-3,
    "correct_target": 0.5,
    "two_sided": True,
}
# And before that: one-sided, with all weights tuned for a short time.
_SHORT = _ONE_PASS | {"two_sided": False, "correct_target": 0.0, "tune_steps": 250}
# Each variant: the preset it starts from and what it changes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("marlin", {"method": "rtn"}),
    "marlin": ("marlin", {}),
    "no clipping": ("marlin", {"clip": False}),
    "clip under plain Hessian": ("marlin", {"clip_hessian": "plain"}),
    "damp 0.01": ("marlin", {"damp_percent": 0.01}),
    "damp 0.001": ("marlin", {"damp_percent": 0.001}),
    "signed scales": ("marlin", {"signed_scales": True}),
    "act-order by groups": ("marlin", {"act_order": "groups"}),
    "act-order by columns": ("marlin", {"act_order": "columns"}),
    "act-order by columns, plain Hessian": ("marlin", {"act_order": "columns", "clip_hessian": "plain"}),
    "token cap 4": ("marlin", {"token_cap": 4.0}),
    "equal samples": ("marlin", {"equal_samples": True}),
    "true-sequential": ("marlin", {"true_sequential": True}),
    "corrected target 0.25": ("marlin", {"correct_target": 0.25}),
    "corrected target 1": ("marlin", {"correct_target": 1.0}),
    "refine 2 sweeps": ("marlin", {"refine_sweeps": 2}),
    "K-best 4": ("marlin", {"beam_width": 4}),
    "K-best 16": ("marlin", {"beam_width": 16}),
    "two-sided": ("marlin", {"two_sided": True}),
    "packed windows": ("marlin", {"pack": True}),
    "pass of best": ("marlin", _PASS),
    "pass of best, act-order by columns": ("marlin", _PASS | {"act_order": "columns"}),
    "pass of best, true-sequential": ("marlin", _PASS | {"true_sequential": True}),
    "pass of best, corrected target 0.25": ("marlin", _PASS | {"correct_target": 0.25}),
    "pass of best, two-sided": ("marlin", _PASS | {"two_sided": True}),
    "pass of best, two-sided, corrected target 0.5": ("marlin", _PASS | {"two_sided": True, "correct_target": 0.5}),
    "pass of best, K-best 4": ("marlin", _PASS | {"beam_width": 4}),
    "pass of best, K-best 16": ("marlin", _PASS | {"beam_width": 16}),
    "pass of best, equal samples": ("marlin", _PASS | {"equal_samples": True}),
    "pass of best, blocks tuned": ("marlin", _PASS | {"tune_block_steps": 250, "tune_codes": True}),
    "pass of best, blocks tuned, 100 steps": ("marlin", _PASS | {"tune_block_steps": 100, "tune_codes": True}),
    "pass of best, blocks tuned, scales and norms only": (
        "marlin",
        _PASS | {"tune_block_steps": 100, "tune_scale_rate": 1e-3},
    ),
    "short tuning, blocks tuned instead": ("fast", _SHORT | {"tune_steps": 0, "tune_block_steps": 250}),
    "short tuning, blocks tuned too": ("fast", _SHORT | {"tune_block_steps": 250}),
    "best, scales and norms only": ("best", {"tune_codes": False}),
    "best, calibration text only": ("best", {"tune_written": 0}),
    "best, corrected target 0.25": ("best", {"correct_target": 0.25}),
    "best, larger rates": ("best", {"tune_rate": 7e-4, "tune_scale_rate": 1e-3}),
    "best, a quarter as long": ("best", {"tune_steps": 1000, "tune_written": 2048}),
    "best, two-sided": ("best", {"two_sided": True}),
    "fast": ("fast", {}),
    "fast, blocks not tuned": ("fast", {"tune_block_steps": 0}),
    "fast, 50 steps": ("fast", {"tune_block_steps": 50}),
    "fast, 200 steps": ("fast", {"tune_block_steps": 200}),
    "fast, scales and norms only": ("fast", {"tune_codes": False}),
    "fast, rate 5e-3": ("fast", {"tune_rate": 5e-3}),
    "fast, documents": ("fast", {"pack": False}),
    "one pass": ("fast", _ONE_PASS),
    "one pass, one-sided": ("fast", _ONE_PASS | {"two_sided": False}),
    "one pass, target not corrected": ("fast", _ONE_PASS | {"correct_target": 0.0}),
    "one pass, one-sided, target not corrected": ("fast", _SHORT | {"tune_steps": 0}),
    "one pass, two sweeps first": ("fast", _ONE_PASS | {"refine_sweeps": 2}),
    "one pass, 50 steps": ("fast", _ONE_PASS | {"tune_steps": 50}),
    "one pass, 250 steps": ("fast", _ONE_PASS | {"tune_steps": 250}),
    "short tuning": ("fast", _SHORT),
    "short tuning, 50 steps": ("fast", _SHORT | {"tune_steps": 50}),
    "short tuning, 100 steps": ("fast", _SHORT | {"tune_steps": 100}),
    "short tuning, 150 steps": ("fast", _SHORT | {"tune_steps": 150}),
    "short tuning, corrected target 0.25": ("fast", _SHORT | {"correct_target": 0.25}),
    "short tuning, two-sided": ("fast", _SHORT | {"two_sided": True}),
    "short tuning, 100 steps, twice the rate": ("fast", _SHORT | {"tune_steps": 100, "tune_rate": 2e-3}),
    "short tuning, 4 windows a step": ("fast", _SHORT | {"tune_batch": 4}),
    "short tuning, 2 windows a step": ("fast", _SHORT | {"tune_batch": 2}),
    "short tuning, 500 steps of 2 windows": ("fast", _SHORT | {"tune_batch": 2, "tune_steps": 500}),
    "short tuning, 2 windows a step, rate 7e-4": ("fast", _SHORT | {"tune_batch": 2, "tune_rate": 7e-4}),
    "short tuning, 2 sweeps": ("fast", _SHORT | {"refine_sweeps": 2}),
    "best": ("best", {}),
}


def held_out(data: Path, drawn: set[str], part: int, count: int) -> list[str]:
    """`count` documents that were not drawn; part 0 and 1 never share one, whatever was drawn."""
    documents = sorted(set(load_documents(str(data), split="calibration", offline=True)))
    random.Random(0).shuffle(documents)
    return [text for text in documents[part::2] if text not in drawn][:count]


def run_one(settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize and measure one variant; everything in plain types, so that it can cross processes."""
    model, data, out = Path(settings["model"]), Path(settings["data"]), Path(settings["out"])
    device = torch.device(settings["device"])
    preset, changes = VARIANTS[settings["variant"]]
    config = QuantizationConfig.from_preset(preset, **changes, group_size=settings["group_size"])
    tokenizer = load_tokenizer(model)
    samples = calibration_samples(
        tokenizer,
        str(data),
        n_samples=settings["n_samples"],
        seq_len=settings["seq_len"],
        seed=settings["seed"],
    )
    ids = {tuple(sample.tolist()) for sample in samples}
    documents = set(load_documents(str(data), split="calibration", offline=True))
    drawn = {text for text in documents if tuple(token_ids(tokenizer, text, False).tolist()) in ids}
    place = Path(tempfile.mkdtemp(dir=out))
    try:
        report = quantize_model(model, place / "quantized", config, samples, device=device)
        figures = {}
        for name, dataset in texts(place, data, drawn, settings["held_out"]).items():
            limit = settings["windows"] if name == "wikitext2" else None
            compared = compare_models(
                place / "quantized", model, dataset, 1024, device=device, limit=limit, offline=True
            )
            assert compared.divergence is not None
            figures[name] = {
                "kl": compared.divergence.kl_nats,
                "top1": compared.divergence.top1_agreement_percent,
                "gap": compared.model.perplexity - compared.baseline.perplexity,
            }
    finally:
        shutil.rmtree(place, ignore_errors=True)
    key = {name: settings[name] for name in ("variant", "seed", "n_samples", "seq_len", "windows", "group_size")}
    return key | {
        "model": model.name,
        "device": report.device,
        "seconds": report.seconds,
        "peak_gpu_bytes": report.peak_gpu_bytes,
        "costs": report.costs,
        "tuning": report.tuning,
        "figures": figures,
    }


def texts(place: Path, data: Path, drawn: set[str], count: int) -> dict[str, str]:
    """The texts to measure on: WikiText-2 test, and two halves of the documents that were not drawn."""
    found = {"wikitext2": "wikitext2"}
    for part, name in enumerate(("validation", "held-out")):
        lines = [json.dumps({"text": text[:8000]}) for text in held_out(data, drawn, part, count)]
        file = place / f"{name}.jsonl"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        found[name] = str(file)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row a model and variant, mean ± standard deviation over seeds."""
    columns = [("wikitext2", "kl", 4), ("held-out", "kl", 4), ("held-out", "gap", 3), ("wikitext2", "top1", 2)]
    columns += [("wikitext2", "gap", 2), ("validation", "kl", 4)]
    titles = ["model", "variant", "seeds", *(f"{text} {figure}" for text, figure, _ in columns), "seconds", "peak GB"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for model in dict.fromkeys(result["model"] for result in results):
        for variant in VARIANTS:
            rows = [r for r in results if (r["model"], r["variant"]) == (model, variant)]
            if not rows:
                continue
            cells = [model, variant, str(len(rows))]
            for text, figure, digits in columns:
                cells.append(spread([row["figures"][text][figure] for row in rows], digits))
            cells.append(spread([row["seconds"] for row in rows], 0))
            peaks = [row["peak_gpu_bytes"] for row in rows if row["peak_gpu_bytes"] is not None]
            cells.append(f"{max(peaks) / 1e9:.1f}" if peaks else "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Bars: KL on WikiText-2 test over that of the seed recipe, mean over seeds with the standard deviation."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(result["model"] for result in results))
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 7), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        of_model = [result for result in results if result["model"] == model]
        kl: dict[str, list[float]] = {}
        for variant in reversed(VARIANTS):
            values = [r["figures"]["wikitext2"]["kl"] for r in of_model if r["variant"] == variant]
            if values:
                kl[variant] = values
        seed_recipe = statistics.fmean(kl.get("marlin") or next(iter(kl.values())))
        means = [statistics.fmean(values) / seed_recipe for values in kl.values()]
        errors = [statistics.stdev(values) / seed_recipe if len(values) > 1 else 0 for values in kl.values()]
        axis.barh(list(kl), means, xerr=errors, color="#4878a8")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.axvline(0.5, color="black", linewidth=0.8, linestyle="--")
        axis.set_xlim(0, 1.4)
        axis.set_title(f"{model}: KL, seed recipe = 1")
    figure.savefig(file)
    plt.close(figure)


def spread(values: list[float], digits: int) -> str:
    """Mean, and ± sample standard deviation where there are two or more."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", action="append", required=True, help="full-precision directory; repeatable")
    parser.add_argument("--data", type=Path, required=True, help="documents as .jsonl with a field text")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n-samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=40, help="windows of WikiText-2 test")
    parser.add_argument("--held-out", type=int, default=100, help="documents in each half")
    parser.add_argument("--group-size", type=int, default=128)
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "results.jsonl"
    results = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    shared = {name: getattr(arguments, name) for name in ("n_samples", "seq_len", "windows", "held_out", "group_size")}
    keys = ("variant", "seed", "n_samples", "seq_len", "windows", "group_size")
    done = {(r["model"], *(r[key] for key in keys)) for r in results}
    todo = []
    for seed in arguments.seeds:
        for model in arguments.model:
            for variant in arguments.variants:
                settings = shared | {"variant": variant, "seed": seed, "model": model, "device": arguments.device}
                if (Path(model).name, *(settings[key] for key in keys)) not in done:
                    todo.append(settings | {"data": str(arguments.data), "out": str(arguments.out)})
    started = time.perf_counter()
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn"), max_tasks_per_child=None) as pool:
        futures = [pool.submit(run_one, settings) for settings in todo]
        for count, future in enumerate(as_completed(futures), start=1):
            result = future.result()
            results.append(result)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(result) + "\n")
            (arguments.out / "table.md").write_text(table(results), encoding="utf-8")
            left = (time.perf_counter() - started) / count * (len(todo) - count)
            kl = result["figures"]["wikitext2"]["kl"]
            name = f"{result['model']}, {result['variant']}, seed {result['seed']}"
            print(f"[{count}/{len(todo)}] {name}: KL {kl:.5f}, {left:.0f} s left", flush=True)
    print(table(results))
    if results:
        plot(results, arguments.out / "plot.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())

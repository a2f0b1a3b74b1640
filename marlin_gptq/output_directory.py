"""The small files of a quantized directory: config.json, log, model card, and what the tokenizer needs."""

from __future__ import annotations

import json
from pathlib import Path

from marlin_gptq.checkpoint_writer import CheckpointWriter
from marlin_gptq.model_directory import read_json
from marlin_gptq.modeling.classes import auto_class
from marlin_gptq.report import QuantizeReport
from marlin_gptq.sealed_files import write_whole

LOG_FILE = "quantize_log.json"
CARD = "README.md"
# What `marlin-eval report` measured stands between these lines of the card; each report replaces it.
BEGIN, END = "<!-- marlin-eval report: begin -->", "<!-- marlin-eval report: end -->"


def write_companions(writer: CheckpointWriter, model_dir: Path, report: QuantizeReport) -> None:
    """Everything beside the weights, so that the directory is a complete Hugging Face model."""
    config = read_json(model_dir / "config.json")
    for stale in ("torch_dtype", "transformers_weights"):  # the second names the weight file of the source
        config.pop(stale, None)
    config |= {"dtype": report.dtype, "quantization_config": report.config.to_dict()}
    writer.copy_companions(model_dir, leave=("config.json", CARD, LOG_FILE))
    writer.write_text("config.json", json.dumps(config, indent=2) + "\n")
    writer.write_text(LOG_FILE, json.dumps(report.to_dict(), indent=1) + "\n")
    declared = next(iter(config.get("architectures") or []), None)
    writer.write_text(CARD, model_card(report, auto_class(config.get("model_type"), declared) or "AutoModel"))


def model_card(report: QuantizeReport, loader: str = "AutoModelForCausalLM") -> str:
    """Markdown with settings, figures and how to load the model, by the class `loader` of transformers."""
    config, calibration = report.config, report.calibration
    group = "whole row" if config.group_size == -1 else str(config.group_size)
    rows = [
        ("method", config.recipe),
        ("bits, group size", f"{config.bits}, {group}"),
        ("dtype of scales and activations", report.dtype),
    ]
    if config.method == "gptq":
        rows += [
            ("clipping searched", "yes" if config.clip else "no"),
            ("damping", f"{config.damp_percent:g} of the mean diagonal"),
            ("true-sequential", "yes" if config.true_sequential else "no"),
            ("signed scales", "yes" if config.signed_scales else "no"),
            ("act-order", config.act_order),
            ("beam width of the K-best search", str(config.beam_width)),
            ("samples of equal weight", "yes" if config.equal_samples else "no"),
            ("sweeps of refinement", str(config.refine_sweeps)),
            ("rounding under both sides", "yes" if config.two_sided else "no"),
            ("steps of tuning, block by block", str(config.tune_block_steps)),
            ("steps of end-to-end tuning", str(config.tune_steps)),
        ]
        rows += [(f"calibration: {key}", str(value)) for key, value in calibration.items()]
    if config.skip:
        rows.append(("left in full precision", ", ".join(f"`{pattern}`" for pattern in config.skip)))
    for rule in config.overrides:
        meaning = "left in full precision" if rule.bits == 16 else f"group size {rule.group_size or config.group_size}"
        rows.append((f"`{rule.match}`", meaning))
    rows += [
        ("size of the weights", f"{report.bytes_before / 1e6:.1f} MB → {report.bytes_after / 1e6:.1f} MB"),
        ("linears quantized", str(len(report.records))),
        ("share of the blocks' weights", f"{100 * report.quantized_share:.1f} %"),
        ("mean relative error", f"{report.mean_relative_error:.5f}"),
    ]
    if report.worst is not None:
        rows.append(("worst relative error", f"{report.worst.relative_error:.5f} (`{report.worst.name}`)"))
    if report.tuning is not None:
        tuning = report.tuning
        figures = f"{tuning['kl_before']:.5f}, {tuning['kl_after']:.5f}"
        kept = "" if tuning["kept"] else "; it did not help, so that the model is the one before it"
        rows.append(("KL before and after the tuning, nats", f"{figures}{kept}"))
    rows += [("not quantized", ", ".join(report.left).replace("|", "\\|"))] if report.left else []
    rows.append(("time", f"{report.seconds:.1f} s on {report.device}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    measure = "squared output error over squared output on the calibration text"
    if config.tune_steps or config.tune_block_steps:
        measure += ", before all tuning"
    if config.method == "rtn":
        measure = "squared error of the weights over their squares"
    return f"""---
library_name: transformers
base_model: {report.base_model}
tags: [marlin, gptq, 4-bit, marlin-gptq]
---

# {report.base_model}, 4 bits in the Marlin format

Made by marlin-gptq. The licence is that of the base model.

| setting or figure | value |
|---|---|
{table}

Relative error: {measure}, per linear; the figures of each are in `{LOG_FILE}`.

## Evaluation

{BEGIN}
Not measured yet: `marlin-eval report PATH_OF_THIS_DIRECTORY --baseline BASE_MODEL`
{END}

## Load it

```python
import marlin_gptq  # first: without it transformers initialises the quantized layers at random
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("PATH_OF_THIS_DIRECTORY", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_DIRECTORY")
```

Perplexity: `marlin-eval perplexity PATH_OF_THIS_DIRECTORY --dataset wikitext2`
"""


def fill_card(directory: Path, figures: str) -> Path:
    """Put markdown between the markers of the model card; a card without them gets a section `Evaluation`.

    Returns the card. It appears whole or not at all.
    """
    card = directory / CARD
    text = card.read_text("utf-8") if card.is_file() else f"# {directory.resolve().name}\n"
    filled = f"{BEGIN}\n{figures.strip()}\n{END}"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    text = f"{before}{filled}{after}" if begin and end else f"{text.rstrip()}\n\n## Evaluation\n\n{filled}\n"
    write_whole(card, text.encode())
    return card

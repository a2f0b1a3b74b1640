"""What the task commands share: their options, and lm-eval kept quiet."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from marlin_gptq.cli.options import Choice
from marlin_gptq.model_directory import hub_silence

# Said better by our own notes, or meant for people who write tasks.
SAID_OTHERWISE = (
    "Overwriting default num_fewshot",
    "Custom kwargs can be passed",
    "No `generation_kwargs`",
    "Truncating",
    "Left truncation",
    "already-initialized model",
    "num_fewshot has been set to 0",
    "aggregation is not",
    "higher_is_better is not",
)


class BatchSize(click.ParamType):
    """`auto` or a number."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if text != "auto" and not (text.isdecimal() and int(text) > 0):
            self.fail(f"{text!r} is neither auto nor a number from 1.", param, ctx)
        return text


def task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--baseline, --num-fewshot, --batch-size, …: alike for harness and mmlu."""
    found = (
        click.option("--baseline", metavar="MODEL", help="A second model on the same questions: differences, tests."),
        click.option(
            "--pretrained", metavar="BASE",
            help="In place of MODEL: the base model of an original Marlin state dict (--marlin-checkpoint).",
        ),
        click.option(
            "--marlin-checkpoint", type=click.Path(path_type=Path), metavar="FILE",
            help="A torch state dict of the original Marlin repository, for instance checkpoint.marlin.g128.",
        ),
        click.option(
            "--num-fewshot", type=click.IntRange(0),
            help="Examples in the prompt.  [default: the task's own number; 0 for MMLU]",
        ),
        click.option(
            "--batch-size", type=BatchSize(), default="auto", show_default=True,
            help="Sequences per forward; auto tries how many a GPU holds, and is 8 elsewhere.",
        ),
        click.option("--limit", type=click.IntRange(1), help="Only the first questions: for tests, no true figure."),
        click.option("--seed", type=int, default=1234, show_default=True, help="Seed of few-shot choice and sampling."),
        click.option(
            "--refuse-truncation", is_flag=True,
            help="Stop at a prompt longer than the context. Without it its beginning is cut off, which is said.",
        ),
        click.option(
            "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
            help="JSON file with the results, written after every task.",
        ),
        click.option(
            "--dtype", type=Choice(["auto", "float16", "bfloat16", "float32"]), default="auto",
            show_default=True, help="Computing dtype; auto is the model's on a GPU and float32 elsewhere.",
        ),
    )  # fmt: skip
    for option in reversed(found):
        command = option(command)
    return command


def use_offline(offline: bool, say: Callable[[str], None], hub: bool = True) -> None:
    """Keep lm-eval and its datasets off the network; before either is imported or after.

    hub  the tasks may want the Hugging Face hub: where it does not answer, `datasets` would ask for minutes, and then
         read its cache, which is all there is anyhow.
    """
    if not offline:
        silence = hub_silence() if hub else ""
        if not silence:
            return
        say(f"note: the Hugging Face hub does not answer ({silence}): tasks are read from its cache, as with --offline")
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_OFFLINE = True


def quiet_harness(say: Callable[[str], None]) -> None:
    """Each warning of lm-eval is said once, without those that our notes say better."""
    told: set[str] = set()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if str(record.msg) in told or any(known in text for known in SAID_OTHERWISE):
                return
            told.add(str(record.msg))
            say(f"{record.levelname.lower()}: lm-eval: {' '.join(text.split())}")

    library = logging.getLogger("lm_eval")
    library.handlers, library.propagate = [Handler(logging.WARNING)], False
    library.setLevel(logging.WARNING)

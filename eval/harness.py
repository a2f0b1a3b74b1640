"""Tasks of lm-eval on our models, one after the other, so that what is finished stays finished."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from marlin_gptq.calibration import load_tokenizer
from marlin_gptq.errors import InputError
from marlin_gptq.eval.harness_model import marlin_model_class
from marlin_gptq.modeling.blocks import BlockStream

YAML = (".yaml", ".yml")
BOOTSTRAPS = 1000  # for the standard error of metrics that are no means; means need none


@dataclass
class Suite:
    """Tasks of lm-eval by name, and the groups among them."""

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaskResult:
    """One finished task. metrics: "acc,none" → {value, standard_error, higher_is_better}.

    scores holds, for metrics that are means over questions, the score of each question in order.
    """

    task: str
    num_fewshot: int
    questions: int
    metrics: dict[str, dict[str, Any]]
    truncated_prompts: int
    seconds: float
    scores: dict[str, list[float]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without the scores of single questions."""
        names = ("task", "num_fewshot", "questions", "metrics", "truncated_prompts", "seconds")
        return {name: getattr(self, name) for name in names}


def load_suite(names: Sequence[str], include_path: Path | None = None) -> Suite:
    """Tasks, groups, tags, patterns or YAML files by name. InputError for unknown names and unreadable datasets."""
    manager = None
    if include_path is not None:
        if not include_path.is_dir():
            raise InputError(f"{include_path}: no such directory; --include-path wants one with task YAML files")
        own = _manager(include_path, include_defaults=False)
        if all(name.endswith(YAML) or name in own.all_subtasks for name in names):
            manager = own  # reading the index of all tasks that come with lm-eval takes seconds
    manager = manager or _manager(include_path, include_defaults=not all(name.endswith(YAML) for name in names))
    suite = Suite()
    for name in names:
        if name.endswith(YAML):
            if not Path(name).is_file():
                raise InputError(f"task: no such file: {name}")
            matches = [str(Path(name).absolute())]
        else:
            matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            hint = f", did you mean {', '.join(near)}?" if near else ""
            raise InputError(f"task: got {name!r}{hint} (marlin-eval lm-eval -- ls tasks lists all)")
        for match in matches:
            loaded = _load(manager, match)
            suite.tasks |= loaded["tasks"]
            suite.groups |= loaded["groups"]
    for task_name, task in suite.tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(
                f"task {task_name}: runs code that the model writes; if you mean it: marlin-eval lm-eval -- "
                f"--model marlin --tasks {task_name} --confirm_run_unsafe_code"
            )
    return suite


@functools.cache
def _manager(include_path: Path | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else str(include_path)
    return TaskManager(include_path=path, include_defaults=include_defaults)


def _load(manager: Any, name: str) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, *HfHubHTTPError.__bases__)
    try:
        return manager.load([name])
    except ImportError as error:
        raise InputError(f"task {name}: needs a Python package that is not installed ({error})") from error
    except failures as error:
        reasons = [str(one).strip().split("\n")[0] for one in (error, error.__cause__) if one is not None]
        reason = "; ".join(filter(None, reasons)) or type(error).__name__
        raise InputError(
            f"task {name}: its dataset could not be read ({reason}); it comes from the Hugging Face hub: run the task "
            "once where there is a network, so that its cache has it; for MMLU, marlin-eval mmlu "
            "--data-dir reads the original CSV files"
        ) from error


def open_model(
    model_dir: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    batch_size: str = "auto",
    marlin_checkpoint: Path | None = None,
    truncate: bool = True,
) -> Any:
    """lm-eval's model `marlin` of a directory; InputError or CheckpointError, before anything is loaded, if unfit."""
    BlockStream(model_dir, device=torch.device("cpu"))  # checks config and every tensor's presence and shape
    return marlin_model_class()(
        pretrained=str(model_dir),
        tokenizer=load_tokenizer(model_dir),
        marlin_checkpoint=None if marlin_checkpoint is None else str(marlin_checkpoint),
        device=str(device),
        dtype="auto" if dtype is None else str(dtype).removeprefix("torch."),
        batch_size=batch_size,
        truncate=truncate,
    )


def run_suite(
    lm: Any,
    suite: Suite,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
    progress: Callable[[int, int], None] | None = None,
    finished: Callable[[TaskResult], None] | None = None,
) -> list[TaskResult]:
    """Every task of the suite, in order; `finished` is called with each result as soon as it is there.

    num_fewshot  examples in the prompt; by default the task's own number (a task that fixes 0 keeps it).
    limit        only the first questions of each task, for tests.
    progress     called with (done, total) questions.
    """
    sizes = {name: min(limit or len(task.eval_docs), len(task.eval_docs)) for name, task in suite.tasks.items()}
    results, before, total = [], 0, sum(sizes.values())
    for name, task in suite.tasks.items():
        lm.progress = lm.cache_hook = _Questions(progress, before, sizes[name], total)
        result = _run_task(lm, name, task, num_fewshot, limit, seed)
        before += sizes[name]
        if progress is not None:
            progress(before, total)
        results.append(result)
        if finished is not None:
            finished(result)
    return results


class _Questions:
    """Answered requests of one task as (done, total) questions of the suite; also lm-eval's cache hook."""

    def __init__(self, progress: Callable[[int, int], None] | None, before: int, questions: int, total: int) -> None:
        self.progress, self.before, self.questions, self.total = progress, before, questions, total
        self.requests, self.answered = 0, 0

    def start(self, requests: int) -> None:
        self.requests, self.answered = requests, 0

    def add_partial(self, attribute: str, request: Any, answer: Any) -> None:
        self.answered += 1
        if self.progress is not None and self.requests:
            share = min(self.answered, self.requests) / self.requests
            self.progress(self.before + int(share * self.questions), self.total)


def _run_task(lm: Any, name: str, task: Any, num_fewshot: int | None, limit: int | None, seed: int) -> TaskResult:
    import numpy as np
    from lm_eval.evaluator import evaluate

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config(key="num_fewshot", value=own or 0 if num_fewshot is None else num_fewshot)
    task.set_fewshot_seed(seed=seed)
    lm.truncated_prompts = 0
    started = time.perf_counter()
    with _quietly():
        content = evaluate(
            lm=lm,
            task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
        )
    assert content is not None  # None on other ranks than 0, of which there are none
    samples = content["samples"][name]
    higher = content["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in content["results"][name].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = content["results"][name].get(f"{metric}_stderr,{chosen}")
        metrics[key] = {
            "value": float(value),
            "standard_error": float(error) if isinstance(error, int | float) else None,
            "higher_is_better": higher.get(metric),
        }
    return TaskResult(
        task=name,
        num_fewshot=task.get_config("num_fewshot"),
        questions=len({sample["doc_id"] for sample in samples}),
        metrics=metrics,
        truncated_prompts=lm.truncated_prompts,
        seconds=time.perf_counter() - started,
        scores=_scores(task, metrics, samples),
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what has no switch in lm-eval: its bar over the prompts it builds, and prints to stdout (--json)."""
    import lm_eval.api.task as module

    before = module.tqdm
    module.tqdm = functools.partial(before, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        module.tqdm = before


def _scores(task: Any, metrics: Iterable[str], samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The score of each question for the metrics that are its mean, in the order of the questions."""
    from lm_eval.api.metrics import mean

    aggregations = task.aggregation()
    found = {}
    for key in metrics:
        metric, _, chosen = key.partition(",")
        rows = sorted((s for s in samples if s["filter"] == chosen and metric in s), key=lambda s: s["doc_id"])
        values = [row[metric] for row in rows]
        numbers = all(isinstance(value, int | float) or hasattr(value, "item") for value in values)
        if values and numbers and aggregations.get(metric) is mean:
            found[key] = [float(value) for value in values]
    return found

"""The record of a run of tasks: plain JSON that is complete after every task, whatever happens next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marlin_gptq.eval.harness import Suite, TaskResult
from marlin_gptq.eval.result_files import write_json
from marlin_gptq.eval.task_summary import compare, group_results


@dataclass
class ModelTasks:
    """What one model has answered so far."""

    name: str
    kernel: str = ""
    results: list[TaskResult] = field(default_factory=list)


@dataclass
class TaskRecord:
    """Of one model and perhaps its baseline; `file`, if given, is written anew after every task.

    Where something else has come to be under that name, it is another one from then on.
    """

    suite: Suite
    settings: dict[str, Any]
    versions: dict[str, str]
    file: Path | None = None
    models: list[ModelTasks] = field(default_factory=list)
    complete: bool = False

    def begin(self, name: str, kernel: str) -> None:
        """The results that follow are of this model; the second is the baseline."""
        self.models.append(ModelTasks(name, kernel))

    def add(self, result: TaskResult) -> None:
        """A finished task of the model begun last."""
        self.models[-1].results.append(result)
        self.save()

    def finish(self) -> None:
        """Nothing follows."""
        self.complete = True
        self.save()

    @property
    def finished_tasks(self) -> int:
        return sum(len(model.results) for model in self.models)

    def notes(self) -> list[str]:
        """What a reader of the figures must know: subsets, limits, prompts that were cut."""
        notes = list(self.suite.notes)
        if self.settings.get("limit"):
            notes.append(f"LIMITED to the first {self.settings['limit']} questions of each task, for tests only")
        for model in self.models:
            cut = [result for result in model.results if result.truncated_prompts]
            if cut:
                count = sum(result.truncated_prompts for result in cut)
                notes.append(
                    f"{model.name}: {count} prompts of {len(cut)} task(s) exceed the context: their beginning was cut"
                )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `comparison` has one row a task or group and metric that both models have."""
        content: dict[str, Any] = {
            "complete": self.complete,
            "settings": self.settings,
            "versions": self.versions,
            "notes": self.notes(),
            "model": None,
            "baseline": None,
            "comparison": [],
        }
        everything = []
        for place, model in zip(("model", "baseline"), self.models, strict=False):
            groups = group_results(self.suite, model.results)
            everything.append([*groups, *model.results])
            content[place] = {
                "name": model.name,
                "computed_by": model.kernel,
                "groups": [result.to_dict() for result in groups],
                "tasks": [result.to_dict() for result in model.results],
            }
        if len(everything) == 2:
            content["comparison"] = compare(*everything)
        return content

    def save(self) -> None:
        if self.file is not None:
            self.file = write_json(self.file, self.to_dict())


def versions(packages: Sequence[str] = ("torch", "transformers", "lm_eval", "datasets")) -> dict[str, str]:
    """Of Python, this package and what computes the figures; packages that are not installed are left out."""
    import importlib.metadata
    import platform

    from marlin_gptq import __version__

    found = {"python": platform.python_version(), "marlin-gptq": __version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

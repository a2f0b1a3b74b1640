"""MMLU from the original CSV files (Hendrycks et al., *Measuring Massive Multitask Language Understanding*, 2021).

The tasks are lm-eval's own: prompt, description, few-shot order, choices and groups come from the YAML files of the
installed lm-eval. Only the rows are read from `DIR/test/SUBJECT_test.csv` and `DIR/dev/SUBJECT_dev.csv`, instead of
from the hub. So the figures are those of the harness's `mmlu` on the same questions.
"""

from __future__ import annotations

import csv
import difflib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marlin_gptq.errors import InputError
from marlin_gptq.eval.harness import Suite

LETTERS = "ABCD"
SUBJECTS = 57


def mmlu_suite(data_dir: Path, num_fewshot: int = 0, subjects: Sequence[str] = ()) -> Suite:
    """lm-eval's MMLU tasks and groups over the CSV files; by default every subject that has a test file.

    Raises InputError for folders and files that are not MMLU's, and for too few examples.
    """
    import lm_eval.tasks

    found = sorted(path.name.removesuffix("_test.csv") for path in (data_dir / "test").glob("*_test.csv"))
    if not found:
        raise InputError(f"{data_dir}: no test/SUBJECT_test.csv in it; the original MMLU's `data` folder is needed")
    chosen = sorted(subjects) or found
    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    known = [name.removeprefix("mmlu_") for name in manager.all_subtasks]
    for subject in chosen:
        if subject not in known or subject not in found:
            near = difflib.get_close_matches(subject, [name for name in known if name in found], n=3)
            hint = f", did you mean {', '.join(near)}?" if near else ""
            why = "no subject of MMLU" if subject not in known else f"{data_dir / 'test'} has no file of it"
            raise InputError(f"subject: got {subject!r}, {why}{hint}")

    members = [
        {
            "task": f"mmlu_{subject}",
            "custom_dataset": functools.partial(read_subject, data_dir, subject, num_fewshot),
            "dataset_path": None,
            "dataset_name": None,
        }
        for subject in chosen
    ]
    tasks = manager.load([{"group": "outer", "task": members}])["tasks"]
    suite = Suite(tasks, _groups(manager, tasks))
    if len(chosen) < SUBJECTS:
        suite.notes.append(f"MMLU: {len(chosen)} of {SUBJECTS} subjects, so the averages are not those of the whole")
    return suite


def read_subject(data_dir: Path, subject: str, num_fewshot: int = 0, **_: Any) -> Any:
    """The rows of one subject as lm-eval's dataset has them: {question, subject, choices [4], answer 0..3}."""
    test = read_rows(data_dir / "test" / f"{subject}_test.csv", subject)
    file = data_dir / "dev" / f"{subject}_dev.csv"
    dev = read_rows(file, subject) if num_fewshot or file.is_file() else []
    if len(dev) < num_fewshot:
        raise InputError(f"{file}: has {len(dev)} examples, num_fewshot asks for {num_fewshot}")
    return _dataset(test, dev)


def read_rows(file: Path, subject: str) -> list[dict[str, Any]]:
    """The rows `question,A,B,C,D,answer` of a file without header; InputError naming file and row."""
    rows = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(csv.reader(lines, strict=True), 1):
                if not row:
                    continue
                if len(row) != 6:
                    raise InputError(f"{file}, row {number}: got {len(row)} fields, expected question,A,B,C,D,answer")
                answer = row[5].strip()
                if len(answer) != 1 or answer not in LETTERS:
                    raise InputError(f"{file}, row {number}: got the answer {row[5]!r}, expected A, B, C or D")
                rows.append(
                    {"question": row[0], "subject": subject, "choices": row[1:5], "answer": LETTERS.index(answer)}
                )
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file; few-shot examples and questions are read from it") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: not a CSV file in UTF-8 ({error})") from error
    if not rows:
        raise InputError(f"{file}: is empty; rows of question,A,B,C,D,answer are needed")
    return rows


def _groups(manager: Any, tasks: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's groups (mmlu, mmlu_stem, …) over the tasks at hand, by its YAML files; one without any is left out."""
    import yaml
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    groups: dict[str, Any] = {}

    def build(name: str) -> Any:
        content = yaml.safe_load(manager.task_index[name].yaml_path.read_text("utf-8"))
        group = groups[name] = Group.from_config(GroupConfig(**content))
        for child in content["task"]:
            tagged = manager.task_index[child].tags
            members = [tasks[task] for task in sorted(tagged) if task in tasks] if tagged else [build(child)]
            for member in members:
                group.add(member)
        return group

    build("mmlu")
    return {name: group for name, group in groups.items() if group.get_all_tasks()}


def _dataset(test: list[dict[str, Any]], dev: list[dict[str, Any]], **_: Any) -> Any:
    import datasets

    features = datasets.Features(
        question=datasets.Value("string"),
        subject=datasets.Value("string"),
        choices=datasets.List(datasets.Value("string")),
        answer=datasets.ClassLabel(names=list(LETTERS)),
    )
    splits = {}
    for split, rows in (("test", test), ("dev", dev)):
        columns = {name: [row[name] for row in rows] for name in features}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(splits)

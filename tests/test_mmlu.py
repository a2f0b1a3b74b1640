"""MMLU from CSV files against lm-eval's own task, fed with the same rows."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from character_model import save_character_model

from marlin_gptq.errors import InputError
from marlin_gptq.eval.harness import open_model, run_suite
from marlin_gptq.eval.mmlu import mmlu_suite, read_rows
from marlin_gptq.eval.task_summary import compare, group_results

SUBJECTS = ("anatomy", "astronomy", "world_religions")


def write_subject(folder: Path, subject: str, questions: int, examples: int = 5) -> None:
    for split, count in (("test", questions), ("dev", examples)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for n in range(count):
                # a comma, quotes, a line break and outer blanks: what the CSV must carry and the template strips
                question = f' {subject[:3]}, "{n}"\n{split[0]}? '
                writer.writerow([question, f"a{n}", "b,", f"c {n}", "d", "ABCD"[(n * 3) % 4]])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mmlu")
    for size, subject in enumerate(SUBJECTS):
        write_subject(folder, subject, questions=4 + 3 * size)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = save_character_model(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)
    return open_model(directory, device=torch.device("cpu"))


@pytest.fixture
def harness_mmlu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A loader of lm-eval's own `mmlu` group, its hub dataset replaced by rows of CSV files read in another way."""

    def load(folder: Path, subjects: tuple[str, ...]) -> Any:
        import datasets
        import lm_eval.tasks

        def load_dataset(path: str, name: str, **_: Any) -> Any:
            assert path == "cais/mmlu"
            splits = {}
            for split in ("test", "dev"):
                with (folder / split / f"{name}_{split}.csv").open(newline="") as file:
                    rows = [
                        {"question": q, "subject": name, "choices": choices, "answer": ord(answer) - ord("A")}
                        for q, *choices, answer in csv.reader(file)
                    ]
                splits[split] = datasets.Dataset.from_list(rows)
            return datasets.DatasetDict(splits)

        monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load_dataset)
        yamls = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
        manager = lm_eval.tasks.TaskManager(include_path=str(yamls), include_defaults=False)
        return manager.load([f"mmlu_{subject}" for subject in subjects] if len(subjects) < 57 else ["mmlu"])

    return load


def evaluated(lm: Any, loaded: Any, num_fewshot: int, limit: int | None = None) -> Any:
    """lm-eval's own results, samples and all."""
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=1234)
    return evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=1000)


def requests_of(task: Any) -> Iterator[tuple[Any, ...]]:
    yield from (instance.args for instance in task.instances)


@pytest.mark.parametrize("num_fewshot", [0, 3])
def test_prompts_and_log_likelihoods_are_the_harnesss(
    model: Any, data_dir: Path, harness_mmlu: Any, num_fewshot: int
) -> None:
    suite = mmlu_suite(data_dir, num_fewshot)
    assert list(suite.tasks) == [f"mmlu_{subject}" for subject in SUBJECTS]
    results = run_suite(model, suite, num_fewshot=num_fewshot)
    own = harness_mmlu(data_dir, SUBJECTS)
    expected = evaluated(model, own, num_fewshot)
    for result, (name, task) in zip(results, own["tasks"].items(), strict=True):
        ours, theirs = list(requests_of(suite.tasks[name])), list(requests_of(task))
        assert ours == theirs and len(ours) == 4 * result.questions
        # equal but for the last digits: lm-eval puts questions of several subjects into one batch
        one, other = ([instance.resps[0] for instance in t.instances] for t in (suite.tasks[name], task))
        assert [log for log, _ in one] == pytest.approx([log for log, _ in other], rel=1e-5)
        assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
        assert result.metrics["acc,none"]["value"] == expected["results"][name]["acc,none"]
        samples = expected["samples"][name]
        assert result.scores["acc,none"] == [sample["acc"] for sample in samples]
    prompt, answer = next(requests_of(suite.tasks["mmlu_anatomy"]))
    start = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    question = 'ana, "0"\nt?\nA. a0\nB. b,\nC. c 0\nD. d\nAnswer:'
    assert answer == " A"
    if num_fewshot:
        first = 'ana, "0"\nd?\nA. a0\nB. b,\nC. c 0\nD. d\nAnswer: A\n\n'
        assert prompt.startswith(start + first) and prompt.endswith("\n\n" + question)
        assert prompt.count("Answer:") == 4
    else:
        assert prompt == start + question


@pytest.mark.slow
@pytest.mark.parametrize("num_fewshot", [0, 5])
def test_the_whole_of_mmlu_as_the_harness_has_it(
    tiny_llama: Path, shared_data: Path, harness_mmlu: Any, num_fewshot: int
) -> None:
    """All 57 subjects of the original files, two questions each: every figure and every group."""
    folder = shared_data / "mmlu"
    lm = open_model(tiny_llama, device=torch.device("cpu"))
    suite = mmlu_suite(folder, num_fewshot)
    assert len(suite.tasks) == 57 and not suite.notes
    assert sum(len(task.eval_docs) for task in suite.tasks.values()) == 14042
    results = run_suite(lm, suite, num_fewshot=num_fewshot, limit=2)
    expected = evaluated(lm, harness_mmlu(folder, tuple(suite.tasks)), num_fewshot, limit=2)["results"]
    for result in [*results, *group_results(suite, results)]:
        entry = result.metrics["acc,none"]
        assert entry["value"] == expected[result.task]["acc,none"], result.task
        assert entry["standard_error"] == pytest.approx(expected[result.task]["acc_stderr,none"]), result.task
    assert {group for group in expected if group.count("_") <= 2} >= set(suite.groups)
    assert set(suite.groups) == {"mmlu", "mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other"}


def test_groups_weigh_by_size_and_test_all_questions(model: Any, data_dir: Path) -> None:
    suite = mmlu_suite(data_dir)
    results = run_suite(model, suite)
    groups = {group.task: group for group in group_results(suite, results)}
    assert list(groups) == ["mmlu", "mmlu_stem", "mmlu_humanities"]
    right = sum(sum(result.scores["acc,none"]) for result in results)
    assert groups["mmlu"].questions == 4 + 7 + 10
    assert groups["mmlu"].metrics["acc,none"]["value"] == pytest.approx(right / 21)
    assert len(groups["mmlu"].scores["acc,none"]) == 21
    assert groups["mmlu_stem"].questions == 11
    assert suite.notes == ["MMLU: 3 of 57 subjects, so the averages are not those of the whole"]
    partial = group_results(suite, results[:2])
    assert [group.task for group in partial] == ["mmlu_stem"]  # no average of tasks that are not there
    rows = compare([*groups.values(), *results], [*groups.values(), *results])
    assert len(rows) == 6 and all(row["difference"] == 0 and row["p_value"] == 1 for row in rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q,a,b,c,A\n", "row 1: got 5 fields, expected question,A,B,C,D,answer"),
        ("q,a,b,c,d,A\nq,a,b,c,d,E\n", "row 2: got the answer 'E', expected A, B, C or D"),
        ("question,A,B,C,D,answer\n", "row 1: got the answer 'answer'"),
        ("", "is empty"),
        ('q,"a,b,c,d,A\n', "not a CSV file in UTF-8"),
        ("q\0,a,b,c,d,\xff\n", "expected A, B, C or D"),
    ],
)
def test_files_that_are_not_mmlus(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "anatomy_test.csv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_rows(file, "anatomy")


def test_a_byte_order_mark_is_no_part_of_the_first_question(tmp_path: Path) -> None:
    file = tmp_path / "anatomy_test.csv"
    file.write_text("q,a,b,c,d,A\r\n", encoding="utf-8-sig")
    assert read_rows(file, "anatomy")[0]["question"] == "q"


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "anatomy_test.csv"
    file.write_bytes(b"caf\xe9,a,b,c,d,A\n")
    with pytest.raises(InputError, match="not a CSV file in UTF-8"):
        read_rows(file, "anatomy")


def test_folders_that_are_not_mmlus(tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(InputError, match=r"no test/SUBJECT_test.csv in it"):
        mmlu_suite(tmp_path)
    with pytest.raises(InputError, match="subject: got 'anatomie', no subject of MMLU, did you mean anatomy"):
        mmlu_suite(data_dir, subjects=["anatomie"])
    with pytest.raises(InputError, match=r"got 'marketing', .* has no file of it"):
        mmlu_suite(data_dir, subjects=["marketing"])
    with pytest.raises(InputError, match=r"anatomy_dev.csv: has 5 examples, num_fewshot asks for 6"):
        mmlu_suite(data_dir, num_fewshot=6)
    write_subject(tmp_path, "anatomy", 2)
    (tmp_path / "dev" / "anatomy_dev.csv").unlink()
    assert list(mmlu_suite(tmp_path).tasks) == ["mmlu_anatomy"]  # zero-shot needs no examples
    with pytest.raises(InputError, match=r"anatomy_dev.csv: no such file"):
        mmlu_suite(tmp_path, num_fewshot=1)

"""marlin-eval harness, mmlu and lm-eval on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from character_model import save_character_model
from click.testing import CliRunner, Result
from test_harness import CHOICE, ROWS, original_state_dict
from test_mmlu import write_subject

from marlin_gptq.cli import quantize
from marlin_gptq.cli.evaluate import main
from marlin_gptq.eval import harness


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.py").write_text(ROWS)
    for name, rows in (("evenness", "short"), ("long_winded", "long")):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, rows=rows))
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_character_model(tmp_path_factory.mktemp("character-model"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def quantized_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "out"
    result = CliRunner().invoke(quantize.main, [str(model_dir), "-o", str(output), "--method", "rtn"])
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mmlu")
    for subject in ("anatomy", "astronomy"):
        write_subject(folder, subject, 5)
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    return result.stderr.strip().split("\n")[-1].removeprefix("error: ")


def test_harness_beside_a_baseline(model_dir: Path, quantized_dir: Path, tasks_dir: Path, tmp_path: Path) -> None:
    arguments = ("harness", quantized_dir, "--baseline", model_dir, "--include-path", tasks_dir, "--device", "cpu")
    file = tmp_path / "tasks.json"
    result = run(*arguments, "--tasks", "evenness,long_winded", "-o", file)
    assert result.exit_code == 0, result.output
    for text in ("evenness", "long_winded", "difference", "McNemar, exact", "reference path", "full precision"):
        assert text in result.stdout
    assert "100%  elapsed" in result.stderr and "evenness: acc " in result.stderr
    content = json.loads(file.read_text())
    assert content["complete"] is True and content["notes"] == []
    assert [task["task"] for task in content["baseline"]["tasks"]] == ["evenness", "long_winded"]
    assert content["settings"]["seed"] == 1234 and content["versions"]["lm_eval"]
    (row, _) = content["comparison"]
    assert row["questions"] == 7 and row["test"] == "McNemar, exact" and 0 <= row["p_value"] <= 1
    assert row["gained"] - row["lost"] == pytest.approx(7 * row["difference"])

    shown = json.loads(run(*arguments, "--tasks", "evenness", "--limit", 3, "--json").stdout)
    assert shown["model"]["tasks"][0]["questions"] == 3
    assert shown["notes"] == ["LIMITED to the first 3 questions of each task, for tests only"]


def test_mmlu_from_files(model_dir: Path, data_dir: Path) -> None:
    arguments = ("mmlu", model_dir, "--data-dir", data_dir, "--device", "cpu")
    content = json.loads(run(*arguments, "--json").stdout)
    assert [group["task"] for group in content["model"]["groups"]] == ["mmlu", "mmlu_stem"]
    assert content["model"]["groups"][0]["num_fewshot"] == 0
    result = run(*arguments, "--num-fewshot", 5, "--subjects", "anatomy")
    assert result.exit_code == 0 and "mmlu_anatomy" in result.stdout and "astronomy" not in result.stdout
    assert "note: MMLU: 1 of 57 subjects" in result.stdout


def test_prompts_that_were_cut_are_told(model_dir: Path, tasks_dir: Path, tmp_path: Path) -> None:
    small = save_character_model(tmp_path / "small")
    arguments = ("harness", small, "--include-path", tasks_dir, "--tasks", "long_winded", "--device", "cpu")
    assert "2 prompts of 1 task(s) exceed the context: their beginning was cut" in run(*arguments).stdout
    assert "the model's context leaves room for 256" in refused(*arguments, "--refuse-truncation")


def test_the_seeds_call_shape(model_dir: Path, quantized_dir: Path, tasks_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    file = tmp_path / "checkpoint.marlin.g128"
    torch.save(original_state_dict(AutoModelForCausalLM.from_pretrained(quantized_dir)), file)
    common = ("--include-path", tasks_dir, "--tasks", "evenness", "--device", "cpu", "--json")
    ours = json.loads(run("harness", quantized_dir, *common).stdout)
    seeds = json.loads(run("harness", "--pretrained", model_dir, "--marlin-checkpoint", file, *common).stdout)
    assert seeds["model"]["tasks"][0]["metrics"] == ours["model"]["tasks"][0]["metrics"]
    assert seeds["model"]["name"] == str(file)
    assert "belong together" in refused("harness", "--pretrained", model_dir, *common)
    assert "MODEL: give either" in refused("harness", *common)
    assert "no such file" in refused("mmlu", "--pretrained", model_dir, "--marlin-checkpoint", "nowhere")


def test_ctrl_c_keeps_finished_tasks(
    model_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = harness._run_task

    def interrupted(lm: Any, name: str, *rest: Any) -> Any:
        if name == "long_winded":
            raise KeyboardInterrupt
        return before(lm, name, *rest)

    monkeypatch.setattr(harness, "_run_task", interrupted)
    file = tmp_path / "tasks.json"
    local = ("harness", model_dir, "--include-path", tasks_dir, "--device", "cpu")
    result = run(*local, "--tasks", "evenness,long_winded", "-o", file)
    assert result.exit_code == 2
    assert result.stderr.strip().endswith(f"error: interrupted: 1 tasks were finished, kept in {file}")
    assert "evenness" in result.stdout and "INCOMPLETE" in result.stdout
    content = json.loads(file.read_text())
    assert content["complete"] is False
    assert [task["task"] for task in content["model"]["tasks"]] == ["evenness"]


def test_bad_inputs(model_dir: Path, tasks_dir: Path, tmp_path: Path) -> None:
    local = ("harness", model_dir, "--include-path", tasks_dir, "--tasks")
    assert "task: got 'evennes', did you mean evenness" in refused(*local, "evennes")
    assert "--tasks: got no name" in refused(*local, ",")
    assert "'0' is neither auto nor a number from 1" in refused(*local, "evenness", "--batch-size", 0)
    assert "its directory does not exist" in refused(*local, "evenness", "-o", tmp_path / "no" / "file.json")
    config = model_dir / "config.json"
    assert "exists and is no result of marlin-eval, so it stays" in refused(*local, "evenness", "-o", config)
    assert "no such directory" in refused("mmlu", tmp_path / "nowhere")
    assert "no test/SUBJECT_test.csv in it" in refused("mmlu", model_dir, "--data-dir", tmp_path)


@pytest.mark.slow
def test_a_hub_task_while_offline(model_dir: Path) -> None:
    """In a process of its own: offline mode is switched on before anything is imported."""
    command = [sys.executable, "-m", "marlin_gptq.cli.evaluate", "harness", str(model_dir), "--tasks", "piqa"]
    done = subprocess.run([*command, "--offline"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().split("\n")[-1]
    assert last.startswith("error: task piqa: its dataset could not be read (") and "Traceback" not in done.stderr


def test_lm_eval_itself_knows_our_model(model_dir: Path, tasks_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "lm-eval"
    result = run(
        "lm-eval", "--", "--model", "marlin", "--model_args", f"pretrained={model_dir}", "--tasks",
        str(tasks_dir / "evenness.yaml"), "--limit", 4, "--device", "cpu", "--output_path", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (file,) = output.rglob("results_*.json")
    content = json.loads(file.read_text())
    assert content["results"]["evenness"]["acc,none"] >= 0
    assert content["config"]["model"] == "marlin"


def test_lm_evals_mistakes_are_sentences(model_dir: Path, tasks_dir: Path) -> None:
    arguments = ("--model", "marlin", "--model_args", f"pretrained={model_dir}", "--tasks", str(tasks_dir / "no.yaml"))
    assert refused("lm-eval", "--", "run", *arguments).startswith("lm-eval: ")
    assert "with every option it has" in run("lm-eval", "--help").stdout


@pytest.mark.slow
def test_real_questions(tiny_llama: Path, shared_data: Path) -> None:
    result = run("mmlu", tiny_llama, "--data-dir", shared_data / "mmlu", "--limit", 3, "--device", "cpu", "--json")
    content = json.loads(result.stdout)
    assert len(content["model"]["tasks"]) == 57 and content["model"]["groups"][0]["questions"] == 171

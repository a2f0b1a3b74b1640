"""--work-dir and --resume as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from character_model import save_character_model, save_texts
from click.testing import CliRunner, Result

from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.cli.quantize import main
from marlin_gptq.work_directory import WorkDirectory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_character_model(tmp_path_factory.mktemp("character-model"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return save_texts(tmp_path / "texts.jsonl")


def run(*arguments: Any) -> Result:
    recipe = () if "--resume" in arguments or "--preset" in arguments else ("--preset", "marlin")
    return CliRunner().invoke(main, [str(argument) for argument in (*arguments, *recipe)])


def refused(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr.strip().split("\n")[-1].removeprefix("error: ")


@pytest.fixture
def interrupted(model_dir: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work directory of a run that Ctrl-C ended after its first block."""
    settings = tmp_path / "settings.yaml"
    settings.write_text("'k_proj': {group_size: 64}\n")
    put = WorkDirectory.put

    def interrupt(self: WorkDirectory, *arguments: Any) -> None:
        put(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkDirectory, "put", interrupt)
    work = tmp_path / "work"
    sentence = refused(
        model_dir, "-o", tmp_path / "out", "--dataset", texts, "--n-samples", 3, "--config", settings, "--no-clip",
        "--work-dir", work,
    )  # fmt: skip
    assert sentence == (
        f"interrupted: nothing was written under {tmp_path / 'out'}; go on with marlin-quantize --resume {work}"
    )
    monkeypatch.setattr(WorkDirectory, "put", put)
    texts.unlink()
    settings.unlink()  # neither is needed any more
    return work


def test_going_on(interrupted: Path, model_dir: Path, tmp_path: Path) -> None:
    result = run("--resume", interrupted)
    assert result.exit_code == 0, result.output
    assert "going on with the run in" in result.stderr and "no longer needed" in result.stderr
    lines = [line for line in result.stderr.split("\n") if line.startswith("[")]
    assert len(lines) == 14 and "block 1/2" in lines[0]
    log = json.loads((tmp_path / "out" / "quantize_log.json").read_text())
    assert log["config"]["overrides"] == [{"match": "k_proj", "bits": 4, "group_size": 64}]
    assert log["config"]["clip"] is False and log["calibration"]["n_samples"] == 3

    texts, settings = tmp_path / "texts.jsonl", tmp_path / "settings.yaml"
    save_texts(texts)
    settings.write_text("'k_proj': {group_size: 64}\n")
    arguments = ("--dataset", texts, "--n-samples", 3, "--config", settings, "--no-clip")
    assert run(model_dir, "-o", tmp_path / "whole", *arguments).exit_code == 0
    one, other = TensorStore(tmp_path / "out"), TensorStore(tmp_path / "whole")
    assert one.names == other.names
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]

    again = run("--resume", interrupted, "--json")
    assert again.exit_code == 0 and "finished already" in again.stderr
    assert json.loads(again.stdout)["records"] == log["records"]


def test_changed_arguments_are_refused_by_name(interrupted: Path, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("'k_proj': {group_size: 32}\n")
    end = "; leave it out to go on, or start anew with another --work-dir"
    for arguments, sentence in (
        (("--damp", 0.2), f"--damp: got 0.2, but the run in {interrupted} was started with 0.1{end}"),
        (("--group-size", 64), "--group-size: got 64, but the run in"),
        (("--no-clip", "--n-samples", 4), "--n-samples: got 4, but"),
        (("--true-sequential",), "--true-sequential: got True, but"),
        (("--skip", "mlp"), "was started with nothing; leave it out"),
        (
            ("--config", tmp_path / "other.yaml"),
            "--config: got [{'match': 'k_proj', 'bits': 4, 'group_size': 32}], but",
        ),
        (("-o", tmp_path / "elsewhere"), "--output: got"),
        ((tmp_path,), "MODEL: got"),
        (("--work-dir", tmp_path / "another"), "--work-dir: got"),
    ):
        assert sentence in refused("--resume", interrupted, *arguments), arguments
    same = ("--damp", 0.1, "--n-samples", 3, "-o", tmp_path / "out", model_dir, "--work-dir", interrupted)
    assert run("--resume", interrupted, *same).exit_code == 0


def test_what_is_no_run(tmp_path: Path, model_dir: Path, interrupted: Path) -> None:
    assert "holds no run.json, so there is no run to go on with" in refused("--resume", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    arguments = (model_dir, "-o", tmp_path / "out", "--method", "rtn", "--work-dir")
    assert "holds a run already; go on with it by --resume" in refused(*arguments, interrupted)
    result = run(*arguments, tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "new").glob("block-*.json"))) == 2


def test_a_refused_start_leaves_no_work_directory(tmp_path: Path, model_dir: Path) -> None:
    arguments = (model_dir, "-o", tmp_path / "out", "--work-dir", tmp_path / "work", "--dataset", "redpyjama")
    assert "did you mean redpajama?" in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_for_both(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    size = json.loads(run(model_dir, "-o", tmp_path / "first", "--method", "rtn", "--json").stdout)["bytes_after"]
    monkeypatch.setattr("marlin_gptq.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=2 * size - 1))
    arguments = (model_dir, "-o", tmp_path / "out", "--method", "rtn")
    assert "work: the disk is full" in refused(*arguments, "--work-dir", tmp_path / "work")
    assert run(*arguments).exit_code == 0

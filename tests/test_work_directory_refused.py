"""work_directory.py: directories and runs that do not fit together are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_samples, save_tiny_model
from helpers_work_directory import BLOCKS, CPU, SAMPLES, Killed, run

from marlin_gptq import CheckpointError, InputError, QuantizationConfig, quantize_model, work_directory
from marlin_gptq.destination import LOCK
from marlin_gptq.report import ProgressEvent
from marlin_gptq.work_directory import WorkDirectory, model_digest


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "source", num_hidden_layers=BLOCKS, attention_bias=True)


@pytest.fixture
def begun(source: Path, tmp_path: Path) -> Path:
    """The work directory of a run killed in block 1."""

    def kill(event: ProgressEvent) -> None:
        if event.block == 1:
            raise Killed

    with pytest.raises(Killed):
        run(source, tmp_path / "out", tmp_path / "work", progress=kill)
    return tmp_path / "work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"config": QuantizationConfig(clip=False, damp_percent=0.2)},
            "settings: the run .* damp_percent 0.1, .* 0.2;",
        ),
        ({"samples": random_samples(6, seed=4)}, "samples: the run .* was begun with another one"),
        ({"dtype": torch.bfloat16}, "dtype: the run .* was begun with 'float16', and is now .* 'bfloat16'"),
        ({"shard_size": 400_000}, "shard_size: the run .* was begun with 300000, .* 400000"),
    ],
)
def test_other_arguments_are_refused_by_name(
    source: Path, tmp_path: Path, begun: Path, options: dict[str, Any], message: str
) -> None:
    with WorkDirectory.resume(begun) as work, pytest.raises(InputError, match=message):
        config = options.pop("config", QuantizationConfig(clip=False))
        arguments = {"samples": SAMPLES, "shard_size": 300_000} | options
        quantize_model(source, tmp_path / "out", config, device=CPU, work=work, **arguments)


def test_a_changed_model_and_other_threads_are_refused(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    with pytest.raises(Killed):
        run(source, tmp_path / "out", tmp_path / "work", progress=lambda _: (_ for _ in ()).throw(Killed()))
    torch.set_num_threads(2)
    with pytest.raises(InputError, match=r"threads: the run in .* was begun with 1, and is now asked to go on with 2"):
        run(source, tmp_path / "out", tmp_path / "work")
    torch.set_num_threads(1)
    content = bytearray((source / "model.safetensors").read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    (source / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model: the run in .* was begun with another one"):
        run(source, tmp_path / "out", tmp_path / "work")


def test_the_digest_of_a_model_sees_every_file(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", shard_size="200KB")
    before = model_digest(source)
    assert before == model_digest(source)
    (source / "config.json").write_text((source / "config.json").read_text() + " ")
    changed = model_digest(source)
    assert changed != before
    sorted(source.glob("*.safetensors"))[-1].unlink()
    assert model_digest(source) != changed


def test_one_run_at_a_time(begun: Path) -> None:
    with WorkDirectory.resume(begun), pytest.raises(InputError, match="another run works there"):
        WorkDirectory.resume(begun)
    WorkDirectory.resume(begun).close()


def test_directories_that_do_not_fit(tmp_path: Path, begun: Path) -> None:
    with pytest.raises(InputError, match="work: holds a run already; go on with it by --resume"):
        WorkDirectory.new(begun, {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"full: is not empty \(it holds thesis\.tex\); give another --work-dir"):
        WorkDirectory.new(tmp_path / "full", {})
    for absent in (tmp_path / "full", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"holds no run\.json, so there is no run to go on with"):
            WorkDirectory.resume(absent)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be a work directory"):
        WorkDirectory.new(tmp_path / "file" / "work", {})


@pytest.mark.parametrize("names", [("samples.safetensors",), ("lock", "samples.safetensors"), ("novel.writing",)])
def test_files_that_only_look_like_ours_stay(tmp_path: Path, names: tuple[str, ...]) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name in names:
        (work / name).write_text("only copy")
    with pytest.raises(InputError, match="work: is not empty"):
        WorkDirectory.new(work, {})
    assert {path.name: path.read_text() for path in work.iterdir()} == dict.fromkeys(names, "only copy")


def test_a_run_json_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "novel.writing").touch()
    with pytest.raises(CheckpointError, match=r"run\.json: damaged"):
        WorkDirectory.resume(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["novel.writing", "run.json"]


def test_what_a_run_killed_before_it_began_left_is_used_again(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name, content in (("lock", work_directory.MARK), ("samples.safetensors", b""), ("run.json.writing", b"")):
        (work / name).write_bytes(content)
    with WorkDirectory.new(work, {}):
        pass
    assert list(work.iterdir()) == [], "but the directory was there before"


def test_files_of_a_user_in_a_work_directory_stay(begun: Path) -> None:
    (begun / "block-00007.json.writing").touch()
    (begun / "novel.writing").touch()
    WorkDirectory.resume(begun).close()
    assert (begun / "novel.writing").exists() and not (begun / "block-00007.json.writing").exists()


def test_nothing_begun_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), WorkDirectory.new(tmp_path / "work", {}):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["run.json", "samples.safetensors"])
def test_damage_that_cannot_be_mended_is_said(begun: Path, name: str) -> None:
    content = bytearray((begun / name).read_bytes())
    content[len(content) // 2] ^= 4
    (begun / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: damaged"), WorkDirectory.resume(begun) as work:
        work.samples()


def test_another_format_is_refused(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_directory, "FORMAT", 2)
    with pytest.raises(CheckpointError, match=r"run\.json: is of format 1, this version writes 2; start anew"):
        WorkDirectory.resume(begun)


def test_what_stood_under_the_output_comes_back(source: Path, tmp_path: Path, begun: Path) -> None:
    """Killed between the two renames that replace an old output."""
    folder = tmp_path / ".out.partial-abcdefgh"
    save_tiny_model(folder / "old", seed=5)
    (folder / "new").mkdir()
    (folder / LOCK).touch()
    config = QuantizationConfig(clip=False)
    with pytest.raises(InputError, match="out: exists already"):
        run(source, tmp_path / "out", begun, config)
    assert (tmp_path / "out" / "model.safetensors").exists() and not folder.exists()
    run(source, tmp_path / "out", begun, config, overwrite=True)
    assert "quantization_config" in (tmp_path / "out" / "config.json").read_text()

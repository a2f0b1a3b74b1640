"""work_directory.py: a run that is killed, starved of disk or damaged gives the same bits in the end."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_samples, save_tiny_model

from marlin_gptq import CheckpointError, InputError, QuantizationConfig, checkpoint, quantize_model, work_directory
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.config import Override
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.install import install_block
from marlin_gptq.report import ProgressEvent
from marlin_gptq.work_directory import WorkDirectory, model_digest

CPU = torch.device("cpu")
BLOCKS = 3
SAMPLES = random_samples(6)
TIMES = ("seconds", "output", "costs")


class Killed(BaseException):
    """Stands for a SIGKILL inside one process: no handler of the code under test may catch it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "source", num_hidden_layers=BLOCKS, attention_bias=True)


def run(source: Path, output: Path, directory: Path | None, config: QuantizationConfig | None = None, **options: Any):
    """Quantize; in `directory`, a new run or, if there is one, that run gone on with."""
    config, samples = config or QuantizationConfig(clip=False), options.pop("samples", SAMPLES)
    options = {"device": CPU, "shard_size": 300_000} | options
    if directory is None:
        return quantize_model(source, output, config, samples, **options)
    begun = (directory / "run.json").exists()
    with WorkDirectory.resume(directory) if begun else WorkDirectory.new(directory, {}) as work:
        if begun and work.finished(output):
            return None
        if begun:
            assert all(map(torch.equal, work.samples(), samples))
        return quantize_model(source, output, config, samples, work=work, **options)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("expected") / "out"
    run(source, output, None)
    return content_of(output)


def content_of(directory: Path) -> dict[str, Any]:
    """Every file's bytes; of the log all but times and places, the card (which holds the time) by its other lines."""
    content: dict[str, Any] = {path.name: path.read_bytes() for path in directory.iterdir()}
    log = json.loads(content["quantize_log.json"])
    content["quantize_log.json"] = {key: value for key, value in log.items() if key not in TIMES}
    for record in content["quantize_log.json"]["records"]:
        record.pop("seconds")
    content["README.md"] = [line for line in content["README.md"].decode().splitlines() if "| time |" not in line]
    return content


def blocks_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("block-*.json"))


def test_a_run_in_one_piece_keeps_every_block(source: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    run(source, tmp_path / "out", tmp_path / "work")
    assert content_of(tmp_path / "out") == expected
    assert blocks_of(tmp_path / "work") == [f"block-{index:05d}.json" for index in range(BLOCKS)]
    assert not list((tmp_path / "work").glob("*.writing"))
    assert run(source, tmp_path / "out", tmp_path / "work") is None  # finished
    run(source, tmp_path / "elsewhere", tmp_path / "work")
    assert content_of(tmp_path / "elsewhere") == expected


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(true_sequential=True),
        QuantizationConfig(method="rtn"),
        QuantizationConfig(skip=("q_",)),
        QuantizationConfig(correct_target=0.5, signed_scales=True, act_order="groups", refine_sweeps=1),
        QuantizationConfig(pack=True, act_order="columns", token_cap=4.0, clip_hessian="plain"),
        QuantizationConfig(beam_width=3, equal_samples=True, true_sequential=True),
        QuantizationConfig(
            correct_target=0.5, tune_block_steps=4, tune_codes=True, skip=("q_",), overrides=(Override("down", 4, 32),)
        ),
    ],
)
def test_every_recipe_goes_on(source: Path, tmp_path: Path, config: QuantizationConfig) -> None:
    samples = [] if config.method == "rtn" else SAMPLES
    run(source, tmp_path / "whole", None, config, samples=samples)

    def kill(event: ProgressEvent) -> None:
        if event.block == 2:
            raise Killed

    with pytest.raises(Killed):
        run(source, tmp_path / "out", tmp_path / "work", config, samples=samples, progress=kill)
    assert len(blocks_of(tmp_path / "work")) == 2
    run(source, tmp_path / "out", tmp_path / "work", config, samples=samples)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_tuned_blocks_of_a_float32_model_go_on(tmp_path: Path) -> None:
    """Norm weights are stored rounded: those that moved go on so, and those that did not as they were."""
    source = save_tiny_model(tmp_path / "source", num_hidden_layers=2, dtype=torch.float32, initializer_range=0.1)
    config = QuantizationConfig(tune_block_steps=20, tune_codes=True, tune_rate=2e-3)
    samples = random_samples(60, longest=128)
    whole = run(source, tmp_path / "whole", None, config, samples=samples)
    assert whole is not None and whole.tuned_blocks[0].kept

    def kill(event: ProgressEvent) -> None:
        if event.block == 1:
            raise Killed

    with pytest.raises(Killed):
        run(source, tmp_path / "out", tmp_path / "work", config, samples=samples, progress=kill)
    run(source, tmp_path / "out", tmp_path / "work", config, samples=samples)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


@pytest.mark.parametrize("system_call", ["fsync", "replace"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_at_any_write(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, Any],
    system_call: str,
    before: bool,
) -> None:
    """The process ends at the first write of one attempt, a later one of the next, …: no attempt loses a block."""
    real = getattr(os, system_call)
    remaining = 0

    def fatal(*arguments: Any) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0 and before:
            raise Killed
        real(*arguments)
        if remaining == 0:
            raise Killed

    monkeypatch.setattr(work_directory.os, system_call, fatal)
    attempts, done = 0, 0
    for moment in (1, 1, 2, 3, 4, 2, 5, 3, 6, 10**9):
        remaining = moment
        attempts += 1
        try:
            run(source, tmp_path / "out", tmp_path / "work")
            break
        except Killed:
            assert not (tmp_path / "out").exists()
            assert len(blocks_of(tmp_path / "work")) >= done
            done = len(blocks_of(tmp_path / "work"))
    assert attempts > 3 and content_of(tmp_path / "out") == expected


def test_killed_before_the_replaced_directory_is_gone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("replaced")

    def fatal(path: Path, **_: Any) -> None:
        if ".old-" in str(path) and path.exists():
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoint.shutil, "rmtree", fatal)
        run(source, tmp_path / "out", tmp_path / "work", overwrite=True)
    assert len(list(tmp_path.glob(".out.old-*"))) == 1
    run(source, tmp_path / "out", tmp_path / "work", overwrite=True)
    assert content_of(tmp_path / "out") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out", "work"}


KILLED_RUNS = """
# Forks a child that quantizes, kills it at a random moment, and so on until one gets through.
# Arguments: source, folder, seed, folder of the tests, number of kills.
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[4])
import torch
torch.set_num_threads(1)
import test_work_directory as t
source, folder, random_moment = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
started = time.monotonic()
t.run(source, folder / "whole", folder / "whole-work")  # warms up, and says how long a run takes
length = time.monotonic() - started
kills, finished = 0, 0
status = -1
while kills < int(sys.argv[5]) or status != 0:
    child = os.fork()
    if child == 0:
        t.run(source, folder / "out", folder / "work", overwrite=True)
        os._exit(0)
    if kills < int(sys.argv[5]):
        time.sleep(random_moment.uniform(0, 0.7 * length))
        os.kill(child, signal.SIGKILL)
        kills += 1
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    if status == 0:
        finished += 1
        assert t.content_of(folder / "out") == t.content_of(folder / "whole")
        if kills < int(sys.argv[5]):  # once more, over what is there
            import shutil
            shutil.rmtree(folder / "work")
print(kills, finished)
"""


def kill_often(source: Path, folder: Path, seed: int, kills: int) -> None:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED_RUNS, source, folder, seed, here, kills]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-2]) == kills and int(done.stdout.split()[-1]) >= 1
    left = {path.name for path in folder.iterdir()}
    assert left == {"whole", "whole-work", "out", "work"}, "killed runs leave nothing beside the output"


def test_killed_at_random_moments(source: Path, tmp_path: Path) -> None:
    kill_often(source, tmp_path, seed=1, kills=10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_many_random_moments(source: Path, tmp_path: Path, seed: int) -> None:
    kill_often(source, tmp_path, seed=seed, kills=60)


@pytest.mark.parametrize("harm", ["flip", "cut", "lose", "foreign"])
def test_damaged_blocks_are_noticed_and_done_again(
    source: Path, tmp_path: Path, expected: dict[str, Any], caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    run(source, tmp_path / "first", tmp_path / "whole-work")
    chance = random.Random(harm)
    for name in ("block-00000.safetensors", "block-00001.json", "block-00001.safetensors", "block-00002.json"):
        directory = tmp_path / f"work-{name}"
        shutil.copytree(tmp_path / "whole-work", directory)
        path = directory / name
        content = bytearray(path.read_bytes())
        if harm == "flip":
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
        elif harm == "cut":
            path.write_bytes(content[: chance.randrange(len(content))])
        elif harm == "lose":
            path.unlink()
        else:
            shutil.copyfile(path.with_stem("block-00000" if "00000" not in name else "block-00001"), path)
        caplog.clear()
        events: list[ProgressEvent] = []
        with caplog.at_level(logging.WARNING):
            run(source, tmp_path / "out", directory, progress=events.append, overwrite=True)
        assert content_of(tmp_path / "out") == expected, name
        redone = {event.block for event in events if event.stage == "quantize"}
        assert redone == {int(name[6:11])}, "the blocks after it are as they were, and are not done again"
        if harm != "lose" or name.endswith(".safetensors"):
            assert "this step is done again" in caplog.text and name[:11] in caplog.text


def test_a_block_made_from_another_input_is_done_again(
    source: Path, tmp_path: Path, expected: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A valid block of a run with other samples, smuggled in, and so all checksums hold."""
    run(source, tmp_path / "other", tmp_path / "other-work", samples=random_samples(6, seed=9))
    run(source, tmp_path / "first", tmp_path / "work")
    for suffix in ("json", "safetensors"):
        shutil.copyfile(tmp_path / "other-work" / f"block-00001.{suffix}", tmp_path / "work" / f"block-00001.{suffix}")
    run(source, tmp_path / "out", tmp_path / "work")
    assert content_of(tmp_path / "out") == expected
    assert "block-00001: was made from another input than the steps before it give now" in caplog.text


def test_a_full_disk_loses_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    real, written = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal written
        written += 1
        if written == 7:  # samples, run.json, block 0, its record: two files each with their folder's sync
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(work_directory.os, "fsync", full)
    message = r"work: the disk is full: 0\.\d MB are needed, .* are free; make room and go on with --resume .*work"
    with pytest.raises(CheckpointError, match=message):
        run(source, tmp_path / "out", tmp_path / "work")
    assert len(blocks_of(tmp_path / "work")) == 0 and not list((tmp_path / "work").glob("*.writing"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]
    monkeypatch.setattr(work_directory.os, "fsync", real)
    run(source, tmp_path / "out", tmp_path / "work")
    assert content_of(tmp_path / "out") == expected


@pytest.mark.parametrize("limit", [4_000, 60_000, 250_000])
def test_a_disk_that_really_refuses(source: Path, tmp_path: Path, expected: dict[str, Any], limit: int) -> None:
    """No file may grow beyond `limit`: the write fails in the operating system, at run.json, a block, or a shard."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = 1
        try:
            run(source, tmp_path / "out", tmp_path / "work")
        except CheckpointError as error:
            code = 42 if "cannot be written" in str(error) else 43
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out", tmp_path / "work")
    assert content_of(tmp_path / "out") == expected


# ---- what is refused


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
    with WorkDirectory.resume(begun) as work:
        old = tmp_path / f".out.old-{work.id}"
        partial = tmp_path / f".out.partial-{work.id}"
    (old / "out").mkdir(parents=True)
    (old / "out" / "precious").touch()
    partial.mkdir(exist_ok=True)
    with pytest.raises(InputError, match="out: exists already"):
        run(source, tmp_path / "out", begun)
    assert (tmp_path / "out" / "precious").exists() and not old.exists() and not partial.exists()
    run(source, tmp_path / "out", begun, overwrite=True)
    assert not (tmp_path / "out" / "precious").exists() and (tmp_path / "out" / "config.json").exists()


def test_a_block_is_put_back_as_it_was_left(source: Path, tmp_path: Path) -> None:
    """Weights of float32 whose rounding is stored stay unrounded; tuned ones take the stored value."""
    run(source, tmp_path / "out", None)
    store = TensorStore(tmp_path / "out")
    stream = BlockStream(source, device=CPU)
    prefix = "model.layers.1"
    with stream.block(1) as block:
        linears = {f"{prefix}.mlp.up_proj": block.mlp.up_proj}
        tensors = {name: store.get(name) for name in store.names if name.startswith(prefix)}
        names = [f"{prefix}.{own}" for own in block.state_dict()]
        tensors |= {name: stream.store.get(name).clone() for name in names if name not in tensors}
        unrounded = block.input_layernorm.weight + 1e-6
        block.input_layernorm.weight.copy_(unrounded)
        tuned = tensors[f"{prefix}.post_attention_layernorm.weight"] * 2
        tensors[f"{prefix}.post_attention_layernorm.weight"] = tuned
        install_block(block, prefix, linears, tensors, {f"{prefix}.mlp.up_proj": 128})
        assert torch.equal(block.input_layernorm.weight, unrounded)
        assert torch.equal(block.post_attention_layernorm.weight, tuned.float())
        del tensors[f"{prefix}.mlp.up_proj.scales"]
        with pytest.raises(CheckpointError, match=r"up_proj\.scales: missing among the stored tensors of its block"):
            install_block(block, prefix, linears, tensors, {f"{prefix}.mlp.up_proj": 128})

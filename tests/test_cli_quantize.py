"""marlin-quantize: its output, its progress, and every bad input with its sentence."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
import transformers
from character_model import save_character_model, save_texts
from click.testing import CliRunner, Result

from marlin_gptq import pipeline
from marlin_gptq.cli import failures, options, quantize
from marlin_gptq.cli.quantize import main
from marlin_gptq.config import DEFAULT_PRESET
from marlin_gptq.errors import InputError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_character_model(tmp_path_factory.mktemp("character-model"))


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return str(save_texts(tmp_path / "texts.jsonl"))


def run(*arguments: Any) -> Result:
    """The command, with the recipe that is quick without a GPU unless another is named."""
    recipe = () if "--preset" in arguments else ("--preset", "marlin")
    return CliRunner().invoke(main, [str(argument) for argument in (*arguments, *recipe)])


def refused(*arguments: Any) -> str:
    """The one sentence of a run that must fail with exit code 2 and leave nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    sentence = result.stderr.strip().split("\n")[-1]
    assert sentence.startswith("error: ")
    return sentence.removeprefix("error: ")


# ---- what it makes


def test_a_whole_run(model_dir: Path, texts: str, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    result = run(model_dir, "--wbits", 4, "-o", output, "--dataset", texts, "--n-samples", 5, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert (output / "config.json").is_file() and (output / "tokenizer.json").is_file()
    assert f"written    {output}" in result.stdout
    assert (
        "linears    14, 100.0 % of the weights in the blocks" in result.stdout and "are quantized" not in result.stderr
    )
    assert "kB ->" in result.stdout and "error      mean 0.0" in result.stdout
    assert f"marlin-eval perplexity {output}" in result.stdout
    assert re.search(r"^stages     start \d+\.\d, .*: \d+\.\d s in all$", result.stdout, flags=re.MULTILINE)
    lines = result.stderr.split("\n")
    assert "note: calibration documents of at most 256 tokens, the model's context" in lines
    assert any(line.startswith("5 samples of ") for line in lines)
    progress = [line for line in lines if line.startswith("[")]
    assert len(progress) == 14, "a plain line for each linear of two blocks"
    assert progress[0].startswith("[1/14] block 1/2  model.layers.0.self_attn.q_proj  error 0.")
    assert "  left " in progress[0] and "elapsed" in progress[-1]


def test_what_comes_next_is_a_command_that_runs(model_dir: Path, tmp_path: Path) -> None:
    body = tmp_path / "the body"
    transformers.LlamaModel(transformers.AutoConfig.from_pretrained(model_dir)).save_pretrained(body)
    for model, command in ((model_dir, "marlin-eval perplexity"), (body, "marlin-inspect")):
        output = tmp_path / f"in 4 bits, {command}"
        result = run(model, "-o", output, "--method", "rtn", "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert f"next       {command} '{output}'\n" in result.stdout


def test_a_recipe_that_tunes_tells_how_far_it_is(model_dir: Path, texts: str, tmp_path: Path) -> None:
    assert {p.name: p.default for p in main.params}["preset"] == DEFAULT_PRESET
    output = tmp_path / "out"
    short = ("--tune-steps", 20, "--tune-batch", 2, "--tune-written", 2, "--refine-sweeps", 1, "--no-signed-scales")
    short += ("--tune-block-steps", 10)
    result = run(model_dir, "-o", output, "--dataset", texts, "--device", "cpu", "--preset", "best", *short)
    assert result.exit_code == 0, result.output
    settings = json.loads((output / "config.json").read_text())["quantization_config"]
    assert settings["preset"] == (
        "best, changed: signed_scales false, refine_sweeps 1, tune_steps 20, tune_batch 2, tune_written 2, "
        "tune_block_steps 10"
    )
    assert f"recipe     gptq, preset {settings['preset']}" in result.stdout
    assert (settings["tune_steps"], settings["signed_scales"]) == (20, False)
    assert (settings["tune_codes"], settings["damp_percent"], settings["refine_sweeps"]) == (True, 0.01, 1)
    assert settings["tune_block_steps"] == 10
    assert re.search(r"^blocks     [012] of 2 better for their tuning", result.stdout, flags=re.MULTILINE)
    assert re.search(r"^\[7/14\] block 1/2  tuned: error 0\.\d+ -> 0\.\d+", result.stderr, flags=re.MULTILINE)
    assert re.search(r"^tuning     KL 0\.\d+ -> 0\.\d+ on 1 windows kept aside", result.stdout, flags=re.MULTILINE)
    assert re.search(r"^tune: 50%  elapsed 0:\d\d  left 0:\d\d  KL 0\.\d+$", result.stderr, flags=re.MULTILINE)
    assert "write text: 100%" in result.stderr and "full precision: 100%" in result.stderr


def test_the_result_names_what_was_done_where_the_default_leaves_its_tuning_out(
    model_dir: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marlin_gptq.requirements.MOST_CPU_MINUTES", 0)
    out, done = tmp_path / "out", "fast, changed: tune_block_steps 0"
    arguments = [str(model_dir), "-o", str(out), "--dataset", texts, "--n-samples", "3", "--device", "cpu", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["config"]["preset"] == done
    assert json.loads((out / "quantize_log.json").read_text())["config"]["preset"] == done
    assert json.loads((out / "config.json").read_text())["quantization_config"]["preset"] == done
    assert f"| method | gptq, preset {done} |" in (out / "README.md").read_text()
    assert f": gptq, preset {done}; 4 bits" in result.stderr


def test_json_is_one_object_on_stdout(model_dir: Path, texts: str, tmp_path: Path) -> None:
    arguments = (model_dir, "-o", tmp_path / "out", "--dataset", texts, "--n-samples", 3, "--seed", 7, "--json")
    result = run(*arguments, "--group-size", 32, "--damp", 0.05, "--no-clip", "--skip", "mlp", "--seq-len", 99)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["config"]["group_size"] == 32 and report["config"]["damp_percent"] == 0.05
    assert report["config"]["clip"] is False and report["config"]["skip"] == ["mlp"]
    assert len(report["records"]) == 8
    names = [f"mlp.{own} (--skip mlp)" for own in ("gate_proj", "up_proj", "down_proj")]
    assert list(report["left"]) == names and 0 < report["quantized_share"] < 0.5
    percent = f"{100 * report['quantized_share']:.0f}"
    line = f"warning: only {percent} % of the weights in the decoder blocks are quantized; in 16 bits stay "
    assert line + ", ".join(names) in result.stderr.splitlines()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| not quantized | {', '.join(names)} |" in card
    calibration = report["calibration"]
    assert calibration.pop("tokens") > 0
    assert calibration == {"dataset": texts, "n_samples": 3, "seq_len": 99, "seed": 7, "special_tokens": False}
    assert report["model"] == str(model_dir) and report["seconds"] > 0
    stages = list(report["costs"])
    assert stages[:2] == ["start", "calibration text"] and {"load", "gptq", "write", "other"} <= set(stages)
    assert all(cost["seconds"] >= 0 for cost in report["costs"].values())
    inside = sum(cost["seconds"] for name, cost in report["costs"].items() if name not in stages[:2])
    assert inside == pytest.approx(report["seconds"])


def test_round_to_nearest_reads_no_text(model_dir: Path, tmp_path: Path) -> None:
    arguments = ("-o", tmp_path / "out", "--method", "rtn", "--group-size", "-1", "--dtype", "bfloat16")
    result = run(model_dir, *arguments, "--dataset", "nonsense")
    assert result.exit_code == 0, result.output
    assert "calibration" not in result.stderr
    assert "to 4 bits" not in result.stdout


def test_fewer_samples_are_a_warning(model_dir: Path, texts: str, tmp_path: Path) -> None:
    result = run(model_dir, "-o", tmp_path / "out", "--dataset", texts, "--skip", "mlp", "--no-clip")
    assert result.exit_code == 0, result.output
    assert "warning: calibration: 8 samples of 256: 8 documents were read" in result.stderr


def test_overwriting_when_asked(model_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = (model_dir, "-o", output, "--method", "rtn")
    assert run(*arguments).exit_code == 0
    (output / "notes.txt").touch()
    assert "holds notes.txt beside a model; --overwrite replaces only" in refused(*arguments, "--overwrite")
    (output / "notes.txt").rename(output / "vocab.txt")
    assert run(*arguments, "--overwrite").exit_code == 0
    assert not (output / "vocab.txt").exists() and (output / "config.json").exists()


@pytest.mark.parametrize("kind", ["marlin", "gptq", "tuned"])
def test_an_output_that_comes_to_be_meanwhile_stays(
    model_dir: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write, output = pipeline.write_companions, tmp_path / "out"

    def meanwhile(*arguments: Any) -> None:
        output.mkdir()
        (output / "precious.txt").touch()
        write(*arguments)

    monkeypatch.setattr(pipeline, "write_companions", meanwhile)
    arguments: tuple[Any, ...] = ("--method", "rtn", "--format", kind, "--dtype", "float16")
    if kind == "tuned":
        arguments = ("--dataset", texts, "--n-samples", 3, "--device", "cpu", "--tune-steps", 1)
    sentence = refused(model_dir, "-o", output, *arguments)
    assert sentence == (
        f"{output}: has come to be while this ran; it stays as it is, the finished result is {tmp_path / 'out.result'}"
    )
    assert [path.name for path in output.iterdir()] == ["precious.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.result", "texts.jsonl"]
    settings = json.loads((tmp_path / "out.result" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == ("gptq" if kind == "gptq" else "marlin_gptq")
    assert settings.get("tune_steps", 0) == (kind == "tuned")


def test_where_activations_wait_is_passed_on(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def quantize_model(*_: Any, spill: str | None, **__: Any) -> None:
        asked.append(spill)
        raise InputError("stop here")

    monkeypatch.setattr(pipeline, "quantize_model", quantize_model)
    for spill, to in (("auto", "marlin"), ("disk", "marlin"), ("host", "awq")):
        refused(model_dir, "-o", tmp_path / "out", "--method", "rtn", "--spill", spill, "--format", to)
    assert asked == [None, "disk", "host"]


def test_help_names_every_option_of_the_recipe() -> None:
    text = run("--help").stdout
    wanted = set(
        re.findall(
            r"--[a-z-]+",
            """
        --wbits --output --group-size --damp --n-samples --seq-len --dataset --seed --method --preset --no-clip
        --true-sequential --signed-scales --clip-hessian --act-order --token-cap --correct-target --refine-sweeps
        --beam-width --equal-samples --two-sided
        --pack --tune-steps --tune-codes --tune-batch --tune-rate --tune-scale-rate --tune-written --tune-block-steps
        --dtype --device --skip --shard-size --overwrite --processes --json --revision --offline --debug
    """,
        )
    )
    assert wanted <= set(re.findall(r"--[a-z-]+", text))
    assert "Examples:" in text


# ---- what it refuses


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that fails here must fail before any text is read."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work began before the input was checked")

    monkeypatch.setattr(quantize, "_read_samples", never)
    monkeypatch.setattr(pipeline, "quantize_model", never)


@pytest.mark.usefixtures("no_work")
class TestRefusedBeforeAnyWork:
    def test_other_widths(self, model_dir: Path, tmp_path: Path) -> None:
        sentence = refused(model_dir, "--wbits", 3, "-o", tmp_path / "out")
        assert sentence == "--wbits: got 3, the Marlin format holds 4-bit codes only; use --wbits 4"

    def test_a_missing_model(self, tmp_path: Path) -> None:
        sentence = refused(tmp_path / "nowhere", "-o", tmp_path / "out")
        assert "nowhere: no such directory; give a model directory or a hub id" in sentence

    def test_a_directory_that_is_no_model(self, tmp_path: Path) -> None:
        assert "holds no config.json" in refused(tmp_path, "-o", tmp_path / "out")

    def test_a_model_that_is_no_causal_one(self, tmp_path: Path) -> None:
        config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert "causal language model" in refused(tmp_path, "-o", tmp_path / "out")

    def test_a_quantized_model(self, model_dir: Path, tmp_path: Path) -> None:
        config = json.loads((model_dir / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert "is quantized already (by gptq)" in refused(tmp_path, "-o", tmp_path / "out")

    def test_an_existing_output(self, model_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "kept").touch()
        assert "exists already; give another --output, or --overwrite" in refused(model_dir, "-o", tmp_path)
        assert (tmp_path / "kept").exists()

    def test_an_output_that_is_a_file(self, model_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "is a file; give a directory" in refused(model_dir, "-o", tmp_path / "file", "--overwrite")
        assert "is a file" in refused(model_dir, "-o", tmp_path / "file" / "out")

    def test_the_model_as_its_own_output(self, model_dir: Path) -> None:
        assert "is the model itself; give another --output" in refused(model_dir, "-o", model_dir, "--overwrite")
        assert (model_dir / "model.safetensors").exists()

    def test_an_output_that_holds_what_is_read(self, model_dir: Path, texts: str, tmp_path: Path) -> None:
        (tmp_path / "zoo").mkdir()
        (tmp_path / "zoo" / "model").symlink_to(model_dir)
        sentence = refused(tmp_path / "zoo" / "model", "-o", model_dir.parent, "--overwrite")
        assert f"holds the model ({tmp_path / 'zoo' / 'model'}); give another --output" in sentence
        assert "holds the --dataset" in refused(model_dir, "-o", tmp_path, "--dataset", texts, "--overwrite")
        (tmp_path / "rules.yaml").write_text("'k_proj': {group_size: 64}\n")
        Path(texts).unlink()
        assert "holds the --config" in refused(model_dir, "-o", tmp_path, "--config", tmp_path / "rules.yaml")

    @pytest.mark.parametrize("work", ["out", "out/work", "x/../out", "."])
    def test_a_work_directory_that_is_not_apart(
        self, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        sentence = refused(model_dir, "-o", "out", "--work-dir", work)
        assert sentence.startswith(f"--work-dir {Path(work)}: ") and "give a directory of its own" in sentence
        assert list(tmp_path.iterdir()) == []

    def test_groups_that_do_not_fit(self, tmp_path: Path) -> None:
        directory = save_character_model(tmp_path / "model", hidden_size=96, intermediate_size=192)
        sentence = refused(directory, "-o", tmp_path / "out")
        assert "q_proj: group size 128 does not divide its 96 input features; use --group-size 32" in sentence

    def test_truncated_weights(self, model_dir: Path, tmp_path: Path) -> None:
        for file in model_dir.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes()[: 4000 if file.suffix == ".safetensors" else None])
        assert "model.safetensors: truncated or corrupt" in refused(tmp_path, "-o", tmp_path / "out")

    def test_an_early_full_disk(self, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("marlin_gptq.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
        sentence = refused(model_dir, "-o", tmp_path / "out")
        assert "the disk is full:" in sentence and "MB are needed and 0.0 MB are free" in sentence

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--group-size", "100"), "Invalid value for '--group-size'"),
            (("--n-samples", "0"), "Invalid value for '--n-samples'"),
            (("--seq-len", "1"), "Invalid value for '--seq-len'"),
            (("--seq-len", "512"), "seq_len: got 512, the model's context (max_position_embeddings) holds 256"),
            (("--damp", "0"), "damp_percent: got 0.0, expected a number above 0"),
            (("--skip", "("), "skip: '(' is not a regular expression"),
            (("--shard-size", "big"), "--shard-size: got 'big', expected a size such as 5GB"),
            (("--unknown",), "No such option"),
        ],
    )
    def test_senseless_options(self, model_dir: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
        assert message in refused(model_dir, "-o", tmp_path / "out", *arguments)

    def test_missing_arguments(self, model_dir: Path) -> None:
        assert "Missing argument 'MODEL'" in refused("-o", "out")
        assert "Missing option '-o' / '--output' (see marlin-quantize --help)" in refused(model_dir)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self, model_dir: Path, tmp_path: Path) -> None:
        sentence = refused(model_dir, "-o", tmp_path / "out", "--device", "cuda")
        assert sentence.startswith("--device cuda: ") and "use --device cpu or auto" in sentence


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; calibration needs documents of 2 to 256 tokens"),
        ('{"text": ""}', "no usable sample: one document was read, 0 to 0 tokens long"),
        ('{"content": ""}', 'line 1 has no field "text"; it has content'),
    ],
)
def test_unusable_datasets(model_dir: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "texts.jsonl").write_text(content)
    assert message in refused(model_dir, "-o", tmp_path / "out", "--dataset", tmp_path / "texts.jsonl")
    assert not (tmp_path / "out").exists()


def test_an_unknown_dataset(model_dir: Path, tmp_path: Path) -> None:
    sentence = refused(model_dir, "-o", tmp_path / "out", "--dataset", "redpyjama")
    assert "dataset: got 'redpyjama', did you mean redpajama?" in sentence


def test_weights_that_are_not_numbers(tmp_path: Path, texts: str) -> None:
    from safetensors.torch import load_file, save_file

    directory = save_character_model(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    sentence = refused(directory, "-o", tmp_path / "out", "--dataset", texts, "--n-samples", 2, "--no-clip")
    assert "model.layers.1.mlp.up_proj.weight: 1 of" in sentence and "NaN" in sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "texts.jsonl"], "no half checkpoint"


# ---- failures on the way


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "quantize_model", broken)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "interrupted: nothing was written under "),
        (OSError(errno.ENOSPC, "No space left on device", "model.safetensors"), "disk full: model.safetensors; make"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), "Permission denied: /out"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of GPU memory (CUDA out of"),
        (MemoryError("no"), "out of host memory (no); use a smaller --seq-len"),
        (InputError("group_size: wrong"), "group_size: wrong"),
    ],
)
def test_failures_end_in_one_sentence(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str
) -> None:
    fails_with(monkeypatch, error)
    assert message in refused(model_dir, "-o", tmp_path / "out", "--method", "rtn")


def test_an_interrupted_replacement_says_that_the_old_one_stays(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_with(monkeypatch, KeyboardInterrupt())
    (tmp_path / "out").mkdir()
    sentence = refused(model_dir, "-o", tmp_path / "out", "--method", "rtn", "--overwrite")
    assert sentence.endswith("out; what stood there before is unchanged")


def test_a_bug_of_ours_asks_for_a_report(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(monkeypatch, ZeroDivisionError("division by zero"))
    arguments = (model_dir, "-o", tmp_path / "out", "--method", "rtn")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "unexpected ZeroDivisionError: division by zero; this is a bug: please report it" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in run(*arguments, "--debug").stderr


def test_debug_shows_the_traceback_of_a_users_mistake(tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere", "-o", tmp_path / "out", "--debug")
    assert result.exit_code == 2 and "Traceback" in result.stderr
    assert result.stderr.strip().split("\n")[-1].startswith("error: ")


def test_the_offline_switch_also_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def resolve_model(model: str, revision: str | None, offline: bool, config_only: bool) -> Path:
        asked.append(offline)
        raise InputError("stop here")

    monkeypatch.setattr(options, "resolve_model", resolve_model)
    for environment, flags in (({}, []), ({"HF_HUB_OFFLINE": "1"}, []), ({"HF_HUB_OFFLINE": None}, ["--offline"])):
        CliRunner().invoke(main, ["owner/name", "-o", str(tmp_path / "out"), *flags], env=environment)
    assert asked == [False, True, True]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5K", 1500), ("1000", 1000), (" 7 mib ", 7 * 2**20)],
)
def test_sizes(text: str, size: int) -> None:
    assert options.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5GB", "5XB", "GB", "5 i"])
def test_senseless_sizes(text: str) -> None:
    with pytest.raises(InputError, match=r"--shard-size: got .*, expected a size such as 5GB, 500MB or 2GiB"):
        options.parse_size(text)


def test_what_people_read() -> None:
    assert [options.show_size(size) for size in (12, 3400, 11_018_728, 13.5e9)] == [
        "12 B",
        "3.4 kB",
        "11.0 MB",
        "13.5 GB",
    ]
    assert [options.show_time(seconds) for seconds in (7.9, 754, 3723)] == ["0:07", "12:34", "1:02:03"]
    rough = [options.show_rough_time(seconds) for seconds in (0.3, 1.2, 27, 180, 700, 9000, 86400, 10**8)]
    assert rough[:4] == ["a second or less", "2 s or less", "20 s to 1 min", "2 to 5 min"]
    assert rough[4:] == ["5 to 20 min", "2 to 5 h", "10 h to 2 days", "100 days or more"]
    assert failures.explain(click.Abort()) == ("interrupted", 2)


# ---- as a process


def process(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "marlin_gptq.cli.quantize", *map(str, arguments)]


def test_exit_code_of_the_process(tmp_path: Path) -> None:
    result = subprocess.run(process(tmp_path / "nowhere", "-o", tmp_path / "out"), capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 2), ("SIGTERM", 143)])
def test_a_signal_leaves_nothing(tiny_llama: Path, tmp_path: Path, sent: str, code: int) -> None:
    """Ctrl-C; docker, Slurm, timeout."""
    number = getattr(signal, sent)
    arguments = (tiny_llama, "-o", tmp_path / "out", "--dataset", "demo", "--device", "cpu", "--n-samples", 4)
    running = subprocess.Popen(
        process(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background may ignore Ctrl-C, and would hand that down.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("[1/"):
            break
    running.send_signal(number)
    output, errors = running.communicate(timeout=60)
    assert running.returncode == code, errors
    assert errors.strip().split("\n")[-1] == f"error: interrupted: nothing was written under {tmp_path / 'out'}"
    assert "Traceback" not in errors and output == ""
    assert list(tmp_path.iterdir()) == []


def test_signals_end_a_command_once() -> None:
    """A closed terminal; more signals do not disturb the cleaning; what is ignored (nohup) stays ignored."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        cleaned = False
        with failures._signals_as_exceptions() as ended:
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended == []
            try:
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGHUP)
                    time.sleep(10)
            finally:
                os.kill(os.getpid(), signal.SIGHUP)
                os.kill(os.getpid(), signal.SIGINT)
                cleaned = True
        assert cleaned and ended == [signal.SIGHUP]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_an_interruption_says_is_true(tmp_path: Path) -> None:
    def told(meanwhile: Callable[[], Any], hint: str = "") -> str:
        with pytest.raises(failures.Interrupted) as caught, failures.writing(tmp_path / "out", hint):
            meanwhile()
            raise KeyboardInterrupt
        return str(caught.value)

    nothing = f"interrupted: nothing was written under {tmp_path / 'out'}"
    assert told(lambda: None, "do this") == f"{nothing}; do this"
    done = f"interrupted: {tmp_path / 'out'} was written already and is complete"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").touch()
    assert told(lambda: (tmp_path / "new").rename(tmp_path / "out")) == done
    assert told(lambda: None) == f"{nothing}; what stood there before is unchanged"


def test_a_process_of_its_own_does_not_find_what_the_command_leaves_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    command = failures.Command("name", callback=lambda: None, unused=("surely_not_there",))
    monkeypatch.setattr(failures.gc, "freeze", lambda: None)
    with pytest.raises(SystemExit):
        command.main([])  # called from another program
    assert "surely_not_there" not in sys.modules
    monkeypatch.setattr(sys, "argv", ["name"])
    monkeypatch.delitem(sys.modules, "transformers")  # once it is there, it has looked for them
    try:
        with pytest.raises(SystemExit):
            command.main()
        with pytest.raises(ImportError):
            __import__("surely_not_there")
        assert importlib.util.find_spec("surely_not_there") is None
    finally:
        del sys.modules["surely_not_there"]

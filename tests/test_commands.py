"""Console scripts answer before torch and transformers are imported, and say what they do before they import them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import marlin_gptq
from marlin_gptq.cli import options

HEAVY = ("torch", "transformers", "datasets", "lm_eval", "matplotlib")
PROGRAM = f"""
import sys
from importlib import import_module
name, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = "/somewhere/marlin-" + {{"evaluate": "eval"}}.get(name, name)
try:
    import_module("marlin_gptq.cli." + name).main()
finally:
    print("imported:", sorted(set({HEAVY!r}) & set(sys.modules)))
"""


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        (["quantize"], ["model", "--wbitz", "4"]),
        (["quantize"], ["model", "-o", "out", "--wbits", "3"]),
        (["quantize"], ["./no-such-model", "-o", "out"]),
        (["quantize"], ["model", "-o", "out", "--max-gpu-memory", "much"]),
        (["generate"], ["./no-such-model", "-p", "Once"]),
        (["convert"], ["model"]),
        (["convert"], ["./no-such-model", "-o", "out", "--to", "gptq"]),
        (["inspect"], ["./no-such-model"]),
        (["evaluate"], ["perplexty"]),
        (["evaluate", "perplexity"], ["./no-such-model"]),
        (["evaluate", "throughput"], ["model", "--batch", "x"]),
        (["evaluate", "harness"], ["./no-such-model", "--tasks", "piqa"]),
        (["evaluate", "mmlu"], ["./no-such-model"]),
        (["evaluate", "report"], ["./no-such-model"]),
    ],
    ids=" ".join,
)
def test_help_and_mistakes_import_nothing_heavy(command: list[str], mistake: list[str]) -> None:
    for arguments, code in ((["--help"], 0), (mistake, 2)):
        done = script(*command, *arguments)
        assert done.returncode == code, done.stdout + done.stderr
        assert done.stdout.endswith("imported: []\n"), done.stdout
        assert ("error: " in done.stderr) is bool(code)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("quantize", ["-o", "out"]),
        ("quantize", ["--dry-run"]),
        ("generate", ["-p", "Once"]),
        ("convert", ["-o", "out", "--to", "gptq"]),
        ("inspect", []),
        ("evaluate", ["perplexity"]),
        ("evaluate", ["throughput"]),
        ("evaluate", ["mmlu"]),
        ("evaluate", ["report"]),
    ],
)
def test_the_first_line_comes_before_the_imports(
    command: str, arguments: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Any) -> None:
        raise marlin_gptq.InputError("far enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, "load_libraries", stop)
    subcommand, rest = (arguments[:1], arguments[1:]) if command == "evaluate" else ([], arguments)
    done = CliRunner().invoke(import_module(f"marlin_gptq.cli.{command}").main, [*subcommand, str(tiny_llama), *rest])
    assert done.stderr == f"reading {tiny_llama}\nerror: far enough\n"


def test_the_library_registers_when_it_is_imported() -> None:
    program = """
import marlin_gptq
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "marlin_gptq" in AUTO_QUANTIZER_MAPPING and "marlin_gptq" in AUTO_QUANTIZATION_CONFIG_MAPPING
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_of_the_library_and_of_the_commands() -> None:
    for name in marlin_gptq.__all__:
        assert getattr(marlin_gptq, name) is not None
    assert set(marlin_gptq._PLACES) == set(marlin_gptq.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = marlin_gptq.nothing
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(marlin_gptq.COMMANDS) == set(project["scripts"])

"""scripts/reproduce_llama2.sh and the table it ends with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_mmlu import write_subject

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import published_llama2

    return published_llama2


def bash(*arguments: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *map(str, arguments)], capture_output=True, text=True, timeout=600, **more)


def report(perplexity: dict[str, tuple[float, float]], mmlu: tuple[float, float] | None) -> dict[str, Any]:
    comparison = [{"task": "mmlu", "metric": "acc,none", "baseline_value": mmlu[0], "value": mmlu[1]}] if mmlu else []
    return {
        "perplexity": [
            {"dataset": name, "baseline": {"perplexity": base}, "model": {"perplexity": value}}
            for name, (base, value) in perplexity.items()
        ],
        "tasks": {"comparison": comparison},
        "settings": {"limit": None},
    }


def test_the_table(published: Any) -> None:
    ours = report({"wikitext2": (5.1234, 5.2571)}, (0.418, 0.4007))
    lines = published.table({"7B": ours, "tiny": report({"wikitext2": (48.73, 51.88)}, None)}).split("\n")
    assert "| 7B | wikitext2 | 5.12 → 5.26 | 5.12 → 5.27 | +0.13 | +0.15 |" in lines
    assert "| 7B | redpajama | – | 6.14 → 6.30 | – | +0.16 |" in lines
    assert "| 7B | mmlu | 41.80 → 40.07 | 41.80 → 40.07 | -1.73 | -1.73 |" in lines
    assert "| tiny | wikitext2 | 48.73 → 51.88 | – | +3.15 | – |" in lines
    assert len(lines) == 2 + 3 + 3


def test_usage(published: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = SCRIPTS / "reproduce_llama2.sh"
    assert bash("-n", script).returncode == 0
    shown = bash(script, "--help")
    assert shown.returncode == 0 and "--calibration NAME" in shown.stdout and "set -e" not in shown.stdout
    for arguments in (("--nonsense", "x"), ("--limit",), ("llama",)):
        done = bash(script, *arguments, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert published.main([]) == 2
    file = tmp_path / "r.json"
    file.write_text(json.dumps(report({}, None) | {"settings": {"limit": 4}}))
    assert published.main([f"7B={file}"]) == 0
    assert "LIMITED run" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_of_it_on_the_small_model(tiny_llama: Path, tmp_path: Path) -> None:
    beside = Path(sys.executable).parent
    if not (beside / "marlin-eval").exists() and shutil.which("marlin-eval") is None:
        pytest.skip("the commands are not installed")
    write_subject(tmp_path / "mmlu", "anatomy", 3)
    arguments = (
        SCRIPTS / "reproduce_llama2.sh", "--out", tmp_path / "out", "--limit", 2, "--datasets", "wikitext2",
        "--calibration", "demo", "--n-samples", 4, "--data-dir", tmp_path / "mmlu", "--device", "cpu",
        f"tiny={tiny_llama}",
    )  # fmt: skip
    environment = os.environ | {"PATH": f"{beside}{os.pathsep}{os.environ['PATH']}"}
    done = bash(*arguments, env=environment)
    assert done.returncode == 0, done.stderr
    assert "| tiny | mmlu | " in done.stdout and "LIMITED run" in done.stdout
    assert (tmp_path / "out" / "tiny.html").is_file() and (tmp_path / "out" / "tiny.json").is_file()
    again = bash(*arguments, env=environment)
    assert "is there already" in again.stdout and again.returncode == 0

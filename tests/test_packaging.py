"""What gets installed: the library and where its commands begin, its data; pins that cover every dependency."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def normalized(requirement: str) -> str:
    """The name in a requirement, as package indexes compare it."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return {normalized(line): line for line in lines if line and not line.startswith("#")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from the checkout by the backend pyproject.toml names, without the kernel (seconds)."""
    pytest.importorskip("scikit_build_core", reason="needs scikit-build-core")
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", f"import scikit_build_core.build as b; b.build_wheel({str(folder)!r})"],
        cwd=ROOT,
        env=os.environ | {"MARLIN_GPTQ_KERNEL": "off"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_puts_its_own_names_into_site_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    version = PROJECT["project"]["version"]
    assert top == {"marlin_gptq", f"marlin_gptq-{version}.dist-info"}


def test_wheel_serves_every_python_3(wheel: zipfile.ZipFile) -> None:
    assert Path(str(wheel.filename)).name.startswith(f"marlin_gptq-{PROJECT['project']['version']}-py3-none-")


def test_wheel_holds_every_module_and_the_texts(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for folder, inside in [("marlin_gptq", ""), ("kernel", "kernel/"), ("cli", "cli/"), ("eval", "eval/")]:
        for path in (ROOT / folder).rglob("*.py"):
            assert f"marlin_gptq/{inside}{path.relative_to(ROOT / folder).as_posix()}" in names
    for path in (ROOT / "marlin_gptq" / "data").iterdir():
        assert path.name == "__pycache__" or f"marlin_gptq/data/{path.name}" in names


def test_wheel_leaves_sources_of_the_kernel_and_tests_out(wheel: zipfile.ZipFile) -> None:
    wrong = re.compile(r"csrc|\.cuh?$|(^|/)tests/|__pycache__|\.safetensors$")
    assert [name for name in wheel.namelist() if wrong.search(name)] == []


@pytest.mark.parametrize("command", ["marlin-quantize", "marlin-eval"])
def test_commands_are_installed_and_load(command: str) -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    assert entry.value == PROJECT["project"]["scripts"][command]
    assert callable(entry.load())


def test_versions_agree() -> None:
    version = PROJECT["project"]["version"]
    assert importlib.metadata.version("marlin-gptq") == version
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## (\S+)", changelog, flags=re.MULTILINE)
    assert headings and headings[0] == version


def test_importing_the_library_imports_no_heavy_optional_package() -> None:
    code = "import sys, marlin_gptq; print(sorted({'datasets', 'lm_eval', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_source_folders_resolve_under_the_one_name() -> None:
    for name in ("kernel", "cli", "eval"):
        assert importlib.import_module(f"marlin_gptq.{name}").__name__ == f"marlin_gptq.{name}"


def test_every_dependency_is_pinned() -> None:
    project = PROJECT["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    missing = [requirement for requirement in wanted if normalized(requirement) not in pins()]
    assert missing == []


def test_pins_are_plain_public_versions() -> None:
    """No `+cpu`, no addresses, no paths: the same file serves every machine."""
    wrong = [line for line in pins().values() if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    assert wrong == []
    assert pins()["torch"] == "torch==2.13.0"


def test_compiler_wheels_are_one_release() -> None:
    """nvcc alone would pull newer parts, which its compiler check refuses."""
    wheels = [r for r in PROJECT["build-system"]["requires"] if r.startswith("nvidia-")]
    assert sorted(normalized(r.split("==")[0]) for r in wheels) == [
        "nvidia-cuda-cccl",
        "nvidia-cuda-crt",
        "nvidia-cuda-nvcc",
        "nvidia-cuda-runtime",
        "nvidia-nvvm",
    ]
    for requirement in wheels:
        assert re.fullmatch(
            r"[a-z-]+==13\.0\.\d+; sys_platform == 'linux' and platform_machine == 'x86_64'", requirement
        )

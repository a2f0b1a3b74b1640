"""CMakeLists.txt where something is missing, and the reader of the build's log."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="needs cmake")


def configure(source: Path, build: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MARLIN_GPTQ")}
    return subprocess.run(
        [str(CMAKE), "-S", str(source), "-B", str(build)],
        env=environment | settings,
        capture_output=True,
        text=True,
    )


@needs_cmake
@pytest.mark.parametrize(
    "settings, reason, hint",
    [
        (
            {"MARLIN_GPTQ_KERNEL": "off"},
            "the package was built with MARLIN_GPTQ_KERNEL=off.",
            "Reinstall it without that setting.",
        ),
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found.", "apt install g++"),
    ],
)
def test_without_a_kernel_the_reason_is_installed(
    tmp_path: Path, repository: Path, settings: dict[str, str], reason: str, hint: str
) -> None:
    done = configure(repository, tmp_path / "build", **settings)
    assert done.returncode == 0, done.stderr
    assert ("WITHOUT its CUDA kernel" in done.stderr) == ("CXX" in settings)
    subprocess.run([str(CMAKE), "--install", str(tmp_path / "build"), "--prefix", str(tmp_path / "to")], check=True)
    info = json.loads((tmp_path / "to/marlin_gptq/kernel/build_info.json").read_text())
    assert info["kernel"] is False and info["reason"] == reason and hint in info["hint"]
    assert os.listdir(tmp_path / "to/marlin_gptq/kernel") == ["build_info.json"]


@needs_cmake
def test_a_required_kernel_stops_the_build(tmp_path: Path, repository: Path) -> None:
    done = configure(repository, tmp_path, MARLIN_GPTQ_KERNEL="require", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "MARLIN_GPTQ_KERNEL=require, but no C++ compiler was found." in " ".join(done.stderr.split())


@needs_cmake
def test_an_unknown_setting_stops_the_build(tmp_path: Path, repository: Path) -> None:
    done = configure(repository, tmp_path, MARLIN_GPTQ_KERNEL="maybe")
    assert done.returncode != 0
    assert "got 'maybe', expected auto, require or off" in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "scripts" / "check_build_log.py"
    spec = importlib.util.spec_from_file_location("check_build_log", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def entry(dtype: int, tile_m: int, stages: int, grouped: bool, architecture: str, spills: int = 0) -> str:
    name = (
        f"_ZN11marlin_gptq4sm8011gemm_kernelINS_6ConfigILNS_5DTypeE{dtype}ELi{tile_m}ELi{stages}"
        f"ELb{int(grouped)}ELi2EEEEEvNS_10GemmParamsE"
    )
    return (
        f"ptxas info    : Compiling entry function '{name}' for '{architecture}'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    0 bytes stack frame, {spills} bytes spill stores, 0 bytes spill loads\n"
        f"ptxas info    : Used 115 registers, used 1 barriers\n"
    )


def decode_entry(dtype: int, source: int, tile_m: int, groups: int, architecture: str) -> str:
    name = (
        f"_ZN11marlin_gptq4sm9013decode_kernelINS0_12DecodeConfigILNS_5DTypeE{dtype}ELNS0_6SourceE{source}ELi{tile_m}"
        f"ELNS0_6GroupsE{groups}EEEEEvNS_10GemmParamsENS0_4MapsE"
    )
    return (
        f"ptxas info    : Compiling entry function '{name}' for '{architecture}'\n"
        f"    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        f"ptxas info    : Used 110 registers, used 1 barriers\n"
    )


def wgmma_entries(reader: ModuleType, architecture: str) -> str:
    log = ""
    for name in sorted(reader.expected_wgmma(reader.WGMMA_VARIANTS.read_text())):
        _, dtype, tile_m, rows, pairs, groups, zeros = name.split()
        numbers = f"ELi{tile_m[1:]}ELi{rows.removeprefix('rows')}ELi{pairs.removeprefix('pairs')}"
        config = f"{reader.DTYPES.index(dtype)}{numbers}ELNS0_6GroupsE{reader.GROUPS.index(groups)}"
        config += f"ELb{int(zeros == 'zeros')}"
        mangled = f"_ZN11marlin_gptq4sm9012wgmma_kernelINS0_11WgmmaConfigILNS_5DTypeE{config}EEEEEvNS0_11WgmmaParamsE"
        log += (
            f"ptxas info    : Compiling entry function '{mangled}' for '{architecture}'\n"
            f"    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
            f"ptxas info    : Used 168 registers, used 16 barriers\n"
        )
    return log


def good_log(reader: ModuleType, architectures: tuple[str, ...] = ("sm_80", "sm_90a")) -> str:
    log = "".join(f"nvcc -gencode=arch=x,code={arch} " for arch in architectures) + "-c gemm.cu\n"
    for architecture in architectures:
        if architecture == "sm_90a":
            log += wgmma_entries(reader, architecture)
        for name in sorted(reader.expected_kernels(reader.VARIANTS.read_text())):
            family, dtype, tile_m, *rest = name.split()
            if family == "decode":
                groups, source = reader.GROUPS.index(rest[0]), reader.SOURCES.index(rest[2])
                log += decode_entry(reader.DTYPES.index(dtype), source, int(tile_m[1:]), groups, architecture)
                continue
            stages, grouped = rest
            log += entry(
                reader.DTYPES.index(dtype),
                int(tile_m[1:]),
                int(stages.removeprefix("stages")),
                grouped == "grouped",
                architecture,
            )
    return log


def check(reader: ModuleType, tmp_path: Path, text: str, *options: str) -> int:
    (tmp_path / "log").write_text(text)
    return reader.main([str(tmp_path / "log"), *options])


def test_a_good_log_passes(reader: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(reader, tmp_path, good_log(reader), "--archs", "80,90a") == 0
    out = capsys.readouterr().out
    for text in ("gemm bf16 m8 stages5 grouped", "decode f16 m8 unit from blocks", "sm_90a", "115"):
        assert text in out


def test_the_table_of_variants_is_understood(reader: ModuleType) -> None:
    names = reader.expected_kernels(reader.VARIANTS.read_text())
    assert {name.split()[1] for name in names} == {"f16", "bf16"}
    assert {name.split()[2] for name in names} >= {"m8", "m16", "m32"}
    assert {name.split()[0] for name in names} == {"gemm", "decode"}
    assert "decode bf16 m16 part from marlin" in names


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda log: log.replace(" 0 bytes spill stores", " 64 bytes spill stores", 1),
            "64 bytes of registers spilled",
        ),
        (
            lambda log: log.replace("    0 bytes stack frame", "    640 bytes stack frame", 1),
            "an array of 640 bytes in local memory",
        ),
        (lambda log: log + "ptxas info : (C7514) Potential Performance Loss: wgmma serialized\n", "(C7514)"),
        (lambda log: log.replace("for 'sm_80'", "for 'sm_75'"), "sm_80: not compiled"),
        (lambda log: log.replace("DTypeE1", "DTypeE0"), "not compiled: decode bf16"),
        (lambda log: log.replace("Used 115 registers", "Used"), "does not say what it uses"),
        (lambda log: log.replace("ELi128ELi2ELi1E", "ELi128ELi3ELi1E"), "not compiled: wgmma bf16 m128 rows2 pairs1"),
        (lambda log: "", "no nvcc command names an architecture"),
        (lambda log: "nvcc -gencode=arch=x,code=sm_80 -c gemm.cu\n", "sm_80: not compiled"),
    ],
)
def test_a_bad_log_fails(
    reader: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: object, message: str
) -> None:
    assert callable(spoil)
    assert check(reader, tmp_path, spoil(good_log(reader))) == 1
    assert message in capsys.readouterr().err


def test_an_architecture_asked_for_must_be_there(
    reader: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(reader, tmp_path, good_log(reader), "--archs", "80,120a") == 1
    assert "sm_120a: not compiled" in capsys.readouterr().err

"""The arrows of docs/design.md, read from the imports of every file: no layer knows a higher one."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"marlin_gptq": ROOT / "marlin_gptq"} | {
    f"marlin_gptq.{name}": ROOT / name for name in ("kernel", "cli", "eval")
}

# The layers, highest first. A part may import itself and every part of a lower layer, none beside or above
# it. A module belongs to the part with the longest name that begins its own; "marlin_gptq" is what no other
# part claims: __init__, pipeline and what writes the finished directory.
LAYERS = [
    {"marlin_gptq.cli"},
    {"marlin_gptq.eval"},
    {"marlin_gptq"},
    {"marlin_gptq.modeling", "marlin_gptq.calibration"},
    {
        "marlin_gptq.kernel",
        "marlin_gptq.quantization",
        "marlin_gptq.formats",
        "marlin_gptq.checkpoint",
        "marlin_gptq.checkpoint_writer",
        "marlin_gptq.text_sources",
    },
    {
        "marlin_gptq.config",
        "marlin_gptq.costs",
        "marlin_gptq.text_files",
        "marlin_gptq.model_directory",
        "marlin_gptq.placement",
    },
    {"marlin_gptq.destination"},
    {"marlin_gptq.disk"},
    {"marlin_gptq.errors", "marlin_gptq.near_names"},
]
PARTS = {part: depth for depth, layer in enumerate(LAYERS) for part in layer}
# Imported only inside functions: quantizing needs neither, and importing the library stays quick.
LAZY = {"datasets", "lm_eval", "matplotlib", "peft"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def module_name(path: Path) -> str:
    """kernel/library.py → marlin_gptq.kernel.library; a package's __init__.py carries the package's name."""
    for name, folder in SOURCES.items():
        if path.is_relative_to(folder):
            inner = path.relative_to(folder).with_suffix("").parts
            return ".".join([name, *(p for p in inner if p != "__init__")])
    raise AssertionError(path)


def part_of(module: str) -> str:
    """The entry of LAYERS a module belongs to."""
    return max((p for p in PARTS if module == p or module.startswith(p + ".")), key=len)


def may_import(part: str, other: str) -> bool:
    return part == other or PARTS[part] < PARTS[other]


def type_checking_only(tree: ast.AST) -> set[int]:
    """The ids of nodes under `if TYPE_CHECKING:`; they import nothing when the program runs."""
    return {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }


def imports(tree: ast.AST, *, top_level: bool = False) -> list[tuple[int, str]]:
    """(line, module name) of every import; `from a import b` gives a.b if that is a module here, else a."""
    skipped = type_checking_only(tree) if top_level else set()
    if top_level:
        skipped |= {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for inner in ast.walk(node)
        }
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; this project imports absolutely"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in MODULES else node.module or "") for name in inner]
    return found


FILES = sorted(p for folder in SOURCES.values() for p in folder.rglob("*.py"))
MODULES = {module_name(p) for p in FILES}


PURE = [p for p in FILES if part_of(module_name(p)) in ("marlin_gptq.quantization", "marlin_gptq.formats")]
NOT_CLI = [p for p in FILES if part_of(module_name(p)) != "marlin_gptq.cli"]


def each(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", files, ids=lambda path: str(path.relative_to(ROOT)))


@each(FILES)
def test_a_part_imports_only_what_lies_below_it(file: Path) -> None:
    part = part_of(module_name(file))
    wrong = [
        f"line {line}: {name}"
        for line, name in imports(ast.parse(file.read_text("utf-8")))
        if name.split(".")[0] == "marlin_gptq" and not may_import(part, part_of(name))
    ]
    assert not wrong, f"{file.relative_to(ROOT)} is part of {part} and may not import {wrong}"


@each(FILES)
def test_nothing_imports_the_source_folders_by_their_short_names(file: Path) -> None:
    """In an editable install `import kernel` would work, in a wheel it would not."""
    short = {"kernel", "cli", "eval", "tests", "scripts"}
    wrong = [name for _, name in imports(ast.parse(file.read_text("utf-8"))) if name.split(".")[0] in short]
    assert not wrong


@each(PURE)
def test_algorithms_and_formats_know_no_transformers(file: Path) -> None:
    outside = {name.split(".")[0] for _, name in imports(ast.parse(file.read_text("utf-8")))}
    assert not outside & {"transformers", "accelerate", "safetensors", "datasets"}


@each(FILES)
def test_heavy_optional_packages_are_imported_where_used(file: Path) -> None:
    wrong = [
        f"line {line}: {name}"
        for line, name in imports(ast.parse(file.read_text("utf-8")), top_level=True)
        if name.split(".")[0] in LAZY
    ]
    assert not wrong, f"{file.relative_to(ROOT)}: import inside the function that needs it: {wrong}"


@each(NOT_CLI)
def test_only_the_command_line_reads_the_environment(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        name = getattr(node, "attr", None) or getattr(node, "name", None)  # os.environ; from os import environ
        assert name not in ENVIRONMENT, f"{file.relative_to(ROOT)} line {getattr(node, 'lineno', 0)}: {name}"


def test_kernel_sources_use_no_torch_headers() -> None:
    suffixes = {".cu", ".cuh", ".h", ".cpp", ".hpp"}
    sources = [path for path in (ROOT / "kernel" / "csrc").rglob("*") if path.suffix in suffixes]
    assert sources
    for path in sources:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            wrong = line.lstrip().startswith("#include") and any(
                f"{opening}{folder}/" in line for opening in '<"' for folder in ("torch", "ATen", "c10")
            )
            assert not wrong, f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_every_folder_of_the_house_was_walked() -> None:
    """A renamed folder must not make the tests above pass by walking nothing."""
    assert {part_of(module_name(path)) for path in FILES} == set(PARTS)


@pytest.mark.parametrize("before", [True, False])
def test_importing_leaves_the_garbage_collector_as_it_was(before: bool) -> None:
    switch = "enable" if before else "disable"
    program = f"import gc; gc.{switch}(); import marlin_gptq; print(gc.isenabled())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(before)

"""Documents are checked, not promised: the README's tree, commands and options against what is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from marlin_gptq.config import DEFAULT_PRESET, QuantizationConfig
from marlin_gptq.modeling.outline import outline
from marlin_gptq.overrides import read_overrides, require_matches

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"]
DOCUMENTS += ["docs/design.md", "docs/evaluation.md", "docs/serving.md", "docs/accuracy.md"]
COMMANDS = ("marlin-quantize", "marlin-eval", "marlin-generate", "marlin-convert", "marlin-inspect")


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Every file git knows, and new ones it does not ignore (so that the check comes before the commit)."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def section(title: str, text: str = README) -> str:
    """The text under one `## ` heading."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert match, f"no section {title!r}"
    return match[1]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def shell_commands(text: str) -> list[str]:
    """Command lines in the ```sh blocks, continuation lines joined, comments and prompts gone."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}


def every_option(command: click.Command) -> set[str]:
    """The options of a command and of its subcommands."""
    found = options_of(command) | {"--help"}
    for child in getattr(command, "commands", {}).values():
        found |= every_option(child)
    return found


def load(name: str) -> click.Command:
    (entry,) = entry_points(group="console_scripts", name=name)
    command = entry.load()
    assert isinstance(command, click.Command)
    return command


def test_tree_names_what_git_tracks(tracked: list[str]) -> None:
    """Every path in the README's tree exists, and every top-level entry of the repository stands in it."""
    (tree, *_) = code_blocks(section("The tree"))
    named: set[str] = set()
    parents: list[str] = []
    for line in tree.splitlines():
        entries, indent = line.split("  #")[0], len(line) - len(line.lstrip())
        for name in entries.split():
            parents[indent // 2 :] = [name.rstrip("/")] if name.endswith("/") else []
            path = "/".join([*parents[: indent // 2], name.rstrip("/")])
            named.add(path)
            assert any(f == path or f.startswith(path + "/") for f in tracked), f"README's tree names {path}"
    top = {name.split("/")[0] for name in tracked}
    assert top - {name for name in named if "/" not in name} == set()
    for folder in ("marlin_gptq", "kernel", "cli", "eval"):
        inside = {"/".join(f.split("/")[:2]) for f in tracked if f.startswith(folder + "/")}
        inside = {name for name in inside if not name.endswith("/__init__.py")}
        assert inside - named == set(), f"missing in the README's tree under {folder}/"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_in_documents_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    for line in (ROOT / document).read_text("utf-8").splitlines():
        for command in re.findall(r"(?:^|`)make ([a-z][a-z -]*)", line):
            assert set(command.split()) <= targets, line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_files_in_documents_exist(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), f"{document} links {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_name_real_options(document: str) -> None:
    known = {name: every_option(load(name)) for name in COMMANDS}
    for command in shell_commands((ROOT / document).read_text("utf-8")):
        words = command.split()
        if words[0] in COMMANDS:
            ours = words[: words.index("--")] if "--" in words else words  # after `--`: lm-eval's own options
            used = {word.split("=")[0] for word in ours if re.match(r"--?[a-z]", word)}
            assert used <= known[words[0]], command


def test_subcommands_in_the_readme_exist() -> None:
    evaluate = load("marlin-eval")
    assert isinstance(evaluate, click.Group)
    used = {line.split()[1] for line in shell_commands(README) if line.startswith("marlin-eval ")}
    assert used and used <= set(evaluate.commands)


def test_options_table_is_the_help() -> None:
    """Every option of marlin-quantize has its row, and every row names a real option."""
    rows = set(re.findall(r"^\| `(--?[a-z-]+)", section("Options of marlin-quantize"), flags=re.MULTILINE))
    long = {max(p.opts, key=len) for p in load("marlin-quantize").params if isinstance(p, click.Option)}
    assert rows == long - {"--help", "--version"}


def test_documents_name_the_default_preset() -> None:
    """Whoever changes the constant is led to the places that speak of it."""
    assert f"The default recipe is `--preset {DEFAULT_PRESET}`" in README
    assert re.search(rf"^\| `--preset` \| {DEFAULT_PRESET} \|", README, flags=re.MULTILINE)
    accuracy, changelog = (ROOT / name for name in ("docs/accuracy.md", "CHANGELOG.md"))
    assert re.findall(r"`(\w+)` \(default\)", accuracy.read_text("utf-8")) == [DEFAULT_PRESET]
    assert re.findall(r"`(\w+)` \(default\)", changelog.read_text("utf-8")) == [DEFAULT_PRESET]
    text = " ".join(CliRunner().invoke(load("marlin-quantize"), ["--help"]).stdout.split())
    assert f"[default: {DEFAULT_PRESET}]" in text


def test_the_first_config_sample_is_for_a_dense_model(tiny_llama: Path, tmp_path: Path) -> None:
    """As printed, with experts in a sample of their own: a line that matches nothing is an error."""
    sample, experts = re.findall(r"^```yaml\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "over.yaml").write_text(sample)
    dense = [linear.name for block in outline(tiny_llama, QuantizationConfig()).blocks for linear in block.linears]
    require_matches(QuantizationConfig(overrides=read_overrides(tmp_path / "over.yaml")), dense, [])
    (tmp_path / "experts.yaml").write_text(experts)
    assert read_overrides(tmp_path / "experts.yaml")[0].group_size == 32


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_something_about_every_option(command: str) -> None:
    result = CliRunner().invoke(load(command), ["--help"])
    assert result.exit_code == 0
    for parameter in load(command).params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{command} {parameter.opts}: no help text"


def test_tracked_files_name_no_machine_paths(tracked: list[str]) -> None:
    # written in two halves, so that this file does not find itself
    private = re.compile("|".join("/" + folder + "/" for folder in ("work", "root", "farm", "home", "tmp")))
    for name in tracked:
        data = (ROOT / name).read_bytes()
        if b"\0" in data or name.startswith("marlin_gptq/data/"):
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
            assert not re.search(rf"(^|[\s\"'`=(:])({private.pattern})", line), f"{name}:{number}: {line.strip()}"


def test_no_cell_of_the_claim_table_is_left_open() -> None:
    assert "TBD" not in README

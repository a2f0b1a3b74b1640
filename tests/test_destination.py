"""destination.py: what may be written, decided before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from marlin_gptq import destination
from marlin_gptq.destination import is_mount, require_destination, require_work_directory
from marlin_gptq.errors import InputError

MADE_BY_WRITERS = """
config.json generation_config.json model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json
pytorch_model.bin pytorch_model-00001-of-00003.bin pytorch_model.bin.index.json gptq_model-4bit-128g.safetensors
consolidated.safetensors consolidated.00.pth tf_model.h5 flax_model.msgpack model.fp16.safetensors
tokenizer.json tokenizer.model tokenizer.model.v3 tekken.json tokenizer_config.json special_tokens_map.json
added_tokens.json vocab.json vocab.txt merges.txt spiece.model sentencepiece.bpe.model qwen.tiktoken chat_template.jinja
chat_template.json preprocessor_config.json quantize_config.json quant_config.json configuration.json
modeling_own.py configuration_own.py tokenization_own.py README.md LICENSE LICENSE.txt NOTICE.md USE_POLICY.md
.gitattributes quantize_log.json quant_log.csv recipe.yaml
"""
OF_A_USER = """
notes.txt thesis.tex results.json calib.jsonl report.html model.safetensors.bak model_backup.safetensors train.py
adapter_model.safetensors optimizer.pt training_args.bin tasks.json weights.npz mymodel.safetensors .env
"""


def model(directory: Path, *more: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", *more):
        (directory / name).write_text(name)
    return directory


def refused(output: Path, overwrite: bool = True, **options: Any) -> str:
    with pytest.raises(InputError) as told:
        require_destination(output, overwrite=overwrite, **({"inputs": {}} | options))
    return str(told.value)


def allowed(output: Path, overwrite: bool = True, **options: Any) -> None:
    require_destination(output, overwrite=overwrite, **({"inputs": {}} | options))


def test_a_model_directory_is_replaced(tmp_path: Path) -> None:
    out = model(tmp_path / "out", *MADE_BY_WRITERS.split())
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "tool.jinja").touch()
    allowed(out)
    assert (
        refused(out, overwrite=False) == f"{out}: exists already; give another --output, or --overwrite to replace it"
    )


@pytest.mark.parametrize("name", OF_A_USER.split())
def test_but_not_with_a_file_that_no_model_has(tmp_path: Path, name: str) -> None:
    out = model(tmp_path / "out", name)
    assert refused(out).startswith(f"{out}: holds {name} beside a model; --overwrite replaces only a model directory")


def test_nor_with_folders(tmp_path: Path) -> None:
    for name in (".git", "model.safetensors.d", "LICENSE", "zoo"):
        out = model(tmp_path / f"with {name}")
        (out / name).mkdir()
        assert f"holds {name} beside a model" in refused(out)
    out = model(tmp_path / "out")
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "notes.txt").touch()
    assert "holds additional_chat_templates beside" in refused(out)
    many = model(tmp_path / "many", *"abcde")
    assert "holds a, b, c and 2 more beside a model" in refused(many)


def test_nor_where_there_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "config.json").touch()
    message = "and is no model directory (config.json and weights); --overwrite replaces only a model directory"
    assert f"holds config.json {message}" in refused(tmp_path / "settings")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").touch()
    assert f"holds model.safetensors {message}" in refused(tmp_path / "weights")
    assert f"holds settings, weights {message}" in refused(tmp_path)


def test_a_copy_of_what_the_model_has_is_no_loss(tmp_path: Path) -> None:
    source, out = model(tmp_path / "source", "notes.txt"), model(tmp_path / "out", "notes.txt")
    allowed(out, inputs={"the model": source})
    (out / "notes.txt").write_text("edited")
    assert "holds notes.txt beside a model" in refused(out, inputs={"the model": source})


def test_what_is_read_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path / "zoo" / "deep" / "base")
    (tmp_path / "shortcut").symlink_to(source)
    (tmp_path / "else").mkdir()
    for overwrite in (True, False):
        for path in (source, tmp_path / "shortcut"):
            inputs = {"the model": path}
            for out in (tmp_path / "zoo", tmp_path / "else" / ".." / "zoo", tmp_path):
                assert f"{out}: holds the model ({path})" in refused(out, overwrite, inputs=inputs)
            for out in (source, tmp_path / "shortcut"):
                assert "is the model itself; give another --output" in refused(out, overwrite, inputs=inputs)
    monkeypatch.chdir(source)
    assert "holds the model" in refused(Path(".."), inputs={"the model": source})
    assert "is the model itself" in refused(Path("."), inputs={"the model": source})
    allowed(source / "quantized", inputs={"the model": source})  # beside its files: nothing of them is touched
    text = tmp_path / "texts" / "calib.jsonl"
    text.parent.mkdir()
    text.touch()
    assert "holds the --dataset" in refused(text.parent, inputs={"the --dataset": text})
    allowed(tmp_path / "new", inputs={"the model": Path("no/such"), "the --dataset": text})


def test_places_that_can_be_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed(tmp_path / "new", overwrite=False)
    allowed(tmp_path / "deep" / "new", overwrite=False)
    (tmp_path / "empty").mkdir()
    allowed(tmp_path / "empty", overwrite=False)
    (tmp_path / "dangling").symlink_to("big/one")
    allowed(tmp_path / "dangling", overwrite=False)
    monkeypatch.chdir(tmp_path / "empty")
    allowed(Path("."), overwrite=False)
    monkeypatch.setattr(destination, "is_mount", lambda _: True)
    (tmp_path / "empty" / "lost+found").mkdir()
    allowed(tmp_path / "empty", overwrite=False)


def test_places_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert "file: is a file; give a directory as --output" in refused(tmp_path / "file")
    assert f"cannot be made, {tmp_path / 'file'} is a file" in refused(tmp_path / "file" / "out")
    (tmp_path / "circle").symlink_to("circle")
    assert "a link that leads in a circle" in refused(tmp_path / "circle")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert f"link (a link to {tmp_path / 'file'}): is a file" in refused(tmp_path / "link")
    assert "exists already" in refused(Path("/"), overwrite=False)
    assert "/: holds" in refused(Path("/"))
    out = model(tmp_path / "out")
    monkeypatch.chdir(out)
    assert "holds the current directory" in refused(Path("."))
    assert "holds the current directory" in refused(out)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(destination, "is_mount", lambda _: True)
        assert "is a mount point with files in it, which cannot be replaced; give a folder in it" in refused(out)
    with monkeypatch.context() as patched:
        tmp_path.chmod(0o1777)
        patched.setattr(os, "geteuid", lambda: os.getuid() + 12345)
        assert "out: belongs to another user, so it cannot be replaced" in refused(out)
        tmp_path.chmod(0o755)
        allowed(out)
    closed = {tmp_path}
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) not in closed)
    for path in (out, tmp_path / "new", tmp_path / "deep" / "new"):
        assert refused(path).startswith(f"{path}: cannot be made, {tmp_path} cannot be written to")
    (tmp_path / "empty").mkdir()
    allowed(tmp_path / "empty")
    closed.add(tmp_path / "empty")
    assert "empty cannot be written to" in refused(tmp_path / "empty")


def test_a_tilde_that_the_shell_left_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/users/me")
    assert (
        refused(Path("~/out"))
        == "--output ~/out: the shell left ~ as it is (quotes, or --output=~); write /users/me/out"
    )
    with pytest.raises(InputError, match=r"--work-dir ~/work: the shell left .*; write /users/me/work"):
        require_work_directory(Path("~/work"), Path("out"), Path("model"))
    require_destination(Path("~out"), overwrite=False, inputs={})


def test_mounts_are_known(tmp_path: Path) -> None:
    assert is_mount(Path("/")) and not is_mount(tmp_path)
    if Path("/proc/self/mountinfo").exists():
        assert is_mount(Path("/proc"))


def test_files_are_replaced_by_files_of_their_kind(tmp_path: Path) -> None:
    import torch

    file = tmp_path / "model.marlin"
    torch.save({}, file)
    allowed(file, file=True)
    assert "exists already" in refused(file, overwrite=False, file=True)
    assert "is the model itself" in refused(file, file=True, inputs={"the model": file})
    assert "is a directory; the original format is one file" in refused(model(tmp_path / "out"), file=True)
    (tmp_path / "thesis.tex").write_text("mine")
    assert "is no torch state dict; --overwrite replaces nothing else" in refused(tmp_path / "thesis.tex", file=True)
    base = model(tmp_path / "base")
    torch.save({}, base / "pytorch_model.bin")
    inputs = {"the base model": base}
    assert "is a file of the base model" in refused(base / "pytorch_model.bin", file=True, inputs=inputs)


def test_work_directories_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path / "zoo" / "base")
    monkeypatch.chdir(tmp_path)
    out, end = Path("out"), "; give a directory of its own"
    for work, found in (
        ("out", "is --output itself"),
        ("./x/../out", "is --output itself"),
        ("out/work", "lies in --output out"),
        (".", "holds --output out"),
        ("zoo", f"holds the model {source}"),
        ("zoo/base", "is the model itself"),
    ):
        with pytest.raises(InputError) as told:
            require_work_directory(Path(work), out, source)
        assert str(told.value) == f"--work-dir {Path(work)}: {found}{end}"
    require_work_directory(Path("zoo/work"), out, source)
    require_work_directory(Path("work"), out, Path("owner/name"))

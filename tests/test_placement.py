"""placement.py: a result in its place, and nothing lost for it, however and whenever a run ends."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from marlin_gptq import placement
from marlin_gptq.destination import LOCK
from marlin_gptq.errors import InputError
from marlin_gptq.placement import Placement, TakenError, recover

FILES = ("config.json", "model.safetensors", "tokenizer.json")
RENAMES = ("rename", "link", "unlink")


def write(directory: Path, text: str) -> Path:
    """A model directory, all of whose files hold `text`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (directory / name).write_text(text)
    return directory


def put(output: Path, text: str = "new", meanwhile: Callable[[], Any] = lambda: None, overwrite: bool = True) -> None:
    """A run that writes such a directory."""
    with Placement(output, overwrite=overwrite, inputs={}) as place:
        write(place.new, text)
        meanwhile()
        place.finish()


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def model(text: str, name: str = "out") -> dict[str, str]:
    return {f"{name}/{file}": text for file in FILES}


BEFORE: dict[str, Callable[[Path], Any]] = {
    "absent": lambda out: None,
    "empty": lambda out: out.mkdir(),
    "replaced": lambda out: write(out, "old"),
}


@pytest.mark.parametrize("before", BEFORE)
def test_in_its_place(tmp_path: Path, before: str) -> None:
    out = tmp_path / "out"
    BEFORE[before](out)
    inode = out.stat().st_ino if before == "empty" else None
    put(out, overwrite=before == "replaced")
    assert content(tmp_path) == model("new") and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert inode is None or out.stat().st_ino == inode, "an empty directory is written into: rights, quotas, mounts"


@pytest.mark.parametrize("before", BEFORE)
def test_killed_at_any_moment_of_putting_it_there(tmp_path: Path, before: str) -> None:
    """The next run finds what stood there, or the result, whole, and no leftovers."""
    for moment in count(1):
        folder = tmp_path / str(moment)
        folder.mkdir()
        BEFORE[before](folder / "out")
        if not killed_at(moment, folder / "out"):
            break
        assert moment > 1 or list(folder.rglob(LOCK)), "something is left"
        recover(folder / "out")
        assert content(folder) in (model("new"), model("old") if before == "replaced" else {}), moment
        assert [path.name for path in folder.iterdir()] in (["out"], []), moment
        put(folder / "out", "newer")
        assert content(folder) == model("newer")
    assert moment > 2


def killed_at(moment: int, output: Path) -> bool:
    """Whether a run in a child process was killed before its n-th rename."""
    child = os.fork()
    if child == 0:
        calls = count(1)

        def fatal(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if next(calls) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        for name in RENAMES:
            setattr(os, name, fatal(getattr(os, name)))
        put(output)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("before", BEFORE)
def test_interrupted_at_any_moment(tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for moment in count(1):
        folder, calls = tmp_path / str(moment), count(1)
        folder.mkdir()
        BEFORE[before](folder / "out")

        def interrupted(real: Callable[..., Any], moment: int = moment, calls: count = calls) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if next(calls) == moment:
                    raise KeyboardInterrupt
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patched:
            for name in (*RENAMES, "rmdir"):
                patched.setattr(os, name, interrupted(getattr(os, name)))
            try:
                put(folder / "out")
                break
            except KeyboardInterrupt:
                pass
        assert content(folder) in (model("new"), model("old") if before == "replaced" else {}), moment
        assert not list(folder.glob(".*"))
    assert moment > 2


# ---- what comes to be meanwhile


def test_a_place_that_is_taken_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def mine() -> None:
        out.mkdir()
        (out / "precious.txt").write_text("only copy")

    with pytest.raises(
        TakenError, match=r"out: has come to be while this ran; it stays as it is, .* is .*/out\.result"
    ):
        put(out, meanwhile=mine)
    assert content(tmp_path) == model("new", "out.result") | {"out/precious.txt": "only copy"}
    (out / "precious.txt").unlink()
    with pytest.raises(TakenError, match=r"has come to hold something while this ran; .* is .*/out/out\.result"):
        put(out, meanwhile=lambda: (out / "precious.txt").write_text("again"))
    assert content(out) == model("new", "out.result") | {"precious.txt": "again"}


@pytest.mark.parametrize("what", ["file", "link"])
def test_whatever_takes_it(tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(TakenError, match="has come to be"):
        put(out, meanwhile=lambda: out.write_text("mine") if what == "file" else out.symlink_to("nowhere"))
    assert (out.read_text() == "mine") if what == "file" else out.is_symlink()


def test_a_file_added_to_what_is_replaced(tmp_path: Path) -> None:
    out = write(tmp_path / "out", "old")
    with pytest.raises(TakenError, match=r"holds notes\.txt beside a model now; it stays as it is"):
        put(out, meanwhile=lambda: (out / "notes.txt").write_text("mine"))
    assert content(tmp_path) == model("old") | {"out/notes.txt": "mine"} | model("new", "out.result")


def test_two_runs_of_one_output(tmp_path: Path) -> None:
    """The first that is done has it; neither touches what the other writes."""
    out = write(tmp_path / "out", "old")
    with pytest.raises(TakenError):
        put(out, "slow", meanwhile=lambda: put(out, "quick"))
    assert content(tmp_path) == model("quick") | model("slow", "out.result")
    with pytest.raises(TakenError):
        put(out, "slower", meanwhile=lambda: put(out, "quicker"))
    assert content(tmp_path) == model("quicker") | model("slow", "out.result") | model("slower", "out.result-2")


def test_what_another_run_writes_into_the_output_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Placement(tmp_path / "out", overwrite=False, inputs={}) as slow:
        write(slow.new, "slow")
        put(tmp_path / "out", "quick")
        with pytest.raises(InputError, match=r"out: holds \.out\.partial-.* beside a model"):
            put(tmp_path / "out", "third")
        with pytest.raises(TakenError, match=r"the finished result is .*/out/out\.result"):
            slow.finish()
    assert content(tmp_path / "out") == dict.fromkeys(FILES, "quick") | model("slow", "out.result")


def test_both_are_kept_if_a_place_is_taken_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path / "out", "old")

    def taken(*_: Any) -> str:
        write(out, "other")
        return ""

    monkeypatch.setattr(placement, "not_replaceable", lambda directory, _: taken() if directory.name == "old" else "")
    with pytest.raises(TakenError, match=r"what was to be replaced is .*/out\.old\); .* is .*/out\.result"):
        put(out)
    assert content(tmp_path) == model("other") | model("old", "out.old") | model("new", "out.result")


# ---- leftovers


def leftover(folder: Path, **names: str) -> Path:
    folder.mkdir(parents=True)
    (folder / LOCK).touch()
    for name, text in names.items():
        write(folder / name, text)
    return folder


def test_what_was_moved_aside_is_never_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody made OUT anew after a kill between the two renames."""
    write(tmp_path / "out", "another")
    leftover(tmp_path / ".out.partial-abcdefgh", old="old", ready="ready")
    recover(tmp_path / "out")
    assert content(tmp_path) == model("another") | model("old", "out.old")
    assert "what a killed run was about to replace there is" in caplog.text


def test_what_only_looks_like_a_leftover_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folders = [".out.partial-abc", ".out.partial-ABCDEFGH", ".outer.partial-abcdefgh", "out.partial-abcdefgh"]
    for name in folders:
        leftover(tmp_path / name, new="x")
    (leftover(tmp_path / ".out.partial-with_els") / "notes.txt").write_text("mine")
    write(tmp_path / ".out.partial-no__lock", "mine")
    (tmp_path / ".out.partial-a___file").write_text("mine")
    (tmp_path / ".out.partial-a___link").symlink_to(tmp_path / ".out.partial-abc")
    before = content(tmp_path)
    put(out)
    assert content(tmp_path) == before | model("new")


def test_what_a_live_run_writes_stays(tmp_path: Path) -> None:
    with Placement(tmp_path / "out", overwrite=False, inputs={}) as place:
        write(place.new, "live")
        recover(tmp_path / "out")
        assert content(place.new) == dict.fromkeys(FILES, "live")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover(tmp_path / ".out.partial-abcdefgh", new="x")

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    put(tmp_path / "out")
    assert content(tmp_path / "out") == dict.fromkeys(FILES, "new")
    assert (tmp_path / ".out.partial-abcdefgh").exists(), "it may be in use"


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "out").mkdir()
    put(tmp_path / "out")
    assert content(tmp_path) == model("new")


def test_directories_made_for_nothing_are_removed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError):
        put(tmp_path / "there" / "a" / "b" / "out", meanwhile=lambda: 1 / 0)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    put(tmp_path / "there" / "a" / "b" / "out")
    assert (tmp_path / "there" / "a" / "b" / "out" / "config.json").exists()


def test_links_and_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("big/one")
    for text in ("new", "newer"):
        put(tmp_path / "link", text)
        assert content(tmp_path / "big") == model(text, "one")
        assert (tmp_path / "link").is_symlink() and [p.name for p in (tmp_path / "big").iterdir()] == ["one"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    put(Path("."))
    assert content(tmp_path / "here") == dict.fromkeys(FILES, "new")


def test_one_file(tmp_path: Path) -> None:
    import torch

    def save(overwrite: bool, meanwhile: Callable[[], Any] = lambda: None) -> None:
        with Placement(tmp_path / "file", overwrite=overwrite, inputs={}, file=True) as place:
            torch.save({}, place.new)
            meanwhile()
            place.finish()

    save(False)
    first = (tmp_path / "file").stat().st_ino
    with pytest.raises(InputError, match="exists already"):
        save(False)
    save(True)
    assert (tmp_path / "file").stat().st_ino != first
    (tmp_path / "file").unlink()
    with pytest.raises(TakenError, match="has come to be while this ran"):
        save(True, lambda: (tmp_path / "file").write_text("mine"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.result"]
    assert (tmp_path / "file").read_text() == "mine"

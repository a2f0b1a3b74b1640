"""result_files.py: results are written over results, and over nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marlin_gptq.errors import InputError
from marlin_gptq.eval.report import empty_report, finish
from marlin_gptq.eval.report_html import page
from marlin_gptq.eval.result_files import is_result, require_as_asked, require_result_file, write_json, write_text
from marlin_gptq.eval.task_record import TaskRecord

RESULT = {"complete": False, "settings": {}, "versions": {}}


def refused(file: Path) -> str:
    with pytest.raises(InputError) as told:
        require_result_file(file)
    return str(told.value)


def test_what_results_are(tmp_path: Path) -> None:
    content = empty_report("model", None, {"device": "cpu"}, {})
    finish(content, complete=True)
    assert is_result(write_text(tmp_path / "report.html", page(content)))
    assert is_result(write_json(tmp_path / "report.json", content))

    class Suite:
        notes: tuple[str, ...] = ()

    assert is_result(write_json(tmp_path / "tasks.json", TaskRecord(Suite(), {}, {}).to_dict()))  # type: ignore[arg-type]
    (tmp_path / "empty").touch()
    (tmp_path / "dangling").symlink_to("new")
    for name in ("report.html", "report.json", "tasks.json", "empty", "dangling", "absent.json"):
        require_result_file(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["only copy", '{"complete": true}', "[1]", "<!doctype html><title>mine</title>", '{"a": \ud83d', "\ufffd{"]
)
@pytest.mark.parametrize("name", ["report.html", "tasks.json", "thesis.tex"])
def test_what_they_are_not(tmp_path: Path, text: str, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert refused(file) == f"{file}: exists and is no result of marlin-eval, so it stays; give another --output"


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "its directory does not exist" in refused(tmp_path / "no" / "report.html")
    assert "exists and is no result" in refused(Path("/dev/null"))
    (tmp_path / "circle").symlink_to("circle")
    assert "exists and is no result" in refused(tmp_path / "circle")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "its directory cannot be written to" in refused(tmp_path / "report.html")


def test_a_file_that_comes_to_be_meanwhile_stays(tmp_path: Path) -> None:
    file = tmp_path / "tasks.json"
    assert write_json(file, RESULT) == file and write_json(file, RESULT) == file
    file.write_text("only copy")
    other = write_json(file, RESULT)
    assert other == tmp_path / "tasks-2.json" and file.read_text() == "only copy"
    assert write_json(other, RESULT) == other
    require_as_asked(file, file)
    with pytest.raises(
        InputError, match=r"tasks\.json: has come to be while .*, so it stays; the results are .*-2\.json"
    ):
        require_as_asked(file, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tasks-2.json", "tasks.json"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to("there.json")
    for _ in range(2):
        write_json(tmp_path / "link.json", RESULT)
        assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "there.json").read_text()) == RESULT

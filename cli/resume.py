"""--work-dir and --resume: the arguments a run was started with, kept and compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from marlin_gptq.errors import InputError
from marlin_gptq.overrides import read_overrides

if TYPE_CHECKING:
    from marlin_gptq.work_directory import WorkDirectory

# They may differ when a run goes on: none of them changes the result.
FREE = {"as_json", "debug", "offline", "overwrite", "resume", "work_dir", "dry_run", "gpu", "spill", "processes"}


def options_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a run depends on, as plain JSON: paths absolute, the file of --config read."""
    options = {name: value for name, value in arguments.items() if name not in FREE}
    if options["model"] is not None and Path(options["model"]).is_dir():
        options["model"] = str(Path(options["model"]).resolve())
    if options["output"] is not None:
        options["output"] = str(Path(options["output"]).absolute())
    file = options.pop("config_file")
    options["overrides"] = [asdict(rule) for rule in read_overrides(file)] if file else []
    options["skip"] = list(options["skip"])
    return options


def resumed(context: click.Context, arguments: dict[str, Any]) -> tuple[WorkDirectory, dict[str, Any]]:
    """(work directory, the arguments its run was started with). InputError naming an argument that differs."""
    directory: Path = arguments["resume"]
    if arguments["work_dir"] is not None and arguments["work_dir"].absolute() != directory.absolute():
        raise InputError(f"--work-dir: got {arguments['work_dir']} beside --resume {directory}; leave it out")
    given = options_of(arguments)
    from marlin_gptq.work_directory import WorkDirectory

    work = WorkDirectory.resume(directory)
    try:
        stored, settings = work.arguments["options"], work.arguments["settings"]
        for parameter in context.command.params:
            name = parameter.name or ""
            if name in FREE or context.get_parameter_source(name) != ParameterSource.COMMANDLINE:
                continue
            key = "overrides" if name == "config_file" else name
            then = stored.get(key)
            if then is None:  # what was left to the preset stands in the settings that came of it
                then = settings.get("damp_percent" if name == "damp" else name)
            if given[key] != then:
                raise InputError(
                    f"{_called(parameter)}: got {_shown(given[key])}, but the run in {directory} was started with "
                    f"{_shown(then)}; leave it out to go on, or start anew with another --work-dir"
                )
    except (InputError, KeyError):
        work.close()
        raise
    free = {name: value for name, value in arguments.items() if name in FREE}
    kept = {name: value for name, value in stored.items() if name != "overrides"}
    return work, free | kept | {"output": Path(stored["output"]), "config_file": None}


@contextmanager
def keeping(
    work: WorkDirectory | None, directory: Path | None, arguments: dict[str, Any]
) -> Iterator[WorkDirectory | None]:
    """The work directory of a resumed run, or a new one in `directory`, or none."""
    if work is not None or directory is None:
        yield work
        return
    from marlin_gptq.work_directory import WorkDirectory

    with WorkDirectory.new(directory, arguments) as made:
        yield made


def go_on(work: WorkDirectory) -> list[Any]:
    """The samples of a resumed run; the process gets as many threads as it had, for they change sums by a bit."""
    import torch

    threads = work.content["facts"]["threads"]
    if threads is not None:
        torch.set_num_threads(threads)
    return work.samples()


def _called(parameter: click.Parameter) -> str:
    return max(parameter.opts, key=len) if isinstance(parameter, click.Option) else (parameter.name or "").upper()


def _shown(value: Any) -> str:
    return "nothing" if value in (None, [], "") else str(value)

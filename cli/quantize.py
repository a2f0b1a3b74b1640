"""marlin-quantize: a checkpoint in, a 4-bit Marlin checkpoint out."""

from __future__ import annotations

import json
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from marlin_gptq import __version__, register
from marlin_gptq.cli import failures, options, processes, quantize_options, several, techniques
from marlin_gptq.cli.progress import Display
from marlin_gptq.cli.quantize_summary import summary
from marlin_gptq.cli.resume import go_on, keeping, options_of, resumed
from marlin_gptq.config import DEFAULT_PRESET, QuantizationConfig
from marlin_gptq.destination import require_destination, require_work_directory
from marlin_gptq.distributed import Team
from marlin_gptq.errors import InputError
from marlin_gptq.model_directory import read_json
from marlin_gptq.overrides import read_overrides
from marlin_gptq.placement import Placement
from marlin_gptq.text_sources import require_source

if TYPE_CHECKING:
    from marlin_gptq.work_directory import WorkDirectory


@click.command(
    "marlin-quantize",
    cls=failures.Command,
    unused=failures.UNUSED,
    epilog=quantize_options.EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@quantize_options.options
@options.model_options
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context, **arguments: Any) -> int | None:
    """Quantize MODEL (a directory or a hub id) to 4 bits and pack it for the Marlin kernel."""
    count = arguments.pop("processes")
    count = 1 if arguments["dry_run"] else count
    if count > 1:
        Display().say(f"starting {count} processes")
        register()  # they share what was imported before
    code = several.fork(count)
    if code is None:
        _main(context, arguments)
    return code


def _main(context: click.Context, arguments: dict[str, Any]) -> None:
    work: WorkDirectory | None = None
    with processes.team(arguments["device"]) as team:
        if arguments["resume"] is not None:
            if team.leads:
                work, arguments = resumed(context, arguments)
            arguments = team.from_leader(arguments)
        needed = ("model",) if arguments["dry_run"] else ("model", "output")
        for parameter in context.command.params:
            if parameter.name in needed and arguments[parameter.name] is None:
                hint = "'MODEL'" if parameter.name == "model" else None
                raise click.MissingParameter(ctx=context, param=parameter, param_hint=hint)
        output, kept = arguments["output"], arguments.pop("resume") or arguments["work_dir"]
        chosen = context.get_parameter_source("preset") != ParameterSource.DEFAULT
        try:
            again = f"go on with marlin-quantize --resume {shlex.quote(str(kept))}" if kept else ""
            with failures.writing(None if arguments["dry_run"] else output, again):
                _quantize(team, work, options_of(arguments), chosen, **arguments)
        finally:
            if work is not None:
                work.close()


def _quantize(
    team: Team,
    work: WorkDirectory | None,
    given: dict[str, Any],
    recipe_chosen: bool,
    model: str,
    output: Path,
    wbits: int,
    group_size: str,
    damp: float | None,
    n_samples: int,
    seq_len: int | None,
    dataset: str,
    special_tokens: bool,
    seed: int,
    method: str,
    preset: str,
    to: str,
    dtype: str,
    skip: tuple[str, ...],
    config_file: Path | None,
    shard_size: str,
    overwrite: bool,
    work_dir: Path | None,
    spill: str,
    max_gpu_memory: str | None,
    dry_run: bool,
    gpu: str | None,
    device: str,
    revision: str | None,
    offline: bool,
    as_json: bool,
    debug: bool,
    **chosen: Any,
) -> None:
    display = Display(silent=not team.leads)
    fused = options.fused_loops()
    if wbits != 4:
        raise InputError(f"--wbits: got {wbits}, the Marlin format holds 4-bit codes only; use --wbits 4")
    settings = team.from_leader(work.arguments["settings"] if work is not None else None)
    recipe_chosen &= preset != DEFAULT_PRESET  # the default, named or not, is fitted to the run
    recipe_chosen |= settings is not None or any(name.startswith("tune_") for name in techniques.changes(chosen))
    steps_chosen = settings is not None or chosen["tune_steps"] is not None
    if settings is None:
        changes = techniques.changes(chosen) | ({} if damp is None else {"damp_percent": damp})
        config = QuantizationConfig.from_preset(
            preset if method == "gptq" else "marlin",  # rounding has no recipe
            group_size=int(group_size),
            method=method,
            skip=skip,
            overrides=read_overrides(config_file) if config_file else (),
            **changes,
        )
    else:
        config = QuantizationConfig.from_dict(settings)
        if team.from_leader(work is not None and to == "marlin" and work.finished(output)):
            display.say(f"finished already: {output}; the work directory can be removed")
            if as_json and team.leads:
                from marlin_gptq.output_directory import LOG_FILE

                click.echo(json.dumps({"model": model} | read_json(output / LOG_FILE)))
            return
    shard_bytes = options.parse_size(shard_size)
    if gpu is not None and not dry_run:
        raise InputError(f"--gpu: got {gpu} for a run, which takes the GPU that is there; it goes with --dry-run")
    limit = options.parse_size(max_gpu_memory, "--max-gpu-memory") if max_gpu_memory else None
    place = None if spill == "auto" else spill
    way: dict[str, Any] = {
        "kept": work is not None or work_dir is not None,
        "processes": team.size,
        "limited": limit is not None,
    }
    files = {"the --dataset": Path(dataset), "the --config": config_file}
    inputs = {"the model": Path(model)} | {what: file for what, file in files.items() if file and file.is_file()}
    if not dry_run:
        if work_dir is not None:
            require_work_directory(work_dir, output, Path(model))
        if Path(model).is_dir() or not overwrite:  # else its files must be known first: what are copies of them?
            require_destination(output, overwrite=overwrite, inputs=inputs)
    model_dir = options.find_model(display.say, model, revision, offline, config_only=dry_run)
    if not dry_run:
        inputs["the model"] = model_dir
        require_destination(output, overwrite=overwrite, inputs=inputs)
    if not dry_run and work is None and method == "gptq" and team.leads:
        require_source(dataset, split="calibration", offline=offline)
    options.load_libraries(display.say)
    if dry_run:
        from marlin_gptq.cli import dry_run as dry

        machine = dry.machine(device, gpu)
        if machine.note:
            display.say(f"note: {machine.note}")
        if not recipe_chosen:
            memory = min((size for size in (machine.memory, limit) if size is not None), default=None)
            config = _within_reach(display, model_dir, config, machine, memory)
        elif not steps_chosen and config.tunes and machine.type == "cpu":
            display.say(f"note: without a GPU --preset {config.preset} is refused, but for --tune-steps 0")
        found = dry.estimate(
            model_dir,
            config,
            dtype=dtype,
            on=machine,
            n_samples=n_samples if method == "gptq" else 0,
            seq_len=seq_len,
            shard_size=shard_bytes,
            spill=place,
            limit=limit,
            kept=way["kept"],
            processes=team.size,
        )
        click.echo(json.dumps({"model": model} | found) if as_json else dry.shown(found))
        return

    from marlin_gptq.calibration import DEFAULT_SEQ_LEN, sequence_length
    from marlin_gptq.conversion.convert import HALF_SCALES
    from marlin_gptq.conversion.export import convert_aside, require_exportable
    from marlin_gptq.pipeline import quantize_model
    from marlin_gptq.quantization.loops import set_fused
    from marlin_gptq.requirements import require_gpu_for_tuning, require_quantizable, result_dtype

    set_fused(fused)
    half = to in HALF_SCALES and dtype == "auto"
    where = processes.own_device(options.torch_device(device))
    target = options.torch_dtype("float16" if half else dtype)
    if not recipe_chosen:
        config = team.from_leader(_within_reach(display, model_dir, config, where, limit))
    if not steps_chosen:
        require_gpu_for_tuning(config, where)
    for note in require_quantizable(model_dir, output, config, target, device=where, **way):
        display.say(f"note: {note}")
    for warning in require_exportable(model_dir, config, to, result_dtype(model_dir, target)):
        display.say(f"warning: {warning}")

    before = {"start": processes.age()}
    samples: list[Any] = []
    calibration: dict[str, Any] = {}
    with ExitStack() as stack:
        kept = stack.enter_context(
            keeping(work, work_dir if team.leads else None, {"options": given, "settings": config.to_dict()})
        )
        final: Placement | None = None  # of what is converted in the end; else quantize_model makes its own
        if to != "marlin" and team.leads:
            final = stack.enter_context(Placement(output, overwrite=overwrite, inputs=inputs))
        if work is not None:
            samples, calibration = go_on(work), work.arguments["calibration"]
            display.say(f"going on with the run in {work.directory}: {len(samples)} samples as they were")
        elif method == "gptq" and team.leads:
            length = sequence_length(seq_len, options.context_length(model_dir))
            if seq_len is None and length < DEFAULT_SEQ_LEN:
                display.say(f"note: calibration documents of at most {length} tokens, the model's context")
            samples = _read_samples(display, model_dir, dataset, n_samples, length, seed, special_tokens, offline)
            tokens = sum(len(sample) for sample in samples)
            calibration = {
                "dataset": dataset, "n_samples": len(samples), "seq_len": length, "seed": seed,
                "special_tokens": special_tokens, "tokens": tokens,
            }  # fmt: skip
        samples, calibration = team.from_leader((samples, calibration))
        before["calibration text"] = processes.age() - before["start"]
        processes.threads_as_leader(team)
        if kept is not None:
            kept.arguments["calibration"] = calibration
        display.say(f"quantizing {model} on {where.type}: {config.recipe}; 4 bits, group size {config.group_size}")
        from marlin_gptq.cli.dry_run import expected_seconds

        expected = expected_seconds(model_dir, config, samples, where, team.size) if team.leads else []
        with display.quantizing(expected) as progress:
            report = quantize_model(
                model_dir,
                output if final is None else final.aside(),
                config,
                samples,
                device=where,
                dtype=target,
                shard_size=shard_bytes,
                overwrite=overwrite,
                base_model=None if Path(model).is_dir() else model,
                calibration=calibration,
                progress=progress,
                work=kept,
                spill=place,
                max_gpu_memory=limit,
                team=team,
                before=before,
            )
        if final is not None:
            with display.counting(f"writing {to}") as counting:
                done = convert_aside(final, to, shard_size=shard_bytes, progress=counting)
            report = replace(report, output=output, bytes_after=done.bytes_after)
    if not team.leads:
        return
    if report.small_share:
        display.say(f"warning: {report.small_share}")
    if as_json:
        click.echo(json.dumps({"model": model, "format": to} | report.to_dict()))
    else:
        click.echo(summary(report, to))
    if kept is not None:
        display.say(f"note: the work directory {kept.directory} is no longer needed")


def _read_samples(
    display: Display,
    model_dir: Path,
    dataset: str,
    n_samples: int,
    length: int,
    seed: int,
    special_tokens: bool,
    offline: bool,
) -> list[Any]:
    from marlin_gptq.calibration import calibration_samples, load_tokenizer

    display.say(f"reading calibration text: {dataset}")
    samples = calibration_samples(
        load_tokenizer(model_dir),
        dataset,
        n_samples=n_samples,
        seq_len=length,
        seed=seed,
        special_tokens=special_tokens,
        offline=offline,
    )
    sizes = [len(sample) for sample in samples]
    display.say(f"{len(sizes)} samples of {min(sizes)} to {max(sizes)} tokens, {sum(sizes)} in all")
    return samples


def _within_reach(
    display: Display, model_dir: Path, config: QuantizationConfig, device: Any, memory: int | None
) -> QuantizationConfig:
    from marlin_gptq.requirements import within_reach

    found, left_out = within_reach(model_dir, config, device, memory)
    if left_out:
        display.say(f"note: {left_out}")
    return found


if __name__ == "__main__":
    main()

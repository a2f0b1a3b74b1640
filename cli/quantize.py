"""marlin-quantize: a checkpoint in, a 4-bit Marlin checkpoint out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from marlin_gptq import __version__
from marlin_gptq.cli import failures, options, processes, quantize_options, several, techniques
from marlin_gptq.cli.progress import Display
from marlin_gptq.cli.quantize_summary import summary
from marlin_gptq.cli.resume import go_on, keeping, options_of, resumed
from marlin_gptq.config import DEFAULT_PRESET, QuantizationConfig
from marlin_gptq.distributed import Team
from marlin_gptq.errors import InputError
from marlin_gptq.model_directory import read_json, resolve_model
from marlin_gptq.output_directory import LOG_FILE
from marlin_gptq.overrides import read_overrides
from marlin_gptq.quantization.loops import set_fused
from marlin_gptq.work_directory import WorkDirectory


@click.command(
    "marlin-quantize",
    cls=failures.Command,
    unused=("sklearn",),  # transformers has it for assisted generation
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
    code = several.fork(1 if arguments["dry_run"] else count)
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
            _quantize(team, work, options_of(arguments), chosen, **arguments)
        except KeyboardInterrupt as error:
            rest = "; what stood there before is unchanged" if output.exists() else ""
            rest += f"; go on with marlin-quantize --resume {kept}" if kept is not None else ""
            raise failures.Interrupted(f"interrupted: nothing was written under {output}{rest}") from error
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
    device: str,
    revision: str | None,
    offline: bool,
    as_json: bool,
    debug: bool,
    **chosen: Any,
) -> None:
    display = Display(silent=not team.leads)
    set_fused(options.fused_loops())
    if wbits != 4:
        raise InputError(f"--wbits: got {wbits}, the Marlin format holds 4-bit codes only; use --wbits 4")
    settings = team.from_leader(work.arguments["settings"] if work is not None else None)
    recipe_chosen &= preset != DEFAULT_PRESET  # the default, named or not, is fitted to the run
    recipe_chosen |= settings is not None or any(name.startswith("tune_") for name in techniques.changes(chosen))
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
                click.echo(json.dumps({"model": model} | read_json(output / LOG_FILE)))
            return
    shard_bytes = options.parse_size(shard_size)
    limit = options.parse_size(max_gpu_memory, "--max-gpu-memory") if max_gpu_memory else None
    place = None if spill == "auto" else spill
    way: dict[str, Any] = {
        "kept": work is not None or work_dir is not None,
        "processes": team.size,
        "limited": limit is not None,
    }
    if dry_run:
        from marlin_gptq.cli import dry_run as dry

        model_dir = resolve_model(model, revision=revision, offline=offline, config_only=True)
        found = dry.estimate(
            model_dir,
            config
            if recipe_chosen
            else _within_reach(display, model_dir, config, options.torch_device(device), way | {"free": limit}),
            dtype=dtype,
            device=options.torch_device(device),
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
    require_free_name(output, overwrite)

    from marlin_gptq.calibration import DEFAULT_SEQ_LEN, sequence_length
    from marlin_gptq.conversion.convert import HALF_SCALES
    from marlin_gptq.conversion.export import convert_staged, require_exportable, staging_directory
    from marlin_gptq.pipeline import quantize_model
    from marlin_gptq.requirements import require_quantizable, result_dtype

    options.quiet_libraries(display.say)
    half = to in HALF_SCALES and dtype == "auto"
    where = processes.own_device(options.torch_device(device))
    target = options.torch_dtype("float16" if half else dtype)
    model_dir = resolve_model(model, revision=revision, offline=offline)
    if output.exists() and output.samefile(model_dir):
        raise InputError(f"{output}: is the model itself; give another --output")
    if not recipe_chosen:
        config = team.from_leader(_within_reach(display, model_dir, config, where, way | {"free": limit}))
    require_quantizable(model_dir, output, config, target, device=where, **way)
    for warning in require_exportable(model_dir, config, to, result_dtype(model_dir, target)):
        display.say(f"warning: {warning}")

    before = {"start": processes.age()}
    samples: list[Any] = []
    calibration: dict[str, Any] = {}
    with keeping(work, work_dir if team.leads else None, {"options": given, "settings": config.to_dict()}) as kept:
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
        into = output if to == "marlin" else staging_directory(output)
        recipe = f"gptq, preset {config.preset}" if method == "gptq" else method
        display.say(f"quantizing {model} on {where.type}: {recipe}, 4 bits, group size {config.group_size}")
        with display.quantizing() as progress:
            report = quantize_model(
                model_dir,
                into,
                config,
                samples,
                device=where,
                dtype=target,
                shard_size=shard_bytes,
                overwrite=overwrite or into != output,
                base_model=None if Path(model).is_dir() else model,
                calibration=calibration,
                progress=progress,
                work=kept,
                spill=place,
                max_gpu_memory=limit,
                team=team,
                before=before,
            )
    if not team.leads:
        return
    if to != "marlin":
        with display.counting(f"writing {to}") as counting:
            done = convert_staged(output, to, shard_size=shard_bytes, overwrite=overwrite, progress=counting)
        report = replace(report, output=output, bytes_after=done.bytes_after)
    if as_json:
        click.echo(json.dumps({"model": model, "format": to} | report.to_dict()))
    else:
        click.echo(summary(report, to))
    if kept is not None:
        display.say(f"note: the work directory {kept.directory} is no longer needed")


def require_free_name(output: Path, overwrite: bool) -> None:
    """InputError, before any work, for an output that exists or cannot be made."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; give a directory as --output")
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists already; give another --output, or --overwrite to replace it")
    ancestor = _existing(output.absolute().parent)
    if not ancestor.is_dir():
        raise InputError(f"{output}: cannot be made, {ancestor} is a file")


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
    display: Display, model_dir: Path, config: QuantizationConfig, device: Any, way: dict[str, Any]
) -> QuantizationConfig:
    from marlin_gptq.requirements import within_reach

    found, left_out = within_reach(model_dir, config, device, **way)
    if left_out:
        display.say(f"note: {left_out}")
    return found


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


if __name__ == "__main__":
    main()

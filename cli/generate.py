"""marlin-generate: a model continues a prompt, so that a user sees it working."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from marlin_gptq import __version__
from marlin_gptq.cli import failures, options
from marlin_gptq.cli.progress import Display
from marlin_gptq.errors import InputError
from marlin_gptq.near_names import near_path
from marlin_gptq.text_files import utf8

EXAMPLES = """\b
Examples:
  marlin-generate llama-2-7b-marlin -p "Once upon a time"
  marlin-generate llama-2-7b-marlin -p "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
  marlin-generate llama-3-8b-instruct-marlin -p "Why is the sky blue?" --max-new-tokens 400
  cat question.txt | marlin-generate llama-2-7b-marlin -p - --json
"""


@click.command(
    "marlin-generate",
    cls=failures.Command,
    unused=failures.UNUSED,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("model")
@click.option("-p", "--prompt", metavar="TEXT", help="Text to continue; - reads it from stdin.")
@click.option("--prompt-file", type=click.Path(path_type=Path), metavar="FILE", help="Text to continue, from a file.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Tokens at most.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True,
    help="0 takes the most likely token each time; higher draws more freely.",
)  # fmt: skip
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    help="Draw among the most likely tokens that have this probability together.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the draws.")
@click.option(
    "--chat/--no-chat", default=None,
    help="Put the prompt into the tokenizer's chat template.  [default: if it has one]",
)  # fmt: skip
@click.option("--no-stream", is_flag=True, help="Print the text when it is whole.")
@click.option("--no-graphs", is_flag=True, help="On a GPU: launch every kernel from Python, without a CUDA graph.")
@click.option(
    "--dtype", type=options.Choice(["auto", "float16", "bfloat16", "float32"]), default="auto", show_default=True,
    help="Computing dtype; auto is the model's on a GPU and float32 elsewhere.",
)  # fmt: skip
@options.model_options
@click.version_option(__version__)
def main(**arguments: Any) -> None:
    """Continue a prompt with MODEL (a directory or a hub id, full-precision or quantized): text on stdout, speed on
    stderr."""
    try:
        _generate(**arguments)
    except KeyboardInterrupt as error:
        raise failures.Interrupted("interrupted") from error


def _generate(
    model: str,
    prompt: str | None,
    prompt_file: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool | None,
    no_stream: bool,
    no_graphs: bool,
    dtype: str,
    device: str,
    revision: str | None,
    offline: bool,
    as_json: bool,
    debug: bool,
) -> None:
    text = read_prompt(prompt, prompt_file)
    display = Display()
    directory = options.find_model(display.say, model, revision, offline)
    options.load_libraries(display.say)
    where, computing = options.torch_device(device), options.torch_dtype(dtype)

    from marlin_gptq.calibration import load_tokenizer
    from marlin_gptq.eval.generation import Generation, continue_text, has_chat_template, prompt_ids, room
    from marlin_gptq.eval.harness_model import kernel_name
    from marlin_gptq.eval.whole_model import load_whole

    tokenizer = load_tokenizer(directory)
    has_template = has_chat_template(tokenizer)
    if chat and not has_template:
        raise InputError(f"{model}: its tokenizer has no chat template, or several and no default; leave --chat out")
    ids = prompt_ids(tokenizer, text, has_template if chat is None else chat)
    loaded = load_whole(directory, where, computing)
    require_tokens(ids, loaded.config.get_text_config().vocab_size)
    tokens = room(loaded, len(ids), max_new_tokens)
    if tokens < max_new_tokens:
        display.say(f"note: the context leaves room for {tokens} new tokens, not {max_new_tokens}")
    account = Generation()
    pieces = continue_text(
        loaded, tokenizer, ids, tokens,
        temperature=temperature, top_p=top_p, seed=seed, graphs=not no_graphs, generation=account,
    )  # fmt: skip
    try:
        for piece in pieces:
            if not (no_stream or as_json):
                click.echo(piece, nl=False)
                sys.stdout.flush()
    finally:
        if not (no_stream or as_json):
            click.echo()
    kernel = kernel_name(loaded, where)
    if as_json:
        click.echo(json.dumps({"model": model, "prompt": text} | account.to_dict() | {"kernel": kernel}))
    elif no_stream:
        click.echo(account.text)
    speed = f", {account.tokens_per_second:.1f} tokens/s" if account.new_tokens > 1 else ""
    display.say(
        f"{account.new_tokens} tokens after {account.prompt_tokens}: first after {account.prompt_seconds:.2f} s{speed} "
        f"({kernel})"
    )


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt, wherever it is; InputError for none, two, or one that is no text."""
    if (prompt is None) == (prompt_file is None):
        raise InputError("prompt: got none or two, expected one of --prompt TEXT, --prompt - and --prompt-file FILE")
    try:
        if prompt_file is not None:
            content = prompt_file.read_bytes()
        else:  # an argument of bytes that are no UTF-8 comes as lone surrogates
            content = sys.stdin.buffer.read() if prompt == "-" else str(prompt).encode("utf-8", "surrogatepass")
    except FileNotFoundError as error:
        meant = near_path(str(prompt_file)) or ";"
        raise InputError(f"{prompt_file}: no such file{meant} --prompt-file wants a text file") from error
    except OSError as error:
        raise InputError(f"{prompt_file or 'stdin'}: not readable ({error})") from error
    return utf8(content, str(prompt_file or ("stdin" if prompt == "-" else "prompt")))


def require_tokens(ids: list[int], vocabulary: int) -> None:
    """InputError for a tokenizer that does not belong to the model."""
    if max(ids) >= vocabulary:
        raise InputError(
            f"tokenizer: made token {max(ids)} of the prompt, the model's vocabulary has {vocabulary}; the tokenizer "
            "in the directory belongs to another model"
        )


if __name__ == "__main__":
    main()

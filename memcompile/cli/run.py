"""`memcompile run`: generate text with an artifact. Needs neither torch nor transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from memcompile.cli import options
from memcompile.cli.output import Output
from memcompile.errors import MemcompileError


@click.command()
@options.artifact
@click.option("--prompt", help="The prompt; `-` reads it from stdin.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A UTF-8 text to use as the prompt.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens at most."
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy."
)
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Choose among the k likeliest; 0: all.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    help="Choose within this share.",
)
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the sampling."
)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads; the artifact's own number if not given."
)
@options.common
def run(
    output: Output,
    artifact: Path,
    prompt: str | None,
    prompt_file: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop: tuple[str, ...],
    seed: int,
    chat: bool,
    threads: int | None,
) -> None:
    """Generate text with ARTIFACT, streaming it to stdout; with --json, tokens, text and times at the end."""
    text = _prompt(prompt, prompt_file)
    from memcompile import runtime

    session = runtime.load(artifact, threads=threads)
    sampling = runtime.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    on_token = None if output.json else _writer(output)
    (generation,) = session.generate(
        [text], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, chat=chat, on_token=on_token
    )
    if output.json:
        output.emit(
            {
                "tokens": list(generation.tokens),
                "text": generation.text,
                "prefill_seconds": generation.prefill_seconds,
                "decode_seconds_per_token": generation.decode_seconds_per_token,
            }
        )
        return
    output.stream.write("\n")
    output.stream.flush()
    if not output.quiet:
        click.echo(
            f"{len(generation.tokens)} tokens; first after {generation.prefill_seconds:.2f} s, "
            f"then {generation.decode_seconds_per_token * 1000:.1f} ms each",
            err=True,
        )


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        given = "no prompt" if prompt is None else "--prompt and --prompt-file"
        raise MemcompileError(
            "MC120",
            f"{given} given, one is wanted",
            where="memcompile run",
            fix="give --prompt TEXT or --prompt-file FILE",
        )
    if prompt_file is not None:
        try:
            return prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MemcompileError(
                "MC121",
                f"{prompt_file} cannot be read: {error}",
                where="memcompile run --prompt-file",
                fix="give a UTF-8 text",
            ) from error
    assert prompt is not None
    return sys.stdin.read() if prompt == "-" else prompt


def _writer(output: Output) -> Callable[[int, int, str], None]:
    def write(row: int, token: int, text: str) -> None:
        del row, token
        output.stream.write(text)
        output.stream.flush()

    return write

"""The entry point: run a command, and turn whatever it ends with into a message and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Final

import click

from memcompile.cli.output import Output, pure_stdout
from memcompile.errors import INTERNAL, MemcompileError

INTERRUPTED: Final = 130

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "inspect": (
        "memcompile.cli.models:inspect",
        "Show a model's regions, sizes, and what was not understood.",
    ),
    "plan": ("memcompile.cli.plans:plan", "Write a plan for a model, or check one."),
    "optimize": ("memcompile.cli.optimize:optimize", "Rewrite a model by a plan and write an artifact."),
    "run": ("memcompile.cli.run:run", "Generate text with an artifact."),
    "eval": ("memcompile.cli.artifacts:evaluate", "Measure an artifact's quality, speed and memory."),
    "bench": ("memcompile.cli.artifacts:bench", "Measure an artifact's speed and memory at several lengths."),
    "tune": (
        "memcompile.cli.tune:tune",
        "Measure the attention implementations of a backend on this machine, and remember the fastest.",
    ),
    "explain": (
        "memcompile.cli.models:explain",
        "Say what each pass of a plan matched, and why it refused the rest.",
    ),
    "methods": (
        "memcompile.cli.methods:methods",
        "List every method: pass, preset, paper, exactness, backends.",
    ),
    "report": ("memcompile.cli.artifacts:report", "Show the report of an artifact."),
}
EXIT_CODES: Final = """\
Exit codes: 0 done, 1 internal error, 2 usage or plan, 3 model not understood, 4 coverage (a selector
matched nothing, `expect` unmet, everything refused), 5 a gate unmet, 6 artifact invalid."""


class Commands(click.Group):
    """A group whose commands are imported when they are called; their summaries are known before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            from memcompile.plan.names import nearest

            raise MemcompileError(
                "MC120", f"no such command: {args[0]}", where="memcompile", fix=nearest(args[0], COMMANDS)
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def _version() -> str:
    try:
        return metadata.version("memcompile")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"


@click.group(cls=Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="memcompile")
def app() -> None:
    """Rewrite trained transformers into memory-efficient equivalents, and measure what it bought."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # read before parsing: a mistake in the arguments has to be told in the form that was asked for
    # libraries' own bars would be drawn into ours
    os.environ.setdefault("TQDM_DISABLE", "1")
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    with pure_stdout("--json" in flags) as stream:
        before = sys.stdout
        output = Output(json="--json" in flags, quiet="--quiet" in flags, stream=stream)
        try:
            return _run(arguments, output)
        except SystemExit as ended:
            # when the reader of a pipe went away click replaces stdout and exits: nothing is left to say
            return 0 if sys.stdout is not before else int(ended.code or 0)
        except MemcompileError as error:
            return output.error(error)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help() if error.ctx else "", err=True)
            return 2
        except click.ClickException as error:
            return output.error(_usage(error))
        except (click.Abort, KeyboardInterrupt):
            click.echo("interrupted", err=True)
            return INTERRUPTED
        except Exception as error:
            if "--debug" in flags:
                traceback.print_exc(file=sys.stderr)
            return output.error(_internal(error), exit_code=INTERNAL)


def _run(arguments: list[str], output: Output) -> int:
    result: Any = app.main(args=arguments, prog_name="memcompile", standalone_mode=False, obj=output)
    return result if isinstance(result, int) else 0


def _usage(error: click.ClickException) -> MemcompileError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "memcompile"
    return MemcompileError("MC120", error.format_message(), where=command, fix=f"see {command} --help")


def _internal(error: Exception) -> MemcompileError:
    first = next(iter(str(error).splitlines()), "")
    return MemcompileError(
        "MC901",
        f"{type(error).__name__}: {first}".rstrip(": "),
        fix="run again with --debug and report the traceback",
    )

"""The options of docs/cli.md, written from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import click

from memcompile.cli.main import app

# said once, above the commands
COMMON: Final = ("json", "quiet", "debug")


def cli_reference_markdown() -> str:
    """Every command with its arguments and options, as Markdown."""
    context = click.Context(app, info_name="memcompile")
    return "\n\n".join(_sections(app, context)) + "\n"


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _sections(inner, click.Context(inner, info_name=name, parent=context))
        return
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [f"## `{context.command_path}`", f"```\n{context.command_path} {usage}\n```"]
    # "\b" tells click to keep lines as they are; Markdown needs no such thing
    parts += [" ".join(text.split()) for text in (command.help or "").replace("\b", "").split("\n\n")]
    options = [option for option in command.params if isinstance(option, click.Option)]
    rows = [_row(option) for option in options if option.name not in COMMON]
    if rows:
        parts.append("\n".join(["| option | meaning |", "| --- | --- |", *rows]))
    yield "\n\n".join(parts)


def _row(option: click.Option) -> str:
    value = "" if option.is_flag else f" {option.metavar or option.type.name.upper().split(' ')[0]}"
    if isinstance(option.type, click.Choice):
        # a bare bar would end the cell
        value = " " + "\\|".join(str(choice) for choice in option.type.choices)
    notes = [option.help or ""]
    if option.required:
        notes.append("Required.")
    elif option.show_default and option.default is not None:
        notes.append(f"Default: {option.default}.")
    meaning = " ".join(note for note in notes if note)
    names = ", ".join((*option.opts, *option.secondary_opts))
    return f"| `{names}{value}` | {meaning} |"

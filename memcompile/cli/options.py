"""Options that every command takes, or several do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """--json, --quiet and --debug; `main` reads them before the command is parsed."""
    for name, meaning in (
        ("--debug", "Print the traceback of an internal error."),
        ("--quiet", "Show no progress."),
        ("--json", "Print the result as JSON; everything else goes to stderr."),
    ):
        function = click.option(name, is_flag=True, expose_value=False, help=meaning)(function)
    return click.pass_obj(function)


model = click.argument("model", type=str)
"""MODEL: a Hugging Face folder, a .gguf file or package.module:function."""

optional_model = click.argument("model", type=str, required=False)

artifact = click.argument("artifact", type=click.Path(path_type=Path))

overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the plan: target.threads=1, passes.1.bits=4, passes.kv.evict.keep_tokens=1024.",
)

plan_file = click.option(
    "--plan",
    "plan_path",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PLAN",
    help="The plan, a YAML file.",
)

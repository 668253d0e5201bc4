"""`memcompile plan`: write a plan for a model, and check one without compiling anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from memcompile.cli import options
from memcompile.cli.optimize import with_model
from memcompile.cli.output import Output
from memcompile.cli.starter import GOALS
from memcompile.errors import MemcompileError
from memcompile.plan import load_plan


@click.group()
def plan() -> None:
    """Write a plan for a model, or check one."""


@plan.command()
@options.model
@click.option(
    "--goal", type=click.Choice(list(GOALS)), default="memory", show_default=True, help="What matters most."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The file to write; stdout if not given.")
@click.option("--text", type=click.Path(path_type=Path), help="A text to evaluate on.")
@click.option("--calibration-text", type=click.Path(path_type=Path), help="Another text, to calibrate on.")
@click.option("--force", is_flag=True, help="Replace a plan that is already there.")
@options.common
def init(
    output: Output,
    model: str,
    goal: str,
    out: Path | None,
    text: Path | None,
    calibration_text: Path | None,
    force: bool,
) -> None:
    """Write a commented plan for MODEL. Asks nothing; every choice is explained in the plan."""
    if out is not None and out.exists() and not force:
        raise MemcompileError(
            "MC120", f"{out} exists", where="memcompile plan init -o", fix="choose a name, or --force"
        )
    for given in (text, calibration_text):
        if given is not None and not given.is_file():
            raise MemcompileError(
                "MC121",
                f"{given} does not exist",
                where="memcompile plan init",
                fix="give a text that exists",
            )
    from memcompile import pipeline
    from memcompile.cli.starter import starter_plan

    with output.progress() as progress:
        found = pipeline.inspect(model, progress=progress)
    folder = out.parent if out is not None else Path()
    written = starter_plan(
        found, goal, source=model, folder=folder, text=text, calibration_text=calibration_text
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(written, encoding="utf-8")
    if output.json:
        output.emit({"plan": str(out) if out is not None else None, "goal": goal, "text": written})
    elif out is None:
        output.stream.write(written)
    else:
        click.echo(f"wrote {out}; check it with: memcompile plan check {out}", err=True)


@plan.command()
@click.argument("plan_path", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--model", help="Check it against this model instead of the plan's model.source.")
@options.overrides
@options.common
def check(output: Output, plan_path: Path, model: str | None, overrides: tuple[str, ...]) -> int:
    """Resolve PLAN and print it in full: presets expanded, overrides applied.

    With a model, also what each pass would match and the state bytes that predicts; nothing is calibrated,
    lowered or run. What would end `optimize` with exit code 4 ends this with 4 as well.
    """
    resolved, source = with_model(load_plan(plan_path, overrides), model)
    payload: dict[str, Any] = {"plan": resolved.resolved(), "model": source}
    problem: MemcompileError | None = None
    if source is not None:
        from memcompile.cli.preview import first_problem, preview

        with output.progress() as progress:
            payload |= preview(source, resolved, progress)
        problem = first_problem(payload)
    if output.json:
        output.emit(payload if problem is None else {**payload, "error": problem.as_dict()})
    else:
        from memcompile.cli.tables import print_plan

        print_plan(output.console(), resolved, payload)
    return 0 if problem is None else output.error(problem, told=True)

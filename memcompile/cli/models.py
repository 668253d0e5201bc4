"""`memcompile inspect` and `memcompile explain`: what a model holds, and what a plan does to it."""

from __future__ import annotations

from pathlib import Path

import click

from memcompile.cli import options
from memcompile.cli.optimize import required, with_model
from memcompile.cli.output import Output
from memcompile.errors import MemcompileError
from memcompile.plan import load_plan


@click.command()
@options.model
@options.common
def inspect(output: Output, model: str) -> None:
    """Show the regions of MODEL, their sizes and masks, and what was not understood.

    MODEL is a Hugging Face folder, a .gguf file or package.module:function.
    """
    from memcompile import pipeline

    with output.progress() as progress:
        found = pipeline.inspect(model, progress=progress)
    if output.json:
        output.emit(found)
        return
    from memcompile.cli.tables import print_inspection

    print_inspection(output.console(), found)


@click.command()
@click.argument("subject", metavar="MODEL|ARTIFACT", required=False)
@click.option(
    "--plan", "plan_path", type=click.Path(path_type=Path), metavar="PLAN", help="The plan, for a MODEL."
)
@options.overrides
@click.option("--graph", is_flag=True, help="Show the order of the plan's passes, and why.")
@options.common
def explain(
    output: Output, subject: str | None, plan_path: Path | None, overrides: tuple[str, ...], graph: bool
) -> None:
    """Say what each pass of a plan matched, and give the reason of every refusal.

    With --plan, the passes are tried on MODEL and nothing is written. Without, ARTIFACT says what was decided
    when it was made.
    """
    from memcompile.cli.tables import print_explanation, print_order

    if plan_path is None:
        if subject is None or graph:
            raise MemcompileError(
                "MC120",
                "there is nothing to explain without a plan",
                where="memcompile explain",
                fix="memcompile explain MODEL --plan plan.yaml, or memcompile explain ARTIFACT",
            )
        from memcompile.cli.artifacts import explain_artifact

        explanation = explain_artifact(Path(subject))
    else:
        plan, source = with_model(load_plan(plan_path, overrides), subject)
        if graph:
            from memcompile.cli.order import order_of

            order = order_of(plan)
            if output.json:
                output.emit(order)
            else:
                print_order(output.console(), order)
            return
        from memcompile.cli.preview import preview

        with output.progress() as progress:
            explanation = preview(required(source, plan), plan, progress)
    if output.json:
        output.emit(explanation)
    else:
        print_explanation(output.console(), explanation)

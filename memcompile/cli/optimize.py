"""`memcompile optimize`: the main job."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from memcompile.cli import options
from memcompile.cli.output import Output
from memcompile.errors import MemcompileError
from memcompile.plan import Plan, load_plan

if TYPE_CHECKING:
    from memcompile.pipeline import OptimizeResult


@click.command()
@options.optional_model
@options.plan_file
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Where the artifact goes.")
@options.overrides
@click.option(
    "--no-evaluate", is_flag=True, help="Write the artifact without measuring; not for plans with gates."
)
@click.option("--no-source", is_flag=True, help="Do not also measure the Hugging Face model.")
@click.option("--quick", is_flag=True, help="Measure less: one window, three passkey depths.")
@click.option("--force", is_flag=True, help="Replace an artifact that is already there.")
@options.common
def optimize(
    output: Output,
    model: str | None,
    plan_path: Path,
    out: Path,
    overrides: tuple[str, ...],
    no_evaluate: bool,
    no_source: bool,
    quick: bool,
    force: bool,
) -> int:
    """Rewrite MODEL by a plan, write the artifact, and measure it beside the original.

    MODEL is a Hugging Face folder, a .gguf file or package.module:function; without it, model.source of the
    plan counts.
    If a gate is not met the command ends with exit code 5 and leaves nothing under OUT.
    """
    plan, source = with_model(load_plan(plan_path, overrides), model)
    from memcompile import pipeline

    try:
        with output.progress() as progress:
            result = pipeline.optimize(
                required(source, plan),
                plan,
                out,
                evaluate=not no_evaluate,
                compare_with_source=not no_source,
                quick=quick,
                force=force,
                progress=progress,
            )
    except pipeline.GatesUnmet as unmet:
        # the measurements were made: they are shown, though there is no artifact
        if output.json:
            output.emit({**unmet.result.as_dict(), "artifact": None, "error": unmet.as_dict()})
            return output.error(unmet, told=True)
        _print(output, unmet.result)
        raise
    if output.json:
        output.emit(result.as_dict())
    else:
        _print(output, result)
        output.console().print(f"artifact: {result.artifact}", markup=False)
    return 0


def _print(output: Output, result: OptimizeResult) -> None:
    from memcompile.report import build_document, print_report

    document = build_document(result.manifest, result.evaluation, result.gates, name=result.artifact.name)
    print_report(document, output.console())


def with_model(plan: Plan, model: str | None) -> tuple[Plan, str | None]:
    """The plan for the model that the command line names, and the source: the plan's own if it names none."""
    if model is None:
        return plan, plan.model_source()
    # what was typed is relative to where the command runs, not to the plan
    return dataclasses.replace(plan, model=plan.model.model_copy(update={"source": model})), model


def required(source: str | None, plan: Plan) -> str:
    """The model source.

    Raises:
        MemcompileError: MC107, neither the command line nor the plan names one.
    """
    if source is None:
        raise MemcompileError(
            "MC107",
            "there is no model",
            where=plan.where("model"),
            fix="name it: MODEL on the command line, or model.source in the plan",
        )
    return source

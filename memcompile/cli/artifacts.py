"""`memcompile eval`, `bench` and `report`: what an artifact is worth, now and when it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from memcompile.cli import options
from memcompile.cli.output import Output


@click.command("eval")
@options.artifact
@click.option(
    "--text", type=click.Path(path_type=Path), help="The text; that of the artifact's plan if not given."
)
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), help="Tokens of a prompt; the plan's if not given."
)
@click.option("--quick", is_flag=True, help="Measure less: one window, three passkey depths.")
@options.common
def evaluate(
    output: Output, artifact: Path, text: Path | None, prompt_tokens: int | None, quick: bool
) -> None:
    """Measure ARTIFACT here and now: perplexity, passkey, time, memory, state bytes."""
    from memcompile.cli.measure import measure, settings_of

    settings = settings_of(artifact, text, prompt_tokens, quick=quick)
    with output.progress() as progress:
        evaluation, gates = measure(artifact, settings, progress)
    if output.json:
        output.emit(
            {
                "artifact": str(artifact),
                "gates": [gate.as_dict() for gate in gates],
                "rewritten": evaluation.rewritten.as_dict(),
                "attribution": evaluation.attribution.as_dict() if evaluation.attribution else None,
                "settings": settings.as_dict(),
                "notes": list(evaluation.notes),
            }
        )
        return
    from memcompile.artifact import read_manifest
    from memcompile.report import build_document, print_report

    document = build_document(read_manifest(artifact), evaluation, gates, name=str(artifact))
    print_report(document, output.console())


@click.command()
@options.artifact
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), multiple=True, help="Prompt lengths; several may be given."
)
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens timed.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at each length."
)
@options.common
def bench(
    output: Output, artifact: Path, prompt_tokens: tuple[int, ...], new_tokens: int, repeats: int
) -> None:
    """Measure the speed and memory of ARTIFACT at several prompt lengths."""
    from memcompile.cli import measure

    with output.progress() as progress:
        measured = measure.bench(
            artifact, prompt_tokens, new_tokens=new_tokens, repeats=repeats, progress=progress
        )
    if output.json:
        output.emit(measured)
        return
    from memcompile.cli.tables import print_bench

    print_bench(output.console(), measured)


@click.command()
@options.artifact
@options.common
def report(output: Output, artifact: Path) -> None:
    """Show what was measured when ARTIFACT was made, and where its HTML report is."""
    from memcompile.artifact import read_manifest
    from memcompile.report import REPORT_HTML, REPORT_JSON, print_report, read_json

    read_manifest(artifact)
    found = read_json(artifact / REPORT_JSON)
    if output.json:
        output.emit(found)
        return
    console = output.console()
    print_report(found, console)
    if (artifact / REPORT_HTML).exists():
        console.print(f"the whole report: {artifact / REPORT_HTML}", markup=False)


def explain_artifact(artifact: Path) -> dict[str, Any]:
    """What an artifact's manifest says of the passes that made it, and of what each cache now keeps."""
    from memcompile.artifact import read_manifest
    from memcompile.report.document import region_entry

    manifest = read_manifest(artifact)
    refusals = [dict(refusal) for refusal in manifest.refusals]
    passes = [
        {
            "pass": name,
            "options": options,
            "refusals": [refusal for refusal in refusals if refusal.get("pass") == name],
        }
        for entry in manifest.plan.get("passes", [])
        for name, options in entry.items()
    ]
    return {
        "artifact": str(artifact),
        "passes": passes,
        "decisions": list(manifest.decisions),
        "refusals": [refusal for refusal in refusals if not refusal.get("pass")],
        "regions": [region_entry(state, manifest.group(state.group)) for state in manifest.states],
    }

"""`memcompile tune`: measure which implementation is fastest here, and remember it for `optimize`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from memcompile.cli import options
from memcompile.cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

    from memcompile.cli.tune_subject import Subject
    from memcompile.tuning import Database, Outcome, Record, Task

EXAMPLES: Final = """\
\b
Examples:
  memcompile tune model.gguf --prompt-tokens 8000
  memcompile tune out/ --time-budget 300          an artifact, at the workload it was made for
  memcompile tune --heads 32 --kv-heads 8 --width 128 --bits 0 --bits 8 --prompt-tokens 16384
  memcompile tune --plan plan.yaml --again        the plan's model and workload, measured anew
  memcompile tune model.gguf --engine tvm --rpc board:9090     TVM's kernels, timed on another machine
  memcompile tune --list
"""


@click.command(epilog=EXAMPLES)
@click.argument("subject", metavar="MODEL|ARTIFACT", required=False)
@click.option(
    "--plan",
    "plan_path",
    type=click.Path(path_type=Path),
    metavar="PLAN",
    help="Take the workload, the target and, without MODEL, the model from a plan.",
)
@click.option(
    "--backend",
    metavar="NAME",
    help="onnxruntime, torch or tvm; the plan's or the artifact's if not given.",
)
@click.option(
    "--engine",
    type=click.Choice(["spaces", "tvm"]),
    default="spaces",
    show_default=True,
    help="spaces: what the backend declares. tvm: backend tvm, and MetaSchedule for linear layers.",
)
@click.option(
    "--product",
    "products",
    metavar="WxF",
    multiple=True,
    help="With --engine tvm: a linear layer from W to F channels, in place of the model's; may be repeated.",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Schedules that MetaSchedule times for each linear layer.",
)
@click.option(
    "--rpc",
    metavar="HOST:PORT",
    help="Time backend tvm on the machine that runs TVM's RPC server there; docs/tune.md.",
)
@click.option("--heads", type=click.IntRange(min=1), help="Query heads, in place of a model.")
@click.option(
    "--kv-heads", type=click.IntRange(min=1), help="Key/value heads; as many as --heads if not given."
)
@click.option("--width", type=click.IntRange(min=1, max=256), help="Width of a head.")
@click.option("--window", type=click.IntRange(min=1), help="Tokens that a query sees, with --heads.")
@click.option(
    "--sinks", type=click.IntRange(min=0), default=0, help="First tokens that stay visible, with --window."
)
@click.option(
    "--bits", type=click.Choice(["0", "8", "4"]), multiple=True, help="Bits of the cache; may be repeated."
)
@click.option("--prompt-tokens", type=click.IntRange(min=2), help="Tokens of a prompt.")
@click.option(
    "--new-tokens", type=click.IntRange(min=1), help="Tokens after it, to weigh prefill and decode."
)
@click.option("--batch", type=click.IntRange(min=1), help="Rows that decode at once.")
@click.option("--threads", type=click.IntRange(min=1, max=1024), help="Threads of the runtime.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Type of queries and cache; with onnxruntime of cache and products.",
)
@click.option(
    "--time-budget",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="Time for everything; what is left over is tuned by the next call.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of a search too large to try everything."
)
@click.option("--again", is_flag=True, help="Measure also what the database knows.")
@click.option(
    "--database",
    "database_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The database; the user's own if not given.",
)
@click.option("--list", "listing", is_flag=True, help="Show what the database holds, and end.")
@click.option("--clear", is_flag=True, help="Forget what the database holds, and end.")
@options.common
def tune(
    output: Output,
    subject: str | None,
    plan_path: Path | None,
    dtype: str,
    time_budget: float,
    seed: int,
    again: bool,
    database_path: Path | None,
    listing: bool,
    clear: bool,
    bits: tuple[str, ...],
    engine: str,
    trials: int,
    rpc: str | None,
    products: tuple[str, ...],
    **sizes: Any,
) -> None:
    """Measure the attention implementations of a backend on this machine, and remember the fastest.

    MODEL is a Hugging Face folder, a .gguf file or package.module:function, ARTIFACT a directory that
    `optimize` wrote. Prefill and decode of each attention region are timed at the workload; `optimize` then
    uses what was fastest. Results are kept with the machine and the versions they were measured with.
    """
    from memcompile.tuning import Database, Settings
    from memcompile.tuning import tune as search

    database = Database.at(database_path)
    if clear:
        _clear(output, database)
        return
    if listing:
        _list(output, database)
        return
    from memcompile.cli.tune_subject import Asked, subject_of
    from memcompile.cli.tune_tasks import Engine, tasks_of

    with output.progress() as progress:
        asked = Asked(
            plan=plan_path, bits=tuple(int(b) for b in bits), engine=engine, products=products, **sizes
        )
        found = subject_of(subject, asked, progress)
        tasks = tasks_of(found, Engine(dtype, time_budget, trials, rpc))
        outcome = search(
            tasks,
            database,
            seconds=time_budget,
            again=again,
            settings=Settings(seed=seed),
            progress=progress,
        )
    _show(output, found, outcome, _decisions(found, database, tasks[0]), database)


def _decisions(subject: Subject, database: Database, task: Task) -> list[dict[str, Any]]:
    """What `optimize` would decide; caches of other bits are other artifacts."""
    from memcompile.tuning import choose

    decisions: list[dict[str, Any]] = []
    for bits in dict.fromkeys(ask.shape.bits for ask in subject.asks):
        choices = choose(
            database,
            subject.backend,
            [ask for ask in subject.asks if ask.shape.bits == bits],
            subject.workload,
            dtype=task.dtype,
            packages=task.packages,
            chunk=task.space.default.get("chunk"),
        )
        decisions += [{**decision, "bits": bits} for decision in choices.decisions]
    return decisions


def _show(
    output: Output, subject: Subject, outcome: Outcome, decisions: list[dict[str, Any]], database: Database
) -> None:
    from memcompile.cli.tune_subject import as_dict

    if output.json:
        output.emit(
            {
                "backend": subject.backend,
                "workload": as_dict(subject.workload),
                "database": str(database.path),
                "tuned": [record.as_dict() for record in outcome.records],
                "known": [record.as_dict() for record in outcome.known],
                "left": [{"operator": p.operator, "sizes": p.sizes} for p in outcome.left],
                "decisions": decisions,
            }
        )
        return
    console = output.console()
    _print_table(console, [*outcome.known, *outcome.records])
    for record in outcome.records:
        for candidate, reason in record.refused.items():
            console.print(f"refused {candidate}: {reason}", markup=False)
    if outcome.known:
        console.print(f"{len(outcome.known)} of these were known; --again measures them anew", markup=False)
    for problem in outcome.left:
        console.print(f"no time was left for {problem}: call again to go on", markup=False)
    for decision in decisions:
        place = decision.get("regions") or (f"int{decision['bits']} cache" if decision["bits"] else "prompts")
        console.print(f"chosen for {place}: {decision['decision']}", markup=False)
    console.print(f"database: {database.path}", markup=False, soft_wrap=True)


def _list(output: Output, database: Database) -> None:
    records = list(database.records().values())
    if output.json:
        output.emit({"database": str(database.path), "records": [record.as_dict() for record in records]})
        return
    console = output.console()
    places: dict[str, list[Record]] = {}
    for record in records:
        places.setdefault(_place(record), []).append(record)
    for place, group in places.items():
        console.print(place, markup=False)
        _print_table(console, group)
    if not records:
        console.print("nothing was tuned yet", markup=False)
    console.print(f"database: {database.path}", markup=False, soft_wrap=True)


def _clear(output: Output, database: Database) -> None:
    count = database.clear()
    if output.json:
        output.emit({"database": str(database.path), "forgotten": count})
    else:
        output.console().print(f"forgot {count} results of {database.path}", markup=False, soft_wrap=True)


def _place(record: Record) -> str:
    """What a record was measured on, and with."""
    device = record.key.device
    threads = "1 thread" if device["threads"] == 1 else f"{device['threads']} threads"
    with_ = ", ".join(f"{name} {version}" for name, version in record.key.versions.items())
    return f"{record.key.backend} {record.key.dtype} on {device['cpu']} ({device['isa']}), {threads}; {with_}"


def _print_table(console: Console, records: Iterable[Record]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from memcompile.tuning import DECODE, PREFILL, Problem, Product, crossover

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("what")
    for name in ("default", "time", "tuned", "time", "gain", "spread"):
        table.add_column(name, justify="left" if name in ("default", "tuned") else "right")
    for record in records:
        kind: Any = Problem if record.key.operator in (PREFILL, DECODE) else Product
        if record.key.operator.startswith(crossover.SPARSE):
            kind = crossover.Length
        problem = kind.from_sizes(record.key.operator, record.key.sizes)
        same = record.winner == record.default
        cells = [
            str(problem),
            str(record.default),
            _seconds(record.estimate(record.default)),
            "the default" if same else str(record.winner),
            "" if same else _seconds(record.estimate(record.winner)),
            "" if same else f"{record.gain.safe:.2f}x",
            "" if same else f"{record.gain.low:.2f}-{record.gain.high:.2f}",
        ]
        table.add_row(*(escape(cell) for cell in cells))
    console.print(table)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.2f} s"

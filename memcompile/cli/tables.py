"""Results as tables for a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memcompile.plan import Plan
from memcompile.plan.units import format_bytes

Json = Mapping[str, Any]
COSTS: Final[tuple[tuple[str, str], ...]] = (
    ("prefill_seconds", "time to first token"),
    ("decode_seconds_per_token", "time per token"),
    ("peak_memory_bytes", "peak memory"),
    ("state_bytes", "state"),
)


def print_inspection(console: Console, found: Json) -> None:
    """The regions of a model; consecutive layers that are alike share a row."""
    regions: Sequence[Json] = found["regions"]
    console.print(
        f"{escape(str(found['model']))}: {found['parameters']:,} parameters, {len(regions)} attention regions"
    )
    table = _table("layers", "heads", "kv heads", "head dim", "mask", "window", "path")
    for _, group in groupby(regions, key=_alike):
        rows = list(group)
        first, last = rows[0], rows[-1]
        layers = str(first["layer"]) if len(rows) == 1 else f"{first['layer']}-{last['layer']}"
        path = first["path"] if len(rows) == 1 else f"{first['path']} …"
        window = first["window_tokens"]
        cells = (
            layers,
            first["heads"],
            first["kv_heads"],
            first["head_dim"],
            first["mask"],
            window or "",
            path,
        )
        table.add_row(*(escape(str(cell)) for cell in cells))
    if regions:
        console.print(table)
    print_refusals(console, found.get("refusals", ()))


def print_refusals(console: Console, refusals: Iterable[Json], indent: str = "") -> None:
    """Refusals, those with one reason together."""
    places: dict[str, list[str]] = {}
    for refusal in refusals:
        places.setdefault(refusal["reason"], []).append(refusal["where"])
    for reason, where in places.items():
        more = f" and {len(where) - 3} more" if len(where) > 3 else ""
        console.print(
            f"{indent}[yellow]refused[/yellow] {escape(', '.join(where[:3]))}{more}: {escape(reason)}"
        )


def print_explanation(console: Console, explanation: Json) -> None:
    """What each pass matched, and why it refused the rest."""
    for entry in explanation["passes"]:
        console.print(f"[bold]{entry['pass']}[/bold]{_place(entry)}: {escape(_matched(entry))}")
        if problem := entry.get("problem"):
            console.print(f"  [red]{escape(problem['message'])}[/red]; {escape(problem['fix'])}")
        print_refusals(console, entry["refusals"], indent="  ")
    if not explanation["passes"]:
        console.print("the plan has no passes: the model is compiled as it is")
    for decision in explanation.get("decisions", ()):
        console.print(f"decided: {escape(_sentence(decision))}")
    print_refusals(console, explanation["refusals"])
    for region in explanation.get("regions", ()):
        console.print(f"region {escape(str(region['region']))}: {escape(str(region['summary']))}")
    print_state_bytes(console, explanation.get("state_bytes"))
    if step := explanation.get("step_bytes"):
        before, after = (sum(step[side].values()) for side in ("original", "rewritten"))
        console.print(
            f"bytes of a decode step: {format_bytes(before)} -> {format_bytes(after)}; {step['bound']}"
        )


def _place(entry: Json) -> str:
    return f" [dim]{escape(str(entry['where']))}[/dim]" if entry.get("where") else ""


def _matched(entry: Json) -> str:
    """What a pass would rewrite; an artifact only knows the options it was made with."""
    if "options" in entry:
        return ", ".join(f"{key} {value}" for key, value in entry["options"].items() if value is not None)
    return f"matches {_ranges(entry['matched']) if entry['matched'] else 'nothing'}"


def print_order(console: Console, order: Json) -> None:
    """The passes in the order they run, and what each waits for."""
    passes: Sequence[Json] = order["passes"]
    for index, entry in enumerate(passes):
        console.print(f"{index + 1}. [bold]{entry['pass']}[/bold] [dim]{escape(entry['where'])}[/dim]")
        for edge in order["edges"]:
            if edge["after"] == index:
                before = passes[edge["before"]]["pass"]
                console.print(f"   after {edge['before'] + 1}. {before}: it {escape(edge['reason'])}")


def print_plan(console: Console, plan: Plan, payload: Json) -> None:
    """The resolved plan as YAML, then what it would do."""
    import io

    from ruamel.yaml import YAML

    text = io.StringIO()
    yaml = YAML(pure=True)
    yaml.width = 10_000
    yaml.dump(_without_none(payload["plan"]), text)
    console.print(f"[dim]# {escape(plan.name)}, resolved[/dim]")
    console.print(text.getvalue().rstrip(), markup=False, soft_wrap=True)
    if "passes" in payload:
        console.print()
        print_explanation(console, payload)
    else:
        console.print("[dim]no model is named: regions and cost are not known[/dim]")


def print_state_bytes(console: Console, state_bytes: Json | None) -> None:
    """Predicted bytes of the cache, before and after."""
    if not state_bytes:
        return
    before, after = state_bytes["original"], state_bytes["rewritten"]
    share = f", {after / before:.1%} of it" if before else ""
    console.print(
        f"predicted state at the plan's workload: {format_bytes(before)} -> {format_bytes(after)}{share}"
    )


def print_bench(console: Console, measured: Json) -> None:
    """One row a prompt length."""
    table = _table("prompt tokens", *(title for _, title in COSTS))
    for row in measured["lengths"]:
        table.add_row(f"{row['prompt_tokens']:,}", *(_amount(key, row.get(key)) for key, _ in COSTS))
    console.print(table)


def _amount(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key.endswith("_bytes"):
        return format_bytes(value)
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def print_methods(console: Console, methods: Iterable[Json]) -> None:
    """Each pass, and its presets below it."""
    for method in methods:
        if method["preset"] is None:
            console.print(f"[bold]{method['pass']}[/bold]  {escape(method['summary'])}")
            console.print(f"    {method['exactness']}; on {', '.join(method['backends'])}", style="dim")
        else:
            console.print(f"  [cyan]{method['preset']}[/cyan]  {escape(method['paper'])}")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or column in ("mask", "path") else "right")
    return table


def _alike(region: Json) -> tuple[Any, ...]:
    return tuple(region[key] for key in ("heads", "kv_heads", "head_dim", "mask", "window_tokens"))


def _ranges(names: Sequence[Any]) -> str:
    """`0-3, 7` for numbers; other names as they are."""
    texts = [str(name) for name in names]
    if not all(text.isdigit() for text in texts):
        more = f" and {len(texts) - 4} more" if len(texts) > 5 else ""
        return ", ".join(texts[:4] if more else texts) + more
    runs: list[list[int]] = []
    for number in sorted(int(text) for text in texts):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer {spans}" if len(texts) == 1 else f"layers {spans} ({len(texts)} regions)"


def _sentence(decision: Any) -> str:
    return (
        ", ".join(f"{key} {value}" for key, value in decision.items())
        if isinstance(decision, Mapping)
        else str(decision)
    )


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value

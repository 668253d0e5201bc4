"""The manager: orders the passes of a plan, runs them, and checks each one's word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memcompile.calibrate.collect import Calibration, CalibrationData
from memcompile.dialect import Cost
from memcompile.errors import MemcompileError
from memcompile.progress import SILENT, Progress
from memcompile.regions import AttentionRegion, Refusal, Region, attention_regions, copy_graph
from memcompile.rewrite.emit import Decision, Emit
from memcompile.rewrite.entry import PassEntry, Workload
from memcompile.rewrite.fingerprint import graph_lines
from memcompile.rewrite.journal import Journal
from memcompile.rewrite.order import Loaded, ordered
from memcompile.rewrite.pass_ import Context, Pass
from memcompile.rewrite.registry import load_pass
from memcompile.rewrite.selectors import Site
from memcompile.rewrite.verify import verify

Accepted = tuple[Region, Any]


@dataclass(frozen=True, slots=True)
class PassOutcome:
    """What one pass did.

    selected: names of the regions the plan pointed at; rewritten: of those that the pass changed.
    cost: predicted, of decoding one token in the rewritten regions; None without a workload.
    """

    entry: PassEntry
    selected: tuple[str, ...]
    rewritten: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    decisions: tuple[Decision, ...]
    calibration: Calibration | None
    cost: Cost | None

    def as_dict(self) -> dict[str, Any]:
        """The outcome as `explain --json` and the manifest have it."""
        return {
            "pass": self.entry.name,
            "where": self.entry.where,
            "config": self.entry.config.model_dump(mode="json"),
            "layers": None if self.entry.layers is None else str(self.entry.layers),
            "heads": None if self.entry.heads is None else str(self.entry.heads),
            "selected": list(self.selected),
            "rewritten": list(self.rewritten),
            "refusals": [{"where": r.where, "reason": r.reason} for r in self.refusals],
            "decisions": [decision.as_dict() for decision in self.decisions],
            "calibration": None if self.calibration is None else self.calibration.as_dict(),
            "state_bytes": None if self.cost is None else self.cost.state_bytes,
        }


@dataclass(frozen=True, slots=True)
class RewriteResult:
    """The rewritten graph (the one given), the journal, and the outcomes in the order the passes ran."""

    graph: fx.GraphModule
    journal: Journal
    outcomes: tuple[PassOutcome, ...]

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(refusal for outcome in self.outcomes for refusal in outcome.refusals)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(decision for outcome in self.outcomes for decision in outcome.decisions)

    @property
    def calibrations(self) -> dict[str, dict[str, Any]]:
        """What was calibrated, by pass name and place in the order: "kv.quantize.0"."""
        return {
            f"{outcome.entry.name}.{index}": outcome.calibration.as_dict()
            for index, outcome in enumerate(self.outcomes)
            if outcome.calibration is not None
        }

    def as_dict(self) -> dict[str, Any]:
        return {"passes": [o.as_dict() for o in self.outcomes], "journal": self.journal.as_dicts()}


def apply(
    graph_module: fx.GraphModule,
    entries: Sequence[PassEntry],
    *,
    workload: Workload | None = None,
    calibration: CalibrationData | None = None,
    progress: Progress = SILENT,
    strict: bool = True,
) -> RewriteResult:
    """Run the passes of a plan on a captured forward graph, in place.

    After an error the graph may be half rewritten: capture it again. With `strict` off, a pass that changes
    nothing or is refused everywhere is reported in its outcome only; selectors and contradictions raise.

    Raises:
        MemcompileError: MC109, passes contradict each other; MC107, calibration data is needed;
            MC102, `heads:` for a pass that takes none; MC301, a selector matches nothing;
            MC302, fewer regions than expected; MC303, a pass is refused everywhere;
            MC305, a pass would change nothing at the workload; MC901, a pass broke its contract.
    """
    loaded = [(entry, load_pass(entry.name, where=entry.where or None)) for entry in entries]
    _refuse_overlaps(graph_module, loaded)
    recovering = any(one.recovers(entry.config) for entry, one in loaded)
    original = copy_graph(graph_module) if recovering else None
    journal = Journal()
    outcomes: list[PassOutcome] = []
    for entry, rewrite_pass in ordered(loaded):
        progress.stage(entry.name)
        if strict:
            _refuse_idle(entry, rewrite_pass, workload)
        run = _Run(graph_module, entry, rewrite_pass, workload, journal)
        outcome = run.run(calibration, original, progress)
        if strict:
            _require_coverage(outcome, rewrite_pass)
        outcomes.append(outcome)
    return RewriteResult(graph_module, journal, tuple(outcomes))


def select(
    graph_module: fx.GraphModule, entry: PassEntry, rewrite_pass: Pass[Any, Any, Any]
) -> list[tuple[Region, tuple[int, ...] | str | None]]:
    """The regions that an entry points at, each with its heads: None for all, a text when they cannot be had.

    Raises:
        MemcompileError: MC301, a selector matches nothing; MC102, the pass takes no heads.
    """
    if entry.heads is not None and not rewrite_pass.takes_heads:
        raise MemcompileError(
            "MC102",
            f"{entry.name}.heads: this pass acts on whole layers",
            where=entry.where or None,
            fix="remove heads:",
        )
    regions = list(rewrite_pass.regions(graph_module))
    sites = _sites(attention_regions(graph_module))
    if entry.heads is not None:
        entry.heads.check_layers(sites)
    layers = rewrite_pass.layers(entry.config, sites)
    if entry.layers is not None:
        layers &= entry.layers.resolve(sites)
    chosen: list[tuple[Region, tuple[int, ...] | str | None]] = []
    for region in rewrite_pass.selected(regions, entry.config):
        heads = _heads_of(region, regions, entry, sites)
        # what stands outside of all layers is meant only where no layers are named
        inside = region.layer in layers if region.layer is not None else entry.layers is None
        if inside and heads != ():
            chosen.append((region, heads))
    if not chosen and regions:
        raise MemcompileError(
            "MC301",
            f"{entry.name}: layers: {entry.layers or 'all'} and heads: {entry.heads or 'all'} select nothing",
            where=entry.where or None,
            fix=f"the model has {len(sites)} attention layers; see `memcompile inspect`",
        )
    return chosen


def _heads_of(
    region: Region, regions: Sequence[Region], entry: PassEntry, sites: Sequence[Site]
) -> tuple[int, ...] | str | None:
    """The heads of the model, among those the region serves, that the entry asks for."""
    if entry.heads is None or not isinstance(region, AttentionRegion):
        return None
    attentions = [r for r in regions if isinstance(r, AttentionRegion)]
    same_layer = [r for r in attentions if (r.layer, r.path) == (region.layer, region.path)]
    kv_heads = sum(r.kv_heads for r in same_layer)
    wanted = entry.heads.resolve(region.layer, sites, sum(r.heads for r in same_layer), kv_heads)
    if isinstance(wanted, str):
        return wanted
    return tuple(head for head in wanted if head in region.kv_head_ids)


def _sites(regions: Sequence[AttentionRegion]) -> list[Site]:
    return list(dict.fromkeys(Site(region.layer, region.path) for region in regions))


def _refuse_overlaps(graph_module: fx.GraphModule, loaded: Sequence[Loaded]) -> None:
    """Two entries of one pass must not both claim a head or a weight: the plan would say two things."""
    claimed: dict[tuple[str, str, int | str, int], PassEntry] = {}
    if len({entry.name for entry, _ in loaded}) == len(loaded):
        return
    for entry, rewrite_pass in loaded:
        claim = rewrite_pass.claim(entry.config)
        for region, heads in select(graph_module, entry, rewrite_pass):
            attention = isinstance(region, AttentionRegion)
            parts = region.kv_head_ids if isinstance(region, AttentionRegion) else (0,)
            for part in parts if heads is None or isinstance(heads, str) else heads:
                place = region.layer if attention and region.layer is not None else region.region
                other = claimed.setdefault((entry.name, claim, place, part), entry)
                if other is not entry:
                    raise MemcompileError(
                        "MC109",
                        f"{entry.name} is asked for twice in "
                        + (f"layer {region.layer}" if attention else region.region),
                        where=", ".join(place for place in (other.where, entry.where) if place) or None,
                        fix="give the two entries layers: that do not overlap",
                    )


def _refuse_idle(entry: PassEntry, rewrite_pass: Pass[Any, Any, Any], workload: Workload | None) -> None:
    if workload is None:
        return
    reason = rewrite_pass.changes_nothing(entry.config, workload)
    if reason is not None:
        raise MemcompileError(
            "MC305",
            f"{entry.name}: {reason}",
            where=entry.where or None,
            fix="lower the budget, raise the workload's sizes, or leave the pass out",
        )


def _require_coverage(outcome: PassOutcome, rewrite_pass: Pass[Any, Any, Any]) -> None:
    entry, done = outcome.entry, len(outcome.rewritten)
    reasons = _reasons(outcome.refusals)
    if done == 0:
        why = f"the model has no {rewrite_pass.region_kind} that was recognised"
        if outcome.selected:
            why = f"refused in all {len(outcome.selected)} selected regions: {reasons}"
        raise MemcompileError(
            "MC303",
            f"{entry.name}: {why}",
            where=entry.where or None,
            fix="change layers:, or leave the pass out; `memcompile explain` lists every refusal",
        )
    if entry.expect is not None and done < entry.expect:
        raise MemcompileError(
            "MC302",
            f"{entry.name}: expect is {entry.expect}, and {done} regions were rewritten"
            + (f"; refused: {reasons}" if reasons else ""),
            where=entry.where or None,
            fix=f"select more layers, or set expect: {done}",
        )


def _reasons(refusals: Sequence[Refusal], shown: int = 3) -> str:
    """The refusals, those with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for refusal in refusals:
        by_reason.setdefault(refusal.reason, []).append(refusal.where)
    parts = [
        f"{reason} ({places[0]}" + (f" and {len(places) - 1} more)" if len(places) > 1 else ")")
        for reason, places in by_reason.items()
    ]
    return "; ".join(parts[:shown]) + ("; ..." if len(parts) > shown else "")


class _Run:
    """One pass on one graph."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        entry: PassEntry,
        rewrite_pass: Pass[Any, Any, Any],
        workload: Workload | None,
        journal: Journal,
    ) -> None:
        self.graph_module = graph_module
        self.entry = entry
        self.rewrite_pass = rewrite_pass
        self.workload = workload
        self.journal = journal

    def run(
        self, data: CalibrationData | None, original: fx.GraphModule | None, progress: Progress
    ) -> PassOutcome:
        """Select, check, calibrate, rewrite, recover. original: the graph before any pass, to recover by."""
        before = graph_lines(self.graph_module)
        selected = select(self.graph_module, self.entry, self.rewrite_pass)
        accepted, refusals = self._check(selected)
        if graph_lines(self.graph_module) != before:
            raise self._broke("check changed the graph")
        recovers = bool(accepted) and self.rewrite_pass.recovers(self.entry.config)
        if recovers:
            data = self._required(data)
        calibration = self._calibrate(accepted, data, progress)
        # before rewriting: a pass may erase the node a region is read from
        cost = self._cost(accepted)
        written = len(self.journal.entries)
        decisions: list[Decision] = []
        for region, facts in accepted:
            statistics = {} if calibration is None else calibration.statistics.get(region.region, {})
            decisions += self._rewrite(region, facts, statistics)
        if recovers and original is not None and data is not None:
            verify(self.graph_module, self.entry.name)
            decisions += self._recover(original, data, progress)
        if accepted:
            verify(self.graph_module, self.entry.name)
            self._compare(before, self.journal.since(written))
        return PassOutcome(
            entry=self.entry,
            selected=tuple(region.region for region, _ in selected),
            rewritten=tuple(region.region for region, _ in accepted),
            refusals=tuple(refusals),
            decisions=tuple(decisions),
            calibration=calibration,
            cost=cost,
        )

    def _check(
        self, selected: Sequence[tuple[Region, tuple[int, ...] | str | None]]
    ) -> tuple[list[Accepted], list[Refusal]]:
        accepted: list[Accepted] = []
        refusals: list[Refusal] = []
        for region, heads in selected:
            if isinstance(heads, str):
                refusals.append(
                    self.rewrite_pass.refuse(region, f"heads {self.entry.heads}: the layer {heads}")
                )
                continue
            verdict = self.rewrite_pass.check(region, self.entry.config, Context(heads, self.workload))
            if isinstance(verdict, Refusal):
                refusals.append(verdict)
            else:
                accepted.append((region, verdict))
        return accepted, refusals

    def _calibrate(
        self, accepted: Sequence[Accepted], data: CalibrationData | None, progress: Progress
    ) -> Calibration | None:
        if not accepted or not self.rewrite_pass.needs_calibration(self.entry.config):
            return None
        data = self._required(data)
        progress.stage(f"calibrate for {self.entry.name}")
        regions = [region for region, _ in accepted]
        return self.rewrite_pass.calibrate(self.graph_module, regions, self.entry.config, data, progress)

    def _recover(self, original: fx.GraphModule, data: CalibrationData, progress: Progress) -> list[Decision]:
        progress.stage(f"recover after {self.entry.name}")
        emit = Emit(self.graph_module, self.entry.name, "model", self.journal)
        self.rewrite_pass.recover(original, self.graph_module, self.entry.config, data, progress, emit)
        return emit.decisions

    def _required(self, data: CalibrationData | None) -> CalibrationData:
        if data is None or not data.windows:
            raise MemcompileError(
                "MC107",
                f"data.calibration: {self.entry.name} needs it, and it is missing",
                where=self.entry.where or None,
                fix="name a text: data: {calibration: {text: book.txt, tokens: 16384}}",
            )
        return data

    def _rewrite(self, region: Region, facts: Any, statistics: Mapping[str, torch.Tensor]) -> list[Decision]:
        written = len(self.journal.entries)
        emit = Emit(self.graph_module, self.entry.name, region.region, self.journal, statistics)
        self.rewrite_pass.rewrite(region, facts, emit)
        if len(self.journal.entries) == written:
            raise self._broke(f"accepted region {region.region} and changed nothing in it")
        return emit.decisions

    def _compare(self, before: Mapping[str, str], written: Journal) -> None:
        """The graph must differ from before exactly where the journal says."""
        after = graph_lines(self.graph_module)
        made = {name for name in after if name not in before}
        changed = {name for name in after if name in before and after[name] != before[name]}
        erased = {name for name in before if name not in after}
        if unnamed := made - written.names("made"):
            raise self._broke(f"made nodes without the journal: {', '.join(sorted(unnamed))}")
        if unnamed := changed - written.names("made", "changed", "marked"):
            raise self._broke(f"changed nodes without the journal: {', '.join(sorted(unnamed))}")
        if unnamed := erased - written.names("erased"):
            raise self._broke(f"erased nodes without the journal: {', '.join(sorted(unnamed))}")
        if not (made or changed or erased):
            raise self._broke("said that it changed the graph, and did not")

    def _cost(self, accepted: Sequence[Accepted]) -> Cost | None:
        if self.workload is None:
            return None
        total = Cost()
        for region, facts in accepted:
            total = total + self.rewrite_pass.cost(region, facts, self.workload)
        return total

    def _broke(self, rule: str) -> MemcompileError:
        return MemcompileError("MC901", f"{self.entry.name} {rule}", where=self.entry.where or None)

"""The journal: which pass made, changed or erased which node, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Action = Literal["made", "changed", "marked", "erased", "stored"]


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One thing a pass did. `node` is a node's name, or a buffer's for "stored"."""

    pass_name: str
    action: Action
    node: str
    region: str
    detail: str = ""

    def as_dict(self) -> dict[str, str]:
        return {
            "pass": self.pass_name,
            "action": self.action,
            "node": self.node,
            "region": self.region,
            "detail": self.detail,
        }


@dataclass(slots=True)
class Journal:
    """What was done to a graph, in order."""

    entries: list[JournalEntry] = field(default_factory=list)

    def add(self, pass_name: str, action: Action, node: str, region: str, detail: str = "") -> None:
        self.entries.append(JournalEntry(pass_name, action, node, region, detail))

    def names(self, *actions: Action) -> set[str]:
        """The names of the nodes that any of `actions` was done to; of all, when none is given."""
        return {entry.node for entry in self.entries if not actions or entry.action in actions}

    def since(self, count: int) -> Journal:
        """The entries after the first `count`."""
        return Journal(self.entries[count:])

    def as_dicts(self) -> list[dict[str, str]]:
        return [entry.as_dict() for entry in self.entries]

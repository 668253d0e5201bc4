"""Where a pass applies: selectors of layers and of heads, as people write them in a plan.

Layers: a number, a range "2-29", a share of the depth "33%-67%", "every 4", "every 4 from 2",
{every: 4, from: 2}, a glob on the module path "model.layers.*", a regular expression "re:layers\\.[0-3]\\.",
"all", any of these negated with "!", several with commas or as a list. Negated terms take away from the
others, or from all layers when there are no others.

Heads: key/value heads as numbers and ranges, the same for every layer, or a mapping from layers to heads;
{query: [...]} counts query heads instead, and must name whole groups.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final, Protocol

from memcompile.errors import MemcompileError

_INTEGER: Final = re.compile(r"\d+")
_RANGE: Final = re.compile(r"(\d+)\s*-\s*(\d+)")
_SHARE: Final = re.compile(r"(\d+(?:\.\d+)?)%\s*-\s*(\d+(?:\.\d+)?)%")
_EVERY: Final = re.compile(r"every\s+(\d+)(?:\s+from\s+(\d+))?")
_LAYER_FORMS: Final = 'write 7, "2-29", "33%-67%", "every 4", a glob like "model.layers.*", or "re:..."'


@dataclass(frozen=True, slots=True)
class Site:
    """An attention layer of a model: its number and its module path."""

    layer: int
    path: str


class Term(Protocol):
    """One positive part of a layer selector."""

    def layers(self, sites: Sequence[Site]) -> frozenset[int]: ...


@dataclass(frozen=True, slots=True)
class Range:
    """Layers (or heads) `first` to `last`, both included."""

    first: int
    last: int

    def layers(self, sites: Sequence[Site]) -> frozenset[int]:
        return frozenset(s.layer for s in sites if self.first <= s.layer <= self.last)


@dataclass(frozen=True, slots=True)
class Share:
    """Layers between two depths; 0 is before the first layer and 1 after the last. May be empty."""

    first: float
    last: float

    def layers(self, sites: Sequence[Site]) -> frozenset[int]:
        ordered = sorted({s.layer for s in sites})
        begin, end = (int(share * len(ordered) + 0.5) for share in (self.first, self.last))
        return frozenset(ordered[begin:end])


@dataclass(frozen=True, slots=True)
class Every:
    """Layers `start`, `start + step`, `start + 2 step`, ..."""

    step: int
    start: int

    def layers(self, sites: Sequence[Site]) -> frozenset[int]:
        return frozenset(
            s.layer for s in sites if s.layer >= self.start and (s.layer - self.start) % self.step == 0
        )


@dataclass(frozen=True, slots=True)
class Glob:
    """Layers whose module path, or that of a module around them, matches a shell pattern."""

    pattern: str

    def layers(self, sites: Sequence[Site]) -> frozenset[int]:
        return frozenset(s.layer for s in sites if any(self._matches(p) for p in _path_and_parents(s.path)))

    def _matches(self, path: str) -> bool:
        return fnmatch.fnmatchcase(path, self.pattern)


@dataclass(frozen=True, slots=True)
class Regex:
    """Layers in whose module path the expression is found."""

    pattern: re.Pattern[str]

    def layers(self, sites: Sequence[Site]) -> frozenset[int]:
        return frozenset(s.layer for s in sites if self.pattern.search(s.path))


@dataclass(frozen=True, slots=True)
class SelectorTerm:
    """A term as it was written, and whether it takes layers away."""

    text: str
    term: Term
    negated: bool


@dataclass(frozen=True, slots=True)
class LayerSelector:
    """A parsed `layers:` value."""

    terms: tuple[SelectorTerm, ...]
    text: str
    where: str | None = None

    def __str__(self) -> str:
        return self.text

    def resolve(self, sites: Sequence[Site]) -> frozenset[int]:
        """The numbers of the selected layers.

        Raises:
            MemcompileError: MC301, the selector or one of its terms matches no layer of the model.
        """
        chosen: set[int] = set()
        removed: set[int] = set()
        for part in self.terms:
            matched = part.term.layers(sites)
            if not matched and not isinstance(part.term, Share):
                raise self._matches_nothing(part, sites)
            (removed if part.negated else chosen).update(matched)
        if all(part.negated for part in self.terms):
            chosen = {site.layer for site in sites}
        if not chosen - removed:
            raise MemcompileError(
                "MC301",
                f"layers: {self.text!r} selects no layer: all it names are excluded again",
                where=self.where,
                fix=f"the attention layers are {_summary(sites)}",
            )
        return frozenset(chosen - removed)

    def _matches_nothing(self, part: SelectorTerm, sites: Sequence[Site]) -> MemcompileError:
        known = (
            f"the {len(sites)} attention layers ({_summary(sites)})"
            if sites
            else "the model's attention layers"
        )
        return MemcompileError(
            "MC301",
            f"layers: {part.text!r} matches none of {known}",
            where=self.where,
            fix=_nearest(part, sites),
        )


@dataclass(frozen=True, slots=True)
class HeadRule:
    """Heads for some layers: `kind` is "kv" or "query"; `layers` None: all of them."""

    layers: LayerSelector | None
    kind: str
    terms: tuple[SelectorTerm, ...]
    text: str

    def numbers(self, count: int) -> frozenset[int] | str:
        """The chosen heads of `count`, or why there are none such."""
        chosen: set[int] = set()
        removed: set[int] = set()
        for part in self.terms:
            assert isinstance(part.term, Range)
            if part.term.last >= count:
                kind = "key/value" if self.kind == "kv" else "query"
                return f"has {count} {kind} heads (0-{count - 1}), so head {part.term.last} does not exist"
            (removed if part.negated else chosen).update(range(part.term.first, part.term.last + 1))
        if all(part.negated for part in self.terms):
            chosen = set(range(count))
        return frozenset(chosen - removed)


@dataclass(frozen=True, slots=True)
class HeadSelector:
    """A parsed `heads:` value."""

    rules: tuple[HeadRule, ...]
    text: str
    where: str | None = None

    def __str__(self) -> str:
        return self.text

    def check_layers(self, sites: Sequence[Site]) -> None:
        """Raise MC301 when a layer named by the selector does not exist."""
        for rule in self.rules:
            if rule.layers is not None:
                rule.layers.resolve(sites)

    def resolve(self, layer: int, sites: Sequence[Site], heads: int, kv_heads: int) -> tuple[int, ...] | str:
        """Key/value heads chosen in `layer`, or the reason why the choice cannot be honoured there."""
        found: set[int] = set()
        for rule in self.rules:
            if rule.layers is not None and layer not in rule.layers.resolve(sites):
                continue
            numbers = rule.numbers(kv_heads if rule.kind == "kv" else heads)
            if isinstance(numbers, str):
                return numbers
            if rule.kind == "query":
                whole = _whole_groups(numbers, heads // kv_heads)
                if isinstance(whole, str):
                    return whole
                numbers = whole
            found |= numbers
        return tuple(sorted(found))


def parse_layers(value: object, *, where: str | None = None) -> LayerSelector:
    """Read a `layers:` value.

    Raises:
        MemcompileError: MC102, MC103 or MC104, the value is not a selector.
    """
    if isinstance(value, LayerSelector):
        return value
    items = value if isinstance(value, list | tuple) else [value]
    terms = tuple(term for item in items for term in _layer_terms(item, where))
    if not terms:
        raise MemcompileError(
            "MC104", "layers: is empty, so it selects nothing", where=where, fix=_LAYER_FORMS
        )
    return LayerSelector(terms, _written(value), where)


def parse_heads(value: object, *, where: str | None = None) -> HeadSelector:
    """Read a `heads:` value.

    Raises:
        MemcompileError: MC102, MC103 or MC104, the value is not a selector.
    """
    if isinstance(value, HeadSelector):
        return value
    if isinstance(value, Mapping) and not set(value) & {"kv", "query"}:
        rules = tuple(
            _head_rule(heads, parse_layers(layers, where=where), where) for layers, heads in value.items()
        )
    else:
        rules = (_head_rule(value, None, where),)
    if not rules:
        raise MemcompileError(
            "MC104", "heads: is empty, so it selects nothing", where=where, fix='write [0, 2] or "0-2"'
        )
    return HeadSelector(rules, _written(value), where)


def _layer_terms(item: object, where: str | None) -> list[SelectorTerm]:
    if isinstance(item, bool) or not isinstance(item, int | str | Mapping):
        raise MemcompileError(
            "MC103",
            f"layers: {item!r} is a {type(item).__name__}, not a layer selector",
            where=where,
            fix=_LAYER_FORMS,
        )
    if isinstance(item, int):
        return [SelectorTerm(str(item), _ordered(item, item, str(item), where), negated=False)]
    if isinstance(item, Mapping):
        return [_every_mapping(item, where)]
    # a regular expression may hold commas
    pieces = [item] if item.strip().removeprefix("!").startswith("re:") else item.split(",")
    return [_layer_term(piece.strip(), where) for piece in pieces]


def _layer_term(text: str, where: str | None) -> SelectorTerm:
    body = text.removeprefix("!").strip()
    negated = text.startswith("!")
    if not body:
        raise MemcompileError("MC104", f"layers: {text!r} is an empty term", where=where, fix=_LAYER_FORMS)
    return SelectorTerm(text, _positive_term(body, where), negated)


def _positive_term(body: str, where: str | None) -> Term:
    if body == "all":
        return Glob("*")
    if _INTEGER.fullmatch(body):
        return Range(int(body), int(body))
    if match := _RANGE.fullmatch(body):
        return _ordered(int(match[1]), int(match[2]), body, where)
    if match := _SHARE.fullmatch(body):
        first, last = float(match[1]) / 100, float(match[2]) / 100
        if not 0 <= first <= last <= 1:
            raise MemcompileError(
                "MC104", f"layers: {body!r} is not within 0%-100%", where=where, fix=_LAYER_FORMS
            )
        return Share(first, last)
    if match := _EVERY.fullmatch(body):
        return _every(int(match[1]), int(match[2] or 0), where)
    if body.startswith("re:"):
        try:
            return Regex(re.compile(body[3:]))
        except re.error as error:
            raise MemcompileError(
                "MC104",
                f"layers: {body[3:]!r} is not a regular expression: {error}",
                where=where,
                fix=_LAYER_FORMS,
            ) from error
    if not re.match(r"[\w*?\[]", body) or re.match(r"\d", body):
        raise MemcompileError(
            "MC104", f"layers: {body!r} is not a layer selector", where=where, fix=_LAYER_FORMS
        )
    return Glob(body)


def _every_mapping(item: Mapping[object, object], where: str | None) -> SelectorTerm:
    for key in item:
        if key not in ("every", "from"):
            raise MemcompileError(
                "MC102",
                f"layers.{key}: unknown key",
                where=where,
                fix="write {every: 4} or {every: 4, from: 2}",
            )
    if "every" not in item:
        raise MemcompileError("MC107", "layers.every: missing", where=where, fix="write {every: 4, from: 2}")
    step, start = item["every"], item.get("from", 0)
    for name, number in (("every", step), ("from", start)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise MemcompileError(
                "MC103",
                f"layers.{name}: {number!r} is not a whole number",
                where=where,
                fix="write {every: 4, from: 2}",
            )
    assert isinstance(step, int)
    assert isinstance(start, int)
    return SelectorTerm(f"every {step} from {start}", _every(step, start, where), negated=False)


def _every(step: int, start: int, where: str | None) -> Every:
    if step < 1 or start < 0:
        raise MemcompileError(
            "MC104",
            f"layers: every {step} from {start} is out of range",
            where=where,
            fix="every is at least 1, from at least 0",
        )
    return Every(step, start)


def _ordered(first: int, last: int, text: str, where: str | None, what: str = "layers") -> Range:
    if first < 0 or last < first:
        raise MemcompileError(
            "MC104",
            f"{what}: {text!r} is not a range of numbers from 0",
            where=where,
            fix=f'write "{min(abs(first), abs(last))}-{max(abs(first), abs(last))}"',
        )
    return Range(first, last)


def _head_rule(value: object, layers: LayerSelector | None, where: str | None) -> HeadRule:
    kind = "kv"
    if isinstance(value, Mapping):
        if len(value) != 1 or next(iter(value)) not in ("kv", "query"):
            raise MemcompileError(
                "MC102",
                f"heads: {_written(value)!r} is not {{kv: ...}} or {{query: ...}}",
                where=where,
                fix="write {query: [0, 1, 2]}",
            )
        ((kind, value),) = value.items()
    items = value if isinstance(value, list | tuple) else [value]
    terms = tuple(term for item in items for term in _head_terms(item, where))
    if not terms:
        raise MemcompileError(
            "MC104", "heads: is empty, so it selects nothing", where=where, fix='write [0, 2] or "0-2"'
        )
    return HeadRule(layers, kind, terms, _written(value))


def _head_terms(item: object, where: str | None) -> Iterable[SelectorTerm]:
    if isinstance(item, bool) or not isinstance(item, int | str):
        raise MemcompileError(
            "MC103",
            f"heads: {item!r} is a {type(item).__name__}, not head numbers",
            where=where,
            fix='write [0, 2] or "0-2"',
        )
    for piece in str(item).split(","):
        text = piece.strip()
        body = text.removeprefix("!").strip()
        match = _RANGE.fullmatch(body)
        if match is None and not _INTEGER.fullmatch(body):
            raise MemcompileError(
                "MC104",
                f"heads: {text!r} is not a head number or range",
                where=where,
                fix='write [0, 2] or "0-2"',
            )
        first, last = (int(match[1]), int(match[2])) if match else (int(body), int(body))
        yield SelectorTerm(text, _ordered(first, last, body, where, "heads"), text.startswith("!"))


def _whole_groups(query_heads: frozenset[int], group: int) -> frozenset[int] | str:
    for kv_head in {head // group for head in query_heads}:
        members = set(range(kv_head * group, (kv_head + 1) * group))
        if not members <= query_heads:
            inside = ", ".join(map(str, sorted(members & query_heads)))
            return (
                f"query heads {min(members)}-{max(members)} share key/value head {kv_head}, "
                f"and only {inside} of them was chosen: their cache cannot be split"
            )
    return frozenset(head // group for head in query_heads)


def _path_and_parents(path: str) -> Iterable[str]:
    yield path
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _summary(sites: Sequence[Site]) -> str:
    numbers = sorted({site.layer for site in sites})
    if not numbers:
        return "none"
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))


def _nearest(part: SelectorTerm, sites: Sequence[Site]) -> str:
    if not sites:
        return "no attention layer was recognised in this model: see `memcompile inspect`"
    if isinstance(part.term, Glob | Regex):
        wanted = part.text.removeprefix("!").removeprefix("re:")
        names = sorted({name for site in sites for name in _path_and_parents(site.path)})
        close = get_close_matches(wanted, names, n=3, cutoff=0.4) or [site.path for site in sites[:3]]
        return f"the nearest names are {', '.join(close)}"
    nearest = min((site.layer for site in sites), key=lambda n: _distance(n, part.term))
    return f"the layers are {_summary(sites)}; the nearest is {nearest}"


def _distance(layer: int, term: Term) -> int:
    if isinstance(term, Range):
        return min(abs(layer - term.first), abs(layer - term.last))
    return abs(layer - term.start) if isinstance(term, Every) else layer


def _written(value: object) -> str:
    """The value as the plan would write it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_written(inner) for inner in value) + "]"
    return str(value)

"""Pages of documentation made from the passes themselves, so that page and code are one."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from memcompile.errors import MemcompileError
from memcompile.rewrite.registry import load_pass

HEADINGS: Final = ("Rewrites", "Needs", "Refuses", "Loses", "Costs", "Identity")
_HEADING: Final = re.compile(r"^([A-Z][a-z]+):\s+(.*)$")


@dataclass(frozen=True, slots=True)
class Card:
    """The docstring of a pass: its first line, and one text per heading."""

    summary: str
    sections: Mapping[str, str]


def card(name: str) -> Card:
    """The card of the pass called `name`.

    Raises:
        MemcompileError: MC105, unknown pass; MC901, the docstring lacks a heading.
    """
    text = inspect.getdoc(type(load_pass(name))) or ""
    summary, _, rest = text.partition("\n")
    sections: dict[str, str] = {}
    current = ""
    for line in rest.splitlines():
        if match := _HEADING.match(line):
            current = match[1]
            sections[current] = match[2].strip()
        elif current and line.strip():
            sections[current] += " " + line.strip()
    missing = [heading for heading in HEADINGS if not sections.get(heading)]
    if missing or not summary.strip():
        raise MemcompileError("MC901", f"the card of {name} lacks {', '.join(missing) or 'its first line'}")
    return Card(summary.strip(), {heading: sections[heading] for heading in sections})


def pass_page(name: str) -> str:
    """The Markdown page of the pass called `name`: docs/passes/<name>.md."""
    one, read = load_pass(name), card(name)
    lines = [f"# {name}", "", read.summary, "", f"Exactness: {one.exactness.value}.", ""]
    for heading in HEADINGS:
        text = read.sections[heading]
        lines += [f"**{heading}.** {text[0].upper()}{text[1:]}", ""]
    lines += ["## Settings", "", "| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [_setting_row(key, field) for key, field in _properties(one.Config).items()]
    lines += ["", "Besides these, every pass takes `preset`, `layers` and `expect`"]
    lines[-1] += ", and this one takes `heads`." if one.takes_heads else "."
    lines += ["", "## Presets", ""]
    for preset_name, preset in one.presets.items():
        values = ", ".join(f"{key}: {_plain(value)}" for key, value in preset.values.items())
        lines += [
            f"### {preset_name}",
            "",
            preset.summary,
            "",
            f"`{{{values}}}`",
            "",
            f"Paper: {preset.paper}",
            "",
        ]
    lines += _order_lines(one)
    return "\n".join(lines).rstrip() + "\n"


def _order_lines(one: Any) -> list[str]:
    order = one.order
    named = {
        "needs": order.needs,
        "runs after whatever settles": order.after,
        "settles": order.provides,
        "ends": order.invalidates,
    }
    parts = [
        f"{verb} {', '.join(f'`{fact}`' for fact in sorted(facts))}" for verb, facts in named.items() if facts
    ]
    return ["## Order", "", f"This pass {'; '.join(parts)}." if parts else "This pass can run at any time."]


def _properties(config: type[Any]) -> dict[str, dict[str, Any]]:
    properties: dict[str, dict[str, Any]] = config.model_json_schema()["properties"]
    return properties


def _setting_row(key: str, schema: Mapping[str, Any]) -> str:
    default = _plain(schema["default"]) if "default" in schema else "required"
    meaning = str(schema.get("description", "")).replace("|", "\\|")
    return f"| `{key}` | {_type_text(schema)} | {default} | {meaning} |"


def _type_text(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type_text(inner) for inner in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"`{_plain(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{_plain(schema['const'])}`"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "null": "none",
        "boolean": "true or false",
    }
    text = words.get(str(schema.get("type")), str(schema.get("type")))
    bounds = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
    limits = [form.format(schema[key]) for key, form in bounds.items() if key in schema]
    return f"{text} {', '.join(limits)}".strip()


def _plain(value: object) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)

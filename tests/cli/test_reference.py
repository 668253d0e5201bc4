from __future__ import annotations

from pathlib import Path

from memcompile.cli.main import COMMANDS
from memcompile.cli.reference import cli_reference_markdown


def test_every_command_and_option_is_documented_with_a_meaning() -> None:
    text = cli_reference_markdown()
    for command in COMMANDS:
        assert f"## `memcompile {command}" in text
    assert "| `--goal memory\\|speed\\|quality` |" in text
    assert "| `-o, --out PATH` | Where the artifact goes. Required. |" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(row.rstrip(" |").split("` | ")[-1] for row in rows)


def test_the_page_on_the_command_line_names_every_command_with_json(repository: Path) -> None:
    page = (repository / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"| `{command}" in page

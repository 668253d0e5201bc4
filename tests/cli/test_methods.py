from __future__ import annotations

from memcompile.rewrite.registry import load_pass, pass_names
from tests.cli.conftest import Cli


def test_lists_every_pass_and_every_preset_with_its_paper(cli: Cli) -> None:
    answer = cli("methods", "--json")
    assert answer.exit_code == 0
    listed = {(method["pass"], method["preset"]): method for method in answer.json["methods"]}
    assert set(listed) == {
        (name, preset) for name in pass_names() for preset in (None, *load_pass(name).presets)
    }
    for method in listed.values():
        assert set(method) == {"pass", "preset", "paper", "summary", "exactness", "backends"}
        assert {"onnxruntime", "torch"} <= set(method["backends"])
        assert method["paper"] or method["preset"] is None


def test_shows_papers_to_a_person(cli: Cli) -> None:
    shown = cli("methods").out
    assert "kv.evict" in shown
    assert "arXiv:2404.14469" in shown

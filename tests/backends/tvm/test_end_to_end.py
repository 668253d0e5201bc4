"""The command line with `target.backend=tvm`, and its artifact in a process without the compiler."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from memcompile.cli import main
from tests.models import save_tiny

ROOT = Path(__file__).parents[3]
RUN = """
import sys
from memcompile.runtime import Sampling, load
session = load(sys.argv[1])
pieces = []
results = session.generate(
    ["the quick brown fox", "a"], max_new_tokens=12, sampling=Sampling(),
    on_token=lambda row, token, text: pieces.append(text),
)
assert [r.prompt_tokens for r in results] == [19, 1], results
assert all(r.finished in ("length", "eos") for r in results), results
print([list(r.tokens) for r in results], session.threads)
print(sorted(n for n in ("torch", "tvm", "onnxruntime", "transformers", "pydantic") if n in sys.modules))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Path:
    """An artifact without passes, made on the command line."""
    folder = tmp_path_factory.mktemp("tvm")
    (folder / "plan.yaml").write_text("version: 1\ntarget: {threads: 1}\npasses: []\n", encoding="utf-8")
    command = ["optimize", str(tiny_folder("llama")), "--plan", str(folder / "plan.yaml")]
    options = ["-o", str(folder / "out"), "--set", "target.backend=tvm", "--no-evaluate"]
    assert main([*command, *options]) == 0
    return folder / "out"


def _run(artifact: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(artifact)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_artifact_runs_without_compiler_and_generates_what_torch_does(
    made: Path, tiny_folder: Callable[[str], Path]
) -> None:
    from memcompile.backends.torch import TorchSession
    from memcompile.frontend import capture
    from memcompile.program import build_program
    from memcompile.runtime.generate import generate

    tokens, imported = _run(made)
    assert imported == "[]"
    captured = capture(str(tiny_folder("llama")))
    prompts = [captured.tokenizer.encode(text) for text in ("the quick brown fox", "a")]
    expected = generate(
        TorchSession(build_program(captured)),
        prompts,
        max_new_tokens=12,
        eos_token_ids=captured.model.eos_token_ids,
    )
    assert tokens == f"{[list(r.tokens) for r in expected]} 1"


def test_the_manifest_says_how_to_run_it(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["backend"], manifest["device"]) == ("tvm", "cpu")
    assert manifest["functions"]["step"]["file"] == "model.so"
    assert {"model.so", "weights.safetensors"} <= set(manifest["files"])
    assert manifest["environment"]["apache-tvm"] == "0.27.0.post1"


@pytest.mark.slow
def test_optimize_measures_original_and_rewritten_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_text(
        "the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8"
    )
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "version: 1\n"
        "target: {backend: tvm, threads: 1}\n"
        "workload: {prompt_tokens: 96, new_tokens: 8}\n"
        "data: {evaluation: {text: book.txt, tokens: 512}}\n"
        "passes: []\n"
        "gates: {perplexity: {max_increase: 0.1%}}\n",
        encoding="utf-8",
    )
    folder = save_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    command = ["optimize", str(folder), "--plan", str(plan), "-o", str(tmp_path / "out")]
    assert main([*command, "--no-source", "--quick", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["rewritten"]["perplexity"] == pytest.approx(printed["original"]["perplexity"], rel=1e-5)
    assert [gate["passed"] for gate in printed["gates"]] == [True]

"""The law of imports: stages only look downwards, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"accelerate", "gguf", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch", "transformers", "tvm"}
# a runtime environment has numpy, onnxruntime and tokenizers, and nothing else
RUNTIME_LACKS = HEAVY - {"onnxruntime"} | {
    "click",
    "jinja2",
    "networkx",
    "plotly",
    "psutil",
    "pydantic",
    "rich",
    "ruamel",
}


def test_the_import_rules_hold(repository: Path) -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [program, "--no-cache"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_memcompile_loads_nothing_heavy(repository: Path) -> None:
    assert loaded_by("import memcompile", repository) & HEAVY == set()


def test_the_help_of_every_command_loads_nothing_heavy(repository: Path) -> None:
    statement = """
import contextlib, io
from memcompile.cli import main
from memcompile.cli.main import COMMANDS
several = [["--help"], ["plan", "init", "--help"], *([name, "--help"] for name in COMMANDS)]
for arguments in several:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(arguments) == 0, arguments
    assert printed.getvalue().strip(), arguments
"""
    assert loaded_by(statement, repository) & HEAVY == set()


@pytest.mark.parametrize("module", ["memcompile.runtime", "memcompile.artifact", "memcompile.errors"])
def test_the_runtime_half_needs_no_compiler(module: str, repository: Path) -> None:
    assert loaded_by(f"import {module}", repository) & RUNTIME_LACKS == set()


@pytest.mark.parametrize("folder", ["passes", "backends"])
def test_the_folders_refuse_their_bare_names(folder: str, repository: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        loaded_by(f"import {folder}", repository)
    assert f"import memcompile.{folder}, not {folder}" in refused.value.stderr
    assert f"memcompile.{folder}" in all_loaded_by(f"import memcompile.{folder}", repository)


def loaded_by(statement: str, repository: Path) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has loaded after the statement."""
    return {name.partition(".")[0] for name in all_loaded_by(statement, repository)}


def all_loaded_by(statement: str, repository: Path) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after the statement."""
    command = [sys.executable, "-c", f"{statement}\nimport sys; print(*sys.modules)"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    return set(done.stdout.split())

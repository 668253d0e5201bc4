"""The runtime needs onnxruntime, numpy and tokenizers, and nothing of the compiler."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from memcompile.artifact import TokenizerEntry
from tests.runtime.test_tokenizer import byte_tokenizer
from tests.runtime.tiny_artifact import Layer, TinyModel, write_tiny

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("torch", "transformers", "pydantic", "click", "rich", "onnx", "networkx", "ruamel", "jinja2")

IMPORTS = f"""
import sys
import memcompile.runtime, memcompile.runtime.session, memcompile.artifact
print(sorted(name for name in {FORBIDDEN} if name in sys.modules))
"""


def test_importing_the_runtime_imports_nothing_of_the_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"


def test_importing_the_package_does_not_import_onnxruntime() -> None:
    code = "import sys, memcompile.runtime; print('onnxruntime' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False False\n"


def test_a_missing_package_is_named() -> None:
    code = """
import sys
from types import SimpleNamespace
sys.modules["onnxruntime"] = None
from memcompile import runtime
manifest = SimpleNamespace(backend="onnxruntime")
runtime.open_artifact = lambda path, check_digests: SimpleNamespace(manifest=manifest)
try:
    runtime.load("out")
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("MC510 a package that running the artifact needs is not installed: ")
    assert "fix:   pip install onnxruntime numpy tokenizers" in done.stdout


RUN = f"""
import importlib.util, sys
for name in {FORBIDDEN}:
    assert importlib.util.find_spec(name) is None, name
from memcompile.runtime import Sampling, load
session = load(sys.argv[1])
pieces = []
for sampling in (Sampling(), Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=1)):
    result = session.generate(
        ["Once upon a time there was a very small model", "Hi"], max_new_tokens=40, sampling=sampling,
        stop=["@@"], on_token=lambda row, token, text: pieces.append((row, text)),
    )
assert [len(r.tokens) for r in result] == [40, 40], result
assert "".join(t for row, t in pieces[-80:] if row == 0) == result[0].text
print("ran")
"""


@pytest.mark.slow
def test_an_artifact_runs_in_an_environment_of_three_packages(tmp_path: Path) -> None:
    model = TinyModel(layers=(Layer(window=10, sinks=3, bits=8), Layer(keep_tokens=12, bits=8)), vocab=258)
    tokenizer = byte_tokenizer().to_str()
    artifact = write_tiny(
        tmp_path / "artifact",
        model,
        files={"tokenizer.json": tokenizer},
        tokenizer=TokenizerEntry("tokenizer.json"),
    )
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"

    def pip(*arguments: str) -> None:
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    pip("onnxruntime==1.31.1", "numpy", "tokenizers")
    # tokenizers brings the hub client, which brings a command line; the runtime must not use them
    done = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    extra = [line.split("==")[0] for line in done.stdout.lower().splitlines()]
    leave = [name for name in extra if name in {n.lower() for n in FORBIDDEN} | {"huggingface_hub", "typer"}]
    if leave:
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "-y", *leave], check=True)
    pip("--no-deps", str(ROOT))
    done = subprocess.run(
        [str(python), "-c", RUN, str(artifact)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr

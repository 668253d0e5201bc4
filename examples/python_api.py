"""memcompile from Python: rewrite a live model, call it, train through it, generate, export, load.

    python examples/python_api.py [FOLDER_OR_GGUF]

Without an argument it uses SmolLM2-135M from models/ (python examples/fetch_model.py).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memcompile

SMOLLM2 = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

# A plan may be a path to a YAML file or, as here, a mapping with the same keys.
PLAN: dict[str, Any] = {
    "version": 1,
    "target": {"backend": "onnxruntime", "threads": 1},
    "workload": {"prompt_tokens": 512, "new_tokens": 32},
    "passes": [
        # two layers of three look back 256 tokens and always see the first four
        {"attention.static": {"preset": "longgen", "window_tokens": 256, "sink_tokens": 4}},
    ],
}


def load_source(source: Path) -> tuple[Any, Any]:
    """The model and its tokenizer, as Transformers gives them."""
    folder, extra = (source, {}) if source.is_dir() else (source.parent, {"gguf_file": source.name})
    tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra)
    return model.eval(), tokenizer


def main(source: Path, out: Path) -> str:
    """Do everything the API offers with the model at `source`; returns what the artifact generated."""
    model, tokenizer = load_source(source)
    inputs = tokenizer("It is a truth universally acknowledged, that a", return_tensors="pt")
    example_inputs = {"input_ids": inputs["input_ids"]}

    compiled = memcompile.optimize(model, PLAN, example_inputs, tokenizer=tokenizer)

    # Callable like the original. No prompt here is longer than the window, so nothing may have changed.
    with torch.no_grad():
        difference = (compiled(**example_inputs).logits - model(**example_inputs).logits).abs().max()
    print(f"largest difference to the original's logits inside the window: {difference:.1e}")
    assert difference < 1e-3

    # It is an nn.Module over the original's own parameters, so gradients flow.
    compiled(**example_inputs).logits.logsumexp(-1).mean().backward()
    print(f"parameters with a gradient: {sum(p.grad is not None for p in compiled.parameters())}")

    # What was rewritten, what was refused and why.
    for outcome in compiled.report["passes"]:
        print(outcome)

    # Generate in PyTorch ...
    (generation,) = compiled.generate(example_inputs["input_ids"], max_new_tokens=12)
    print("torch:      ", tokenizer.decode(generation.tokens))

    # ... and as an artifact, which needs neither PyTorch nor Transformers.
    compiled.export(out, "onnxruntime")
    session = memcompile.load(out, threads=1)
    (generation,) = session.generate(["It is a truth universally acknowledged, that a"], max_new_tokens=12)
    print("onnxruntime:", generation.text)
    return generation.text


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else SMOLLM2, Path(folder) / "artifact")

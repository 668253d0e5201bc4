"""Decoding with `attention.sparse` (quest) and `ffn.sparse`: time a token, and what the choice costs.

Every variant is compiled once; all are opened in one process, read the same prompt, and then decode the
tokens that follow in turns, so that whatever else the machine does meets all of them alike. Times are
medians; ratios are medians of paired ratios to the model as it is. Perplexity and KL are of what was decoded.

    python -m benchmarks.sparse_decode [--json] [--model FILE] [--prompt 7500] [--tokens 128] [--variants A,B]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.long_prompt import book_tokens
from benchmarks.plain_export import MODEL

VARIANTS: Final[dict[str, list[dict[str, Any]]]] = {
    "dense": [],
    "quest 512": [{"attention.sparse": {"preset": "quest", "keep_tokens": 512}}],
    "quest 1024": [{"attention.sparse": {"preset": "quest"}}],
    "lazy_neuron 50%": [{"ffn.sparse": {"preset": "lazy_neuron"}}],
    "lazy_neuron 25%": [{"ffn.sparse": {"preset": "lazy_neuron", "keep_fraction": 0.25}}],
    "coreinfer 75%": [{"ffn.sparse": {"preset": "coreinfer", "keep_fraction": 0.75}}],
    "coreinfer 50%": [{"ffn.sparse": {"preset": "coreinfer"}}],
}


def compile_all(model: str, folder: Path, names: Sequence[str], prompt: int, tokens: int) -> None:
    """Write the artifact of every variant into `folder`."""
    from memcompile import pipeline
    from memcompile.plan import load_plan

    for name in names:
        print(f"compile {name} ...", file=sys.stderr, flush=True)
        plan: dict[str, Any] = {
            "version": 1,
            "model": {"source": model, "weights": "float32"},
            "target": {"backend": "onnxruntime", "device": "cpu", "threads": 2},
            "workload": {"prompt_tokens": prompt, "new_tokens": tokens},
            "passes": VARIANTS[name],
        }
        pipeline.optimize(model, load_plan(plan), folder / name, evaluate=False)


def run(model: str, names: Sequence[str], prompt: int, count: int) -> dict[str, Any]:
    """Compile, read, decode in turns; the result as JSON values."""
    import numpy as np

    from memcompile.evaluate.scoring import kl_divergence, log_probabilities, token_losses
    from memcompile.runtime import load

    with tempfile.TemporaryDirectory(prefix="memcompile-bench-") as folder:
        compile_all(model, Path(folder), names, prompt, count)
        sessions = {name: load(Path(folder) / name) for name in names}
        tokens = book_tokens(sessions[names[0]].tokenizer, prompt + count)
        states = {name: session.new_state(1, prompt, count) for name, session in sessions.items()}
        for name, session in sessions.items():
            print(f"read with {name} ...", file=sys.stderr, flush=True)
            session.prefill(states[name], [tokens[:prompt]])
        seconds: dict[str, list[float]] = {name: [] for name in names}
        logits: dict[str, list[Any]] = {name: [] for name in names}
        for place in range(prompt, prompt + count - 1):
            for name, session in sessions.items():
                begin = time.perf_counter()
                logits[name].append(session.decode(states[name], [tokens[place]])[0])
                seconds[name].append(time.perf_counter() - begin)
    expected = np.array(tokens[prompt + 1 :])
    dense = names[0]
    scores = {name: log_probabilities(np.stack(rows)) for name, rows in logits.items()}
    rows = []
    for name in names:
        ratios = [mine / base for mine, base in zip(seconds[name], seconds[dense], strict=True)]
        rows.append(
            {
                "variant": name,
                "decode_ms": 1e3 * statistics.median(seconds[name]),
                "ratio": statistics.median(ratios),
                "perplexity": float(np.exp(token_losses(scores[name], expected).mean())),
                "kl": float(kl_divergence(scores[dense], scores[name]).mean()),
                "state_bytes": states[name].nbytes,
            }
        )
    return {"schema": 1, "model": model, "prompt_tokens": prompt, "tokens": count, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--prompt", type=int, default=7500)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    given = parser.parse_args(arguments)
    result = run(given.model, given.variants.split(","), given.prompt, given.tokens)
    if given.json:
        print(json.dumps(result))
        return
    print("| variant | ms a token | ratio | perplexity | KL, nats | state, MiB |\n|---|---|---|---|---|---|")
    for row in result["rows"]:
        print(
            f"| {row['variant']} | {row['decode_ms']:.1f} | {row['ratio']:.2f} | {row['perplexity']:.2f} "
            f"| {row['kl']:.3f} | {row['state_bytes'] / 2**20:.0f} |"
        )


if __name__ == "__main__":
    main()

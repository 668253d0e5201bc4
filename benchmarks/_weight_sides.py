"""The sides of benchmarks/weights.py: how each is built, read and scored."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.plain_export import ROOT, prompt

NEW_TOKENS: Final = 32
TEXT: Final = ROOT / "examples" / "texts" / "persuasion.txt.xz"
WINDOW_TOKENS: Final = 512
SCORED_TOKENS: Final = 128
PASSKEY_DEPTHS: Final = (0.1, 0.3, 0.5, 0.7, 0.9)
REFERENCE: Final = "fp32"
RIVALS: Final = ("openvino", "genai_int4")
# another text than the one that quality is measured on
CALIBRATION: Final = {"text": str(ROOT / "examples" / "texts" / "emma.txt.xz"), "tokens": 8192}


def _from_floats(name: str, *passes: dict[str, Any]) -> dict[str, Any]:
    """Sections of a plan that rewrites the floats a file stands for."""
    return {
        "model": {"weights": "float32"},
        "data": {"calibration": CALIBRATION},
        "passes": [{name: one} for one in passes],
    }


_quantized = functools.partial(_from_floats, "weights.quantize")
_pruned = functools.partial(_from_floats, "weights.prune")


def _layers(**config: Any) -> dict[str, Any]:
    """The same with head and embedding at 8 bits: a tied table of a small model does not bear 4."""
    table = {"preset": "int8", "zero_point": "integer", "modules": ["lm_head", "model.embed_tokens"]}
    return _quantized(table, {**config, "layers": "all"})


# our sides: sections of their plans
PLANS: Final[dict[str, dict[str, Any]]] = {
    "fp32": {"model": {"weights": "float32"}},
    "int8": _quantized({"preset": "int8"}),
    "int8_smooth": _quantized({"preset": "int8_smooth"}),
    "int8_smoothquant": _quantized({"preset": "int8_smoothquant"}),
    "int8_mptq": _quantized({"preset": "int8_mptq"}),
    "int4_rtn": _quantized({"preset": "int4"}),
    "int4_hqq": _quantized({"preset": "int4_hqq"}),
    # these leave head and embedding at 8 bits
    "int4_rtn_head8": _layers(preset="int4"),
    "int4_awq": _layers(preset="int4_awq"),
    "int4_gptq": _layers(preset="int4_gptq"),
    "int4_awq_gptq": _layers(preset="int4_awq_gptq"),
    "int4_distilled": _layers(preset="int4_distilled"),
    "int4_kmeans": _layers(preset="int4_kmeans"),
    "int4_kmeans_gptq": _layers(preset="int4_kmeans_gptq"),
    "int4_kmeans_distilled": _layers(preset="int4_kmeans_distilled"),
    # 4.56 bits a weight, scales and zero points counted; those above take 5.13 and 5
    "int4_distilled_64": _layers(preset="int4_distilled", block_size=64),
    "int4_offsets": _layers(preset="int4", zero_point="float"),
    "mixed_5bit": _quantized({"preset": "mixed_5bit"}),
    "heads_10pc": _pruned({"preset": "taylor_heads"}),
    "heads_10pc_distilled": _pruned({"preset": "taylor_heads", "recover": "distil", "recover_steps": 40}),
    "gguf": {"model": {"weights": "stored", "activations": "float"}},
    "gguf_int8": {"model": {"weights": "stored", "activations": "int8"}},
    "gguf_int8_kv8": {
        "model": {"weights": "stored", "activations": "int8"},
        "data": {"calibration": CALIBRATION},
        "passes": [{"kv.quantize": {"preset": "int8"}}],
    },
}
SIDES: Final = (*PLANS, *RIVALS)


@dataclass(frozen=True, slots=True)
class Reading:
    """One run of one side in one process."""

    side: str
    prefill_seconds: float
    decode_seconds_per_token: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity, how far the predictions are from those of the float weights, in nats a token, and passkeys.

    passkey: the share of keys that were found; None when none was asked for.
    """

    perplexity: float
    kl: float
    same_top_token: float
    passkey: float | None = None


def build_ours(side: str, source: str, folder: Path, threads: int) -> None:
    """Compile one of our sides into `folder`."""
    from memcompile import pipeline
    from memcompile.plan import load_plan

    sections = PLANS[side]
    plan = load_plan(
        {
            "version": 1,
            "model": {"source": source, **sections["model"]},
            "target": {"backend": "onnxruntime", "threads": threads},
            "workload": {"prompt_tokens": 2048, "new_tokens": NEW_TOKENS},
            "data": sections.get("data", {}),
            "passes": sections.get("passes", []),
        }
    )
    pipeline.optimize(source, plan, folder, evaluate=False)


def read_ours(side: str, folder: Path, prompt_tokens: int, threads: int) -> Reading:
    """Prefill and greedy decoding through the runtime."""
    from benchmarks.plain_export import read_memcompile

    found = read_memcompile(folder, prompt_tokens, threads)
    return Reading(side, found.prefill_seconds, found.decode_seconds_per_token, found.peak_memory_bytes)


def read_genai(side: str, folder: Path, prompt_tokens: int, threads: int) -> Reading:
    """The same through onnxruntime-genai."""
    from benchmarks.plain_export import read_genai as read

    found = read(folder, prompt_tokens, threads)
    return Reading(side, found.prefill_seconds, found.decode_seconds_per_token, found.peak_memory_bytes)


def read_openvino(side: str, model: Path, prompt_tokens: int, threads: int) -> Reading:
    """The same through OpenVINO GenAI, which reads the GGUF file itself; its own clocks, in float32."""
    import numpy as np
    import openvino
    import openvino_genai

    from benchmarks.plain_export import _peak

    pipe = openvino_genai.LLMPipeline(
        str(model), "CPU", INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT="f32"
    )
    tokens = np.array([prompt(40_000, prompt_tokens)], np.int64)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = NEW_TOKENS, True, False
    metrics = pipe.generate(openvino.Tensor(tokens), config).perf_metrics
    return Reading(side, metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3, _peak())


def measure_quality(
    folder: Path,
    reference: Path | None,
    keep: Path | None,
    windows: int,
    passkey_tokens: int,
    threads: int,
    text: Path = TEXT,
) -> Quality:
    """Score windows of a text; `reference` holds log-probabilities that another side kept."""
    import numpy as np

    from memcompile.evaluate.passkey import measure_passkey
    from memcompile.evaluate.scoring import kl_divergence, log_probabilities, token_losses
    from memcompile.evaluate.texts import TokenSource, read_text
    from memcompile.runtime import load

    session = load(folder, threads=threads)
    source = TokenSource(session, read_text(text), seed=0)
    room = WINDOW_TOKENS - len(source.start_ids)
    tokens = source.passage(0, 1, windows * room)
    losses, divergences, same = [], [], []
    for index in range(windows):
        row = source.start_ids + tokens[index * room : (index + 1) * room]

        def score(_: int, first: int, logits: Any, row: list[int] = row, index: int = index) -> None:
            log = log_probabilities(logits)
            targets = row[first + 1 : first + 1 + len(log)]
            losses.append(token_losses(log[: len(targets)], np.asarray(targets)))
            name = f"{index}-{first}.npy"
            if keep is not None:
                np.save(keep / name, log)
            if reference is not None:
                wanted = np.load(reference / name)
                divergences.append(kl_divergence(wanted, log))
                same.append(wanted.argmax(axis=-1) == log.argmax(axis=-1))

        state = session.new_state(1, len(row), 0)
        # in parts: with a large vocabulary the logits of a window are larger than the model
        state.chunk_tokens = SCORED_TOKENS
        session.prefill(state, [row], on_logits=score)
    asked = {"seed": 0, "prompt_tokens": passkey_tokens, "depths": PASSKEY_DEPTHS}
    points = measure_passkey(session, asked, lambda *_: None)["points"] if passkey_tokens else []
    return Quality(
        float(np.exp(np.concatenate(losses).mean())),
        float(np.concatenate(divergences).mean()) if divergences else 0.0,
        float(np.concatenate(same).mean()) if same else 1.0,
        sum(point["correct"] for point in points) / len(points) if points else None,
    )


def weight_bytes(side: str, folder: Path, source: str) -> int:
    """Bytes of the files that hold the weights."""
    if side == "openvino":
        return Path(source).stat().st_size
    return sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".bin", ".data"))

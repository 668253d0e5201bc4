"""A report with everything in it: three models, gates met and not, three roles, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from memcompile.artifact import StepBytes
from memcompile.artifact.manifest import (
    EvictEntry,
    GroupEntry,
    Manifest,
    ModelEntry,
    StateEntry,
)
from memcompile.evaluate import Evaluation, EvaluationSettings, GateResult, Metrics, check
from memcompile.evaluate.attribution import Attribution, StepCost
from memcompile.evaluate.crossover import Crossover
from memcompile.evaluate.prediction import Prediction

LAYERS = 30


def _metrics(seed: int, **values: Any) -> Metrics:
    generator = np.random.default_rng(seed)
    losses = 3.4 + generator.standard_normal(1024) * 1.5 + values.pop("extra_loss", 0.0)
    lost = values.pop("lost", ())
    points = tuple(
        {
            "depth": depth,
            "key": "40312",
            "prompt_tokens": 8000,
            "needle_start": int(8000 * depth),
            "correct": depth not in lost,
            "logprob": -2.5 if depth in lost else -0.07,
            "guessed": "40312",
        }
        for depth in (0.1, 0.3, 0.5, 0.7, 0.9)
    )
    return Metrics(
        prompt_tokens=8000,
        perplexity=math.exp(losses.mean()),
        passkey_accuracy=1 - len(lost) / 5,
        passkey_logprob=sum(point["logprob"] for point in points) / 5,
        passkey=points,
        token_losses=tuple(losses.round(5).tolist()),
        windows=2,
        scored_tokens=1024,
        **values,
    )


def evaluation(*, original: bool = True, hugging_face: bool = True) -> Evaluation:
    before = _metrics(
        1,
        prefill_seconds=38.2,
        decode_seconds_per_token=0.151,
        peak_memory_bytes=1_420_000_000,
        state_bytes=380_436_480,
        state_bytes_peak=380_436_480,
        load_seconds=1.4,
    )
    after = _metrics(
        2,
        extra_loss=0.03,
        lost=(0.1,),
        kl=0.0123,
        kl_p99=0.21,
        top1_agreement=0.941,
        prefill_seconds=38.9,
        decode_seconds_per_token=0.052,
        peak_memory_bytes=1_410_000_000,
        state_bytes=14_745_600,
        state_bytes_peak=95_109_120,
        load_seconds=1.5,
    )
    theirs = Metrics(
        prompt_tokens=8000,
        prefill_seconds=37.1,
        decode_seconds_per_token=0.204,
        peak_memory_bytes=1_752_000_000,
        state_bytes=368_640_000,
        load_seconds=3.0,
    )
    crossovers = tuple(
        Crossover(quantity, tokens, points)
        for quantity, tokens, points in (
            ("prefill", None, ((1000, 0.99), (3000, 0.98), (8000, 0.98))),
            ("decode", 1600, ((1000, 0.94), (3000, 1.2), (8000, 2.9))),
            ("request", 2700, ((1000, 0.95), (3000, 1.02), (8000, 1.49))),
        )
    )
    return Evaluation(
        original=before if original else None,
        rewritten=after,
        hugging_face=theirs if hugging_face else None,
        settings=EvaluationSettings(prompt_tokens=8000, crossover=True),
        prediction=Prediction(14_700_000, 14_745_600, agrees=True),
        crossovers=crossovers if original else (),
        environment={"system": "Linux", "cores": 2, "packages": {"onnxruntime": "1.31.1", "numpy": "2.4.6"}},
        notes=("the text budget pays for 2 of 4 windows",),
        attribution=Attribution(
            StepCost(StepBytes(538_000_000, 380_436_480, 1_500_000), 0.151) if original else None,
            StepCost(StepBytes(538_000_000, 14_745_600, 1_500_000), 0.052),
        ),
    )


def manifest() -> Manifest:
    groups = (
        GroupEntry("full", "attention_mask"),
        GroupEntry("window", "positions.window", kind="positions", window=512, sinks=4),
        GroupEntry("evict", "positions.evict", evict=EvictEntry(keep_tokens=1024, observe_tokens=32)),
    )
    states = []
    for layer in range(LAYERS):
        name = "full" if layer < 2 else "evict" if layer % 3 == 0 else "window"
        bits = 0 if layer < 2 else 8
        dtype = "int8" if bits else "float32"
        names = (f"past.{layer}.key", f"past.{layer}.value", f"present.{layer}.key", f"present.{layer}.value")
        if layer == 5:
            states.append(StateEntry("5", "full", 1, 64, *names, bits=8, dtype="int8", heads=3))
            states.append(StateEntry("5.window", "window", 2, 64, *names, bits=8, dtype="int8", heads=6))
        else:
            states.append(StateEntry(str(layer), name, 3, 64, *names, bits=bits, dtype=dtype, heads=9))
    return Manifest(
        "onnxruntime",
        ModelEntry("llama", vocab_size=49152, max_positions=8192, layers=LAYERS, parameters=134_515_008),
        {},
        threads=2,
        states=tuple(states),
        groups=groups,
        plan={"version": 1, "passes": [{"kv.evict": {"preset": "snapkv", "keep_tokens": 1024}}]},
        decisions=("layer 5 was split by head role",),
        refusals=(
            {
                "where": "model.layers.7.self_attn",
                "reason": "a <mask> computed at run time",
                "pass_name": "kv.evict",
            },
        ),
    )


def gates(measured: Evaluation) -> list[GateResult]:
    return check(
        {
            "perplexity": {"max_increase": 0.1},
            "passkey": {"min_accuracy": 0.9},
            "state_bytes": {"max": 24 * 2**20},
            "decode_speedup": {"min": 1.5},
        },
        measured,
    )

"""Compile a checkpoint of Llama-3-8B's shapes in a fourth of its size: peak memory, time per GB.

The checkpoint is written first: random bfloat16 weights, sharded safetensors, 16 GB at 32 layers. Every
compilation is a process of its own; checkpoint and artifact are removed afterwards.

    python -m benchmarks.weight_store --folder DIR [--layers 8,32] [--weights int4] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
GB: Final = 1e9
GIB: Final = 1 << 30
WANTED_PEAK_BYTES: Final = 4 * GIB
SHARD_BYTES: Final = 4_500_000_000
SHAPE: Final[dict[str, Any]] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
PLANS: Final[dict[str, list[dict[str, Any]]]] = {
    "int4": [{"weights.quantize": {"preset": "int4"}}],
    "int4_hqq": [{"weights.quantize": {"preset": "int4_hqq"}}],
    "int8": [{"weights.quantize": {"preset": "int8"}}],
    "float32": [],
}


@dataclass(frozen=True, slots=True)
class Reading:
    """One compilation in one process."""

    weights: str
    layers: int
    source_bytes: int
    largest_tensor_bytes: int
    artifact_bytes: int
    seconds: float
    capture_seconds: float
    processor_seconds: float
    peak_memory_bytes: int

    def per_gb(self, seconds: float) -> float:
        """Seconds for a GB of the source."""
        return seconds / (self.source_bytes / GB)


def tensor_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint's tensors."""
    model, inner, heads, groups = (
        SHAPE[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    cached = model // heads * groups
    yield "model.embed_tokens.weight", (SHAPE["vocab_size"], model)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, rows in (("q", model), ("k", cached), ("v", cached), ("o", model)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, model)
        yield f"{at}.mlp.gate_proj.weight", (inner, model)
        yield f"{at}.mlp.up_proj.weight", (inner, model)
        yield f"{at}.mlp.down_proj.weight", (model, inner)
        yield f"{at}.input_layernorm.weight", (model,)
        yield f"{at}.post_attention_layernorm.weight", (model,)
    yield "model.norm.weight", (model,)
    yield "lm_head.weight", (SHAPE["vocab_size"], model)


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write config.json and the sharded weights: random, of deviation 0.02, from a fixed seed."""
    import torch
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = SHARD_BYTES
    for name, shape in tensor_shapes(layers):
        size = _nbytes(shape)
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((name, shape))
        room -= size
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {}
        at = 0
        for name, shape in tensors:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + _nbytes(shape)]}
            at += _nbytes(shape)
            index[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, shape in tensors:
                for rows in range(0, shape[0], 4096):
                    part = (min(4096, shape[0] - rows), *shape[1:])
                    values = torch.ones(part)
                    if len(shape) == 2:
                        values.normal_(0, 0.02, generator=generator)
                    out.write(values.to(torch.bfloat16).view(torch.uint8).numpy().data)
    total = {"total_size": sum(_nbytes(shape) for _, shape in tensor_shapes(layers))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))


def _nbytes(shape: Sequence[int]) -> int:
    count = 2
    for size in shape:
        count *= size
    return count


def compile_once(source: Path, out: Path, weights: str, layers: int, threads: int) -> Reading:
    """Capture, rewrite and write the artifact in this process, without evaluation."""
    import torch

    from memcompile import pipeline
    from memcompile.evaluate.memory import peak_memory_bytes
    from memcompile.frontend import capture
    from memcompile.plan import load_plan

    torch.set_num_threads(threads)
    plan = load_plan(
        {
            "version": 1, "model": {"source": str(source)}, "passes": PLANS[weights],
            "target": {"backend": "onnxruntime", "threads": threads},
            "workload": {"prompt_tokens": 1024, "new_tokens": 64},
        }
    )  # fmt: skip
    started = time.perf_counter()
    captured = capture(str(source))
    captured_after = time.perf_counter() - started
    pipeline.optimize(captured, plan, out, evaluate=False)
    return Reading(
        weights,
        layers,
        sum(_nbytes(shape) for _, shape in tensor_shapes(layers)),
        max(_nbytes(shape) for _, shape in tensor_shapes(layers)),
        sum(file.stat().st_size for file in out.iterdir()),
        time.perf_counter() - started,
        captured_after,
        time.process_time(),
        peak_memory_bytes(),
    )


def measure(folder: Path, layers: Sequence[int], weights: Sequence[str], threads: int) -> list[Reading]:
    """Every size with every kind of weights; what was written is removed again."""
    readings: list[Reading] = []
    for count in layers:
        source = folder / f"llama-{count}-layers"
        try:
            write_checkpoint(source, count)
            for kind in weights:
                out = folder / f"artifact-{count}-{kind}"
                command = [
                    sys.executable, "-m", "benchmarks.weight_store", "--folder", str(folder), "--threads",
                    str(threads), "--compile", str(source), str(out), kind, str(count),
                ]  # fmt: skip
                try:
                    # OMP_NUM_THREADS of the caller would win over the plan's threads
                    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
                    done = subprocess.run(
                        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
                    )
                    if done.returncode:
                        raise SystemExit(done.stderr)
                    readings.append(Reading(**json.loads(done.stdout.splitlines()[-1])))
                finally:
                    shutil.rmtree(out, ignore_errors=True)
        finally:
            shutil.rmtree(source, ignore_errors=True)
    return readings


def table(readings: Sequence[Reading]) -> str:
    """The readings as Markdown."""
    lines = [
        "| weights | layers | source GB | artifact GB | peak GiB | wanted | seconds | of these capture "
        "| s / GB | processor s | processor s / GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.weights} | {r.layers} | {r.source_bytes / GB:.2f} | {r.artifact_bytes / GB:.2f} | "
        f"{r.peak_memory_bytes / GIB:.2f} | ≤ {WANTED_PEAK_BYTES / GIB:.0f} | {r.seconds:.0f} | "
        f"{r.capture_seconds:.0f} | {r.per_gb(r.seconds):.1f} | {r.processor_seconds:.0f} | "
        f"{r.per_gb(r.processor_seconds):.1f} |"
        for r in readings
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weight_store", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where 16 GB and the artifact fit")
    parser.add_argument("--layers", default="8,32", help="sizes; Llama-3-8B has 32")
    parser.add_argument("--weights", default="int4", help=f"of {', '.join(PLANS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--compile", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compile:
        source, out, kind, count = options.compile
        print(json.dumps(asdict(compile_once(Path(source), Path(out), kind, int(count), options.threads))))
        return 0
    sizes = [int(size) for size in options.layers.split(",")]
    readings = measure(options.folder, sizes, options.weights.split(","), options.threads)
    print(json.dumps([asdict(r) for r in readings], indent=2) if options.json else table(readings))
    return int(any(r.peak_memory_bytes > WANTED_PEAK_BYTES for r in readings))


if __name__ == "__main__":
    raise SystemExit(main())

"""A manifest with every section in use, and an artifact whose graphs are not graphs."""

from __future__ import annotations

from pathlib import Path

from memcompile.artifact import (
    ArtifactWriter,
    ChatEntry,
    EvictEntry,
    FunctionEntry,
    GroupEntry,
    Manifest,
    ModelEntry,
    StateEntry,
    TensorEntry,
    TokenizerEntry,
)


def sample_manifest() -> Manifest:
    """A manifest without files, for a full and an evicted layer."""
    states = tuple(
        StateEntry(str(i), group, 3, 64, f"pk{i}", f"pv{i}", f"nk{i}", f"nv{i}", heads=9)
        for i, group in enumerate(("full", "evict"))
    )
    names = ("input_ids", "attention_mask", "positions.evict")
    inputs = [TensorEntry(name, "int64", ("B", "T")) for name in names]
    inputs += [TensorEntry(n, "float32", ("B", 3, "C", 64)) for s in states for n in (s.key_in, s.value_in)]
    outputs = [TensorEntry("logits", "float32", ("B", "N", 100))]
    outputs += [
        TensorEntry(n, "float32", ("B", 3, "C", 64)) for s in states for n in (s.key_out, s.value_out)
    ]
    return Manifest(
        backend="onnxruntime",
        model=ModelEntry("llama", 100, 8192, 1, (2,), True, 2, 1000),
        functions={"step": FunctionEntry("model.onnx", tuple(inputs), tuple(outputs))},
        threads=2,
        states=states,
        groups=(
            GroupEntry("full", "attention_mask"),
            GroupEntry("evict", "positions.evict", evict=EvictEntry(keep_fraction=0.5, observe_tokens=32)),
        ),
        tokenizer=TokenizerEntry("tokenizer.json", True, ChatEntry("<u>", "<a>", ("</a>",))),
        plan={"passes": [{"kv.evict": {"keep_fraction": 0.5}}]},
        decisions=({"layer": 1},),
        environment={"onnxruntime": "1.31.1"},
    )


def fill(path: Path) -> None:
    """Put the files of `sample_manifest` into a directory."""
    (path / "model.onnx").write_bytes(b"not a graph" * 100)
    (path / "tokenizer.json").write_text("{}", encoding="utf-8")
    (path / "data").mkdir(exist_ok=True)
    (path / "data" / "weights.bin").write_bytes(bytes(range(256)) * 10)


def write_sample(target: Path, *, force: bool = False) -> Path:
    """Write the sample artifact."""
    with ArtifactWriter(target, force=force) as writer:
        fill(writer.path)
        writer.seal(sample_manifest())
        return writer.commit()

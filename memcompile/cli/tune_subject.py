"""What `memcompile tune` tunes: the attention regions of a model or an artifact, at a workload.

With TVM's engine, the linear layers of a model as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from memcompile.errors import MemcompileError
from memcompile.plan import Plan, load_plan
from memcompile.progress import Progress
from memcompile.tuning import Ask, Shape, Workload

if TYPE_CHECKING:
    from memcompile.frontend import Captured

MANIFEST: Final = "manifest.json"


@dataclass(frozen=True)
class Subject:
    """Regions that differ, the workload, and the backend they run on.

    products: channels in and out of linear layers that differ, and whether prompts run through them whole.
    """

    asks: tuple[Ask, ...]
    workload: Workload
    backend: str
    products: tuple[tuple[int, int, bool], ...] = ()


@dataclass(frozen=True)
class Asked:
    """The command line's own sizes; None: taken from the plan, the artifact or the default."""

    plan: Path | None = None
    backend: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    width: int | None = None
    window: int | None = None
    sinks: int = 0
    bits: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    batch: int | None = None
    threads: int | None = None
    engine: str = "spaces"
    products: tuple[str, ...] = ()


def subject_of(source: str | None, asked: Asked, progress: Progress) -> Subject:
    """Read the regions of a model or an artifact, or take the sizes that were given.

    Raises:
        MemcompileError: MC120, neither sizes nor a source are given, or both, or sizes that are none.
    """
    plan = load_plan(asked.plan) if asked.plan else load_plan({})
    if asked.engine == "tvm":
        asked = replace(asked, backend="tvm")
    elif asked.products:
        raise _usage("--product is given without --engine tvm", "add --engine tvm")
    if asked.heads is not None:
        if source is not None:
            raise _usage(f"{source} and --heads are given, one is wanted", "leave one of them out")
        return _with_options((_shape(asked),), plan, asked, {})
    source = source or plan.model_source()
    if source is None and asked.products:
        return _with_options((), plan, asked, {})
    if source is None:
        raise _usage(
            "there is nothing to tune", "give a MODEL, an ARTIFACT, or --heads, --kv-heads and --width"
        )
    if (Path(source) / MANIFEST).is_file():
        return _of_artifact(Path(source), plan, asked)
    from memcompile import pipeline
    from memcompile.frontend import capture

    progress.stage("capture the model")
    captured = capture(source)
    found = pipeline.inspect(captured)
    shapes = (
        Shape(r["heads"], r["kv_heads"], r["head_dim"], window=r["window_tokens"] or 0)
        for r in found["regions"]
        if r["mask"] in ("causal", "sliding_window")
    )
    alike = tuple(dict.fromkeys(shapes))
    if not alike:
        raise _usage(f"{source} has no causal attention", "tune a model that generates")
    layers = _linear_layers(captured) if asked.engine == "tvm" and not asked.products else ()
    return replace(_with_options(alike, plan, asked, {}), products=layers)


def _linear_layers(captured: Captured) -> tuple[tuple[int, int, bool], ...]:
    """Channels in and out of the linear layers; of a prompt only the last token goes through the head."""
    import torch

    linear = (torch.ops.aten.linear.default, torch.ops.memcompile.quantized_linear.default)
    found = []
    for node in captured.graph.graph.nodes:
        if node.target in linear:
            width, features = (int(n.meta["val"].shape[-1]) for n in (node.args[0], node))
            found.append((width, features, features != captured.model.vocab_size))
    return tuple(dict.fromkeys(found))


def _of_artifact(folder: Path, plan: Plan, asked: Asked) -> Subject:
    from memcompile.artifact import read_manifest

    manifest = read_manifest(folder)
    if asked.plan is None:
        plan = load_plan({"workload": manifest.plan.get("workload") or {}})
    prompt = asked.prompt_tokens or plan.workload.prompt_tokens
    held: dict[Shape, int] = {}
    shapes = []
    for state in manifest.states:
        group = manifest.group(state.group)
        shape = Shape(
            state.heads or state.kv_heads, state.kv_heads, state.head_dim, state.bits, group.window,
            group.sinks, group.block, group.stride,
        )  # fmt: skip
        shapes.append(shape)
        if group.evict is not None:
            kept = group.evict.keep_tokens or int((group.evict.keep_fraction or 1) * prompt)
            held[shape] = max(1, min(kept, prompt))
    asked = replace(asked, threads=asked.threads or manifest.threads or None)
    asked = replace(asked, backend=asked.backend or manifest.backend)
    return _with_options(tuple(dict.fromkeys(shapes)), plan, asked, held)


def _with_options(shapes: Sequence[Shape], plan: Plan, asked: Asked, held: dict[Shape, int]) -> Subject:
    use = plan.workload
    workload = Workload(
        asked.prompt_tokens or use.prompt_tokens,
        asked.new_tokens or use.new_tokens,
        asked.batch or use.batch,
        asked.threads or plan.target.threads,
    )
    wanted = [
        (replace(shape, bits=bits), held.get(shape))
        for shape in shapes
        for bits in (asked.bits or (shape.bits,))
    ]
    asks = tuple(Ask(str(shape), shape, kept) for shape, kept in dict.fromkeys(wanted))
    given = tuple((*_product(text), True) for text in asked.products)
    return Subject(asks, workload, asked.backend or plan.target.backend, given)


def _product(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise _usage(f"{text!r} is no linear layer", "write channels in and out: --product 576x1536")
    return int(parts[0]), int(parts[1])


def _shape(asked: Asked) -> Shape:
    heads, kv_heads, width = asked.heads, asked.kv_heads or asked.heads, asked.width
    assert heads is not None
    assert kv_heads is not None
    if width is None:
        raise _usage("--heads is given without --width", "give the width of a head as well")
    if heads % kv_heads:
        raise _usage(
            f"{heads} heads do not share {kv_heads} key/value heads evenly", "give a divisor of --heads"
        )
    return Shape(heads, kv_heads, width, window=asked.window or 0, sinks=asked.sinks)


def _usage(message: str, fix: str) -> MemcompileError:
    return MemcompileError("MC120", message, where="memcompile tune", fix=fix)


def as_dict(workload: Workload) -> dict[str, Any]:
    """The workload as `--json` prints it."""
    return {name: getattr(workload, name) for name in ("prompt_tokens", "new_tokens", "batch", "threads")}

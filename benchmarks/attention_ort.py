"""ONNX Runtime's own attention operators on the CPU, each as a session of one node, buffers bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.attention import Bench

Run = Callable[[], Any]


def group_query_attention(bench: Bench, tensors: list[Any], *, bits: int, used: int) -> Run:
    """ONNX Runtime's GroupQueryAttention on the same numbers, over a shared buffer that holds `used`."""
    import numpy as np
    import onnx
    import onnxruntime

    helper, kinds = onnx.helper, onnx.TensorProto
    q, k, v = (x.numpy() for x in tensors)
    tokens, capacity = q.shape[2], k.shape[2]
    cache = kinds.INT8 if bits else kinds.FLOAT
    names = ["q", "k", "v", "past_k", "past_v", "last", "total"]
    floats = [(name, kinds.FLOAT, ["b", "t", name]) for name in names[:3]]
    caches = [(name, cache, ["b", "g", "s", "d"]) for name in names[3:5]]
    inputs = [*floats, *caches, ("last", kinds.INT32, ["b"]), ("total", kinds.INT32, [])]
    attributes: dict[str, Any] = {"num_heads": bench.heads, "kv_num_heads": bench.kv_heads}
    if bits:
        inputs += [("k_scale", kinds.FLOAT, ["n"]), ("v_scale", kinds.FLOAT, ["n"])]
        names += [""] * 5 + ["k_scale", "v_scale"]
        attributes |= {
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
            "kv_cache_bit_width": bits,
        }
    outputs = [("out", kinds.FLOAT, ["b", "t", "q"]), ("new_k", cache, [1] * 4), ("new_v", cache, [1] * 4)]
    node = helper.make_node(
        "GroupQueryAttention", names, [o[0] for o in outputs], domain="com.microsoft", **attributes
    )
    shown = [helper.make_tensor_value_info(n, t, [f"{n}{d}" for d in dims]) for n, t, dims in outputs]
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info(*i) for i in inputs], shown)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = _session(model, bench.threads)
    binding = session.io_binding()
    new = slice(used, used + tokens)
    feeds = {"q": _packed(q), "k": _packed(k[:, :, new]), "v": _packed(v[:, :, new])}
    feeds |= {"last": np.array([used + tokens - 1], np.int32), "total": np.array(used + tokens, np.int32)}
    if bits:
        feeds |= {f"{n}_scale": np.full(bench.kv_heads * bench.width, 0.02, np.float32) for n in "kv"}
        feeds |= {"k": feeds["k"] * 0.02, "v": feeds["v"] * 0.02}
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    for name, value in (("k", k), ("v", v)):
        buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(value[:, :, :capacity]))
        binding.bind_ortvalue_input(f"past_{name}", buffer)
        binding.bind_ortvalue_output(f"new_{name}", buffer)
    binding.bind_output("out")
    return lambda: session.run_with_iobinding(binding)


def sparse_attention(bench: Bench, tensors: list[Any], blocks: Any) -> Run:
    """ONNX Runtime's SparseAttention of a prompt over the same blocks [1,H,n,n], a layout for each head."""
    import numpy as np
    import onnx
    import onnxruntime

    helper, kinds = onnx.helper, onnx.TensorProto
    q, k, v = (x.numpy() for x in tensors)
    tokens = q.shape[2]
    chosen = blocks[0].numpy()
    counts = chosen.sum(axis=2)
    rows = np.concatenate([np.zeros((bench.heads, 1)), counts.cumsum(axis=1)], axis=1).astype(np.int32)
    columns = np.full((bench.heads, int(rows[:, -1].max())), -1, np.int32)
    for head in range(bench.heads):
        columns[head, : rows[head, -1]] = chosen[head].nonzero()[1]
    given = {
        "q": _packed(q), "k": _packed(k), "v": _packed(v), "past_k": k, "past_v": v, "rows": rows,
        "columns": columns, "total": np.array(tokens, np.int32), "lengths": np.array([tokens], np.int32),
    }  # fmt: skip
    names = ["q", "k", "v", "past_k", "past_v", "rows", "columns", "total", "lengths"]
    element = {np.dtype(np.float32): kinds.FLOAT, np.dtype(np.int32): kinds.INT32}
    inputs = [helper.make_tensor_value_info(n, element[given[n].dtype], given[n].shape) for n in names]
    outputs = [
        helper.make_tensor_value_info("out", kinds.FLOAT, given["q"].shape),
        *(helper.make_tensor_value_info(f"new_{n}", kinds.FLOAT, k.shape) for n in "kv"),
    ]
    node = helper.make_node(
        "SparseAttention", names, ["out", "new_k", "new_v"], domain="com.microsoft",
        num_heads=bench.heads, kv_num_heads=bench.kv_heads, scale=bench.width**-0.5,
        sparse_block_size=tokens // chosen.shape[2], do_rotary=0,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", inputs, outputs)
    session = _session(helper.make_model(graph, opset_imports=opsets, ir_version=10), bench.threads)
    binding = session.io_binding()
    for name in names:
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(given[name]))
        binding.bind_ortvalue_input(name, value)
        if name.startswith("past"):
            binding.bind_ortvalue_output(name.replace("past", "new"), value)
    binding.bind_output("out")

    def run() -> Any:
        session.run_with_iobinding(binding)
        return binding.get_outputs()

    return run


def _session(model: Any, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # its threads must not spin on while the other sides run
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def _packed(x: Any) -> Any:
    import numpy as np

    return np.ascontiguousarray(x.transpose(0, 2, 1, 3).reshape(1, x.shape[2], -1), dtype=np.float32)

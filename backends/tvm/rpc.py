"""Time a kernel on another machine: one that runs `python -m tvm.exec.rpc_server --host ... --port ...`.

The server runs what it is sent, and asks nobody: start one in a network you trust only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tvm
from tvm import rpc
from tvm.s_tir import meta_schedule as ms

from memcompile.backends.tvm.search import ENTRY, arguments_of, measure
from memcompile.errors import MemcompileError


def measure_by_rpc(
    func: Any, target: Any, *, host: str, port: int, key: str = "", timeout_seconds: float = 60.0
) -> list[float]:
    """Compile a kernel of fixed sizes here, for `target`, and time it there: mean seconds, several times.

    `key` is that of the server, if it has one. Raises MC120 when the server is not reached, MC901 when the
    kernel does not run there (a target of another processor, for example).
    """
    built = tvm.compile(tvm.IRModule({ENTRY: func.with_attr("global_symbol", ENTRY)}), target=target)
    with tempfile.TemporaryDirectory(prefix="memcompile-rpc-") as folder:
        library = Path(folder) / "kernel.so"
        built.export_library(str(library))
        try:
            session = rpc.connect(host, port, key=key, session_timeout=timeout_seconds)
            session.upload(bytearray(library.read_bytes()), target=library.name)
        except Exception as error:
            # a refused connection, an unknown name and a wrong key are all RuntimeErrors of TVM
            raise MemcompileError(
                "MC120", f"there is no TVM RPC server at {host}:{port}: {str(error).splitlines()[0]}",
                fix=f"start one there: python -m tvm.exec.rpc_server --host 0.0.0.0 --port {port}",
            ) from error  # fmt: skip
    try:
        device = session.cpu()
        given = arguments_of(ms.arg_info.ArgInfo.from_prim_func(func), device)
        return measure(session.load_module(library.name), given, device=device)
    except Exception as error:
        raise MemcompileError(
            "MC901", f"the kernel does not run on {host}:{port}: {str(error).splitlines()[0]}"
        ) from error

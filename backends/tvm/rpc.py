"""Run kernels on another machine: one that runs `python -m tvm.exec.rpc_server --host ... --port ...`.

The server runs what it is sent, and asks nobody: start one in a network you trust only.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm
from tvm import rpc
from tvm.s_tir import meta_schedule as ms

from memcompile.backends.tvm.place import ENTRY, Place, arguments_of, export, measure
from memcompile.errors import MemcompileError


@dataclass
class Remote(Place):
    """A server's CPU. Kernels are compiled here, for it, and sent there."""

    address: str
    session: Any
    threads: int
    cpu: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    def connect(
        cls, address: str, *, threads: int = 1, key: str = "", timeout_seconds: float = 600.0
    ) -> Remote:
        """Connect to "HOST:PORT"; `key` is that of the server, if it has one.

        Raises MC120 when the address is none or the server is not reached.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise MemcompileError(
                "MC120", f"{address!r} is no address of an RPC server", where="--rpc", fix="write HOST:PORT"
            )
        try:
            session = rpc.connect(host, int(port), key=key, session_timeout=timeout_seconds)
            session.get_function("runtime.config_threadpool")(1, threads)
            cpu = str(session.get_function("target.llvm_get_system_cpu")())
        except Exception as error:
            # a refused connection, an unknown name and a wrong key are all RuntimeErrors of TVM
            raise MemcompileError(
                "MC120", f"there is no TVM RPC server at {address}: {str(error).splitlines()[0]}",
                fix=f"start one there: python -m tvm.exec.rpc_server --host 0.0.0.0 --port {port}",
            ) from error  # fmt: skip
        return cls(address, session, threads, cpu)

    @property
    def target(self) -> Any:
        return tvm.target.Target({"kind": "llvm", "mcpu": self.cpu, "num-cores": self.threads})

    @property
    def device(self) -> Any:
        return self.session.cpu()

    @property
    def machine(self) -> dict[str, str | int]:
        """What tells the machine from others, as a tuning record keeps it."""
        return {"cpu": self.cpu, "cores": 0, "isa": f"at {self.address}", "threads": self.threads}

    def load(self, path: Path) -> Any:
        """The module of a library that was compiled for the server."""
        name = f"kernel{next(self._numbers)}.so"
        try:
            self.session.upload(bytearray(path.read_bytes()), target=name)
            return self.session.load_module(name)
        except Exception as error:
            raise ValueError(f"{self.address} does not load it: {str(error).splitlines()[0]}") from error


def measure_by_rpc(
    func: Any, target: Any, *, host: str, port: int, key: str = "", timeout_seconds: float = 60.0
) -> list[float]:
    """Compile a kernel of fixed sizes here, for `target`, and time it there: mean seconds, several times.

    Raises MC120 when the server is not reached, MC901 when the kernel does not run there (a target of another
    processor, for example).
    """
    there = Remote.connect(f"{host}:{port}", key=key, timeout_seconds=timeout_seconds)
    with tempfile.TemporaryDirectory(prefix="memcompile-rpc-") as folder:
        library = export(func, target, Path(folder) / "kernel.so")
        try:
            given = arguments_of(ms.arg_info.ArgInfo.from_prim_func(func), there.device)
            return measure(there.load(library), given, entry=ENTRY, device=there.device)
        except Exception as error:
            raise MemcompileError(
                "MC901", f"the kernel does not run on {host}:{port}: {str(error).splitlines()[0]}"
            ) from error

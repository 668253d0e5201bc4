"""What tests of the tvm backend share."""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from memcompile.program import Program, build_program
from memcompile.runtime import BaseSession, load
from tests.backends.tvm.build import artifact_of
from tests.models import captured_tiny

Plain = Callable[[str], tuple[Program, BaseSession]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share an artifact run in one process."""
    for item in items:
        if isinstance(item, pytest.Function) and "plain" in item.fixturenames:
            family = item.callspec.params.get("family", "llama") if hasattr(item, "callspec") else "llama"
            item.add_marker(pytest.mark.xdist_group(f"family {family}"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """The program and the opened artifact of a family's tiny model as it is, made once: seconds each."""

    @functools.cache
    def made(family: str) -> tuple[Program, BaseSession]:
        program = build_program(captured_tiny(family))
        artifact = artifact_of(program, tmp_path_factory.mktemp(family) / "out")
        return program, load(artifact, threads=1)

    return made


@pytest.fixture(scope="session")
def server() -> Iterator[int]:
    """The port of an RPC server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [
        "-m",
        "tvm.exec.rpc_server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--port-end",
        str(port + 1),
    ]
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended before it was asked for anything"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)

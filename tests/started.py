"""Processes that a test starts side by side."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import conftest

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {conftest.FAST_COMPILATION}",
    # Compiled once for all starts.
    "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=pathlib.Path(__file__).parent,
        env=os.environ | ENVIRONMENT | environment,
    )


def finish(started: list[subprocess.Popen]) -> None:
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n\n".join(said)

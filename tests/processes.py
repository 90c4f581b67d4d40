"""Start and watch the processes of tests: forks of a preloaded interpreter, and new interpreters."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

import pytest

FORKS = hasattr(os, "fork") and sys.platform == "linux"  # else each command imports all anew
PRELOADED = Path(__file__).with_name("preloaded.py")
PATIENCE = 300.0  # seconds, far more than any test needs on a busy machine


class Process:
    """A running Python process, with the methods of ``subprocess.Popen``.

    Its output so far can be read at any time.
    """

    pid: int

    def __init__(self, arguments: tuple[str, ...]) -> None:
        self.args = arguments
        self.returncode: int | None = None
        self._written = [b"", b""]

    def _look(self) -> int | None:
        """Return the exit code, once the process has ended and its output has been read; else None."""
        raise NotImplementedError

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._look()
        return self.returncode

    @property
    def stdout(self) -> str:
        self.poll()
        return self._written[0].decode(errors="replace")

    @property
    def stderr(self) -> str:
        self.poll()
        return self._written[1].decode(errors="replace")

    def wait(self, timeout: float = PATIENCE) -> int:
        end, pause = time.monotonic() + timeout, 0.001
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout, self.stdout, self.stderr)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return code

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout, self.stderr

    def finish(self, timeout: float = PATIENCE) -> "subprocess.CompletedProcess[str]":
        """Wait for the end of the process, and kill it if it takes too long."""
        try:
            code = self.wait(timeout)
        except BaseException:
            self.kill()
            raise
        return subprocess.CompletedProcess(self.args, code, self.stdout, self.stderr)

    def send_signal(self, number: int) -> None:
        if os.name == "nt":
            pytest.skip("on Windows no process can ask another one to end")
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Fresh(Process):
    """``python <arguments>`` in a new interpreter."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str],
        preexec_fn: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(arguments)
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=preexec_fn,
        )
        self.pid = self._process.pid
        streams = (self._process.stdout, self._process.stderr)
        self._readers = [
            threading.Thread(target=self._read, args=one, daemon=True) for one in enumerate(streams)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, number: int, stream: IO[bytes]) -> None:
        with stream:
            while content := os.read(stream.fileno(), 2**20):
                self._written[number] += content

    def _look(self) -> int | None:
        if (code := self._process.poll()) is not None:
            for reader in self._readers:
                reader.join(1)  # a process that it has started may live on, and write
        return code

    def kill(self) -> None:
        self._process.kill()


class Fork(Process):
    """``python <arguments>`` in a child of a preloaded interpreter, which reports the child's end.

    Attributes:
        peak: its peak resident memory in the unit of ru_maxrss, known at its end.
    """

    peak: int

    def __init__(self, preloaded: socket.socket, request: bytes, *arguments: str) -> None:
        super().__init__(arguments)
        self._reading, writing = zip(*(open_pipe() for _ in range(2)), strict=True)
        told, telling = os.pipe()
        socket.send_fds(preloaded, [request], [*writing, telling])
        for descriptor in (*writing, telling):
            os.close(descriptor)
        self._told = os.fdopen(told, "rb", buffering=0)
        if not (line := self._told.readline()):
            raise RuntimeError("the preloaded interpreter has ended")
        self.pid = int(line)
        os.set_blocking(told, False)

    def _read(self) -> None:
        for number, descriptor in enumerate(self._reading):
            with contextlib.suppress(BlockingIOError):
                while content := os.read(descriptor, 2**20):
                    self._written[number] += content

    def _look(self) -> int | None:
        self._read()
        line = self._told.read()
        if line is None:
            return None
        self._told.close()
        if not line:
            raise RuntimeError("the preloaded interpreter has ended")
        self._read()
        for descriptor in self._reading:
            os.close(descriptor)
        code, self.peak = map(int, line.split())
        return code


def open_pipe() -> tuple[int, int]:
    """Its ends for reading, without waiting, and for writing; a megabyte fits in where the system allows."""
    import fcntl

    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 2**20)
    return reading, writing


LIGHT = (
    *("hydra", "hydra._internal.hydra", "hydra._internal.utils", "zipfile", "xml.dom.minidom"),
    *("hydra.core.override_parser.overrides_parser", "hydra.experimental.callback", "antlr4.LL1Analyzer"),
    *("hydra._internal.core_plugins.bash_completion", "filelock", "importlib.readers", "logging.config"),
)
HEAVY = (
    *("torch", "torchvision.datasets", "lightning.pytorch.callbacks", "lightning.pytorch.loggers"),
    *("torchmetrics.classification", "torch.utils.tensorboard", "torch.onnx", "onnxscript", "optuna"),
    *("matplotlib.figure", "matplotlib.font_manager", "matplotlib.backends.backend_agg", "PIL.Image"),
    *("PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin"),
    *("tensorboard.plugins.hparams.metadata", "torch.utils.serialization.config"),
    *("torch.onnx._internal.exporter._core", "torch._functorch.partitioners"),  # the rest is for an export
    *("onnxscript.function_libs.torch_lib.ops", "torch._export.passes", "sympy.tensor.tensor", "onnxruntime"),
    *(*LIGHT, "tqdm", "sqlalchemy", "submitit"),
)


class Preloaded:
    """A process that has imported the packages of others, and whose forks run commands.

    Where processes can't be forked, commands run in fresh interpreters.
    """

    def __init__(self, modules: Iterable[str], env: Mapping[str, str]) -> None:
        if not FORKS:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        self._process = subprocess.Popen(
            [sys.executable, str(PRELOADED), str(theirs.fileno()), *modules],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def start(
        self,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str],
        heed_permissions: bool = False,
        file_size: int | None = None,
    ) -> Process:
        """Start ``python <arguments>`` in a folder, with only the given environment variables.

        Args:
            heed_permissions: whether to respect permissions even if root runs the tests.
            file_size: the largest size in bytes of a file that the process writes; None: no limit.
        """
        if not FORKS:
            if heed_permissions or file_size is not None:
                pytest.skip("asks Linux to take rights away from a process")
            return Fresh(*arguments, cwd=cwd, env=env)
        request = {"arguments": arguments, "cwd": str(cwd), "env": dict(env)}
        request |= {"heed_permissions": heed_permissions, "file_size": file_size}
        return Fork(self._socket, json.dumps(request).encode(), *arguments)

    def close(self) -> str:
        """End the process and its children, and return its own output."""
        if not FORKS:
            return ""
        self._socket.shutdown(socket.SHUT_RDWR)  # a loader's worker may still hold a copy
        self._socket.close()
        return self._process.communicate()[0].decode()


def wait_for(holds: Callable[[], bool], process: Process, *, pause: float = 0.01) -> None:
    """Wait until a condition is true; fail at once, with the process's output, if the process has ended."""
    end = time.monotonic() + PATIENCE
    while not holds():
        if process.poll() is not None and not holds():
            written = f"{process.stdout}\n{process.stderr}"
            raise AssertionError(f"the process has ended with code {process.returncode}:\n{written}")
        assert time.monotonic() < end, f"waited too long:\n{process.stdout}\n{process.stderr}"
        time.sleep(pause)

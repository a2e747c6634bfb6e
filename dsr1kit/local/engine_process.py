"""A server in a process group of its own, which ends with whoever started it, however that one ends.

Between us and the server stands a small process: this module, run with `-m`. It holds the reading end of a pipe whose
other end is ours alone. When we close it, or are killed, it stops the server and everything the server started.
Also which ports are free, and who has one. Knows nothing about models or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dsr1kit.keys import redact

HOST = "127.0.0.1"
_PR_SET_PDEATHSIG = 1
_TAIL_BYTES, _TAIL_LINES = 262_144, 20


class Supervised:
    """A running command, its log and its end.

    Args:
        command: program and arguments.
        log: the file that takes what it says on stdout and stderr.
        environment: variables of the process.
        folder: its working folder; None: ours.
        stop_s: seconds that it gets to end by itself before it is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        *,
        folder: Path | None = None,
        stop_s: float = 10.0,
    ) -> None:
        self._command, self._log, self._environment = list(command), log, dict(environment)
        self._folder, self._stop_s = folder, stop_s
        self._process: asyncio.subprocess.Process | None = None
        self._from = 0  # where in the log, which may be an older one's too, this run begins

    async def start(self) -> None:
        """Start it; that the program is missing shows as exit code 127.

        Raises:
            OSError: the log cannot be written.
        """
        with opened(self._log) as log:
            self._from = log.seek(0, os.SEEK_END)
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "dsr1kit.local.engine_process", str(self._stop_s), *self._command),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,  # a terminal's Ctrl-C is for us, who then stop it in order
            )

    @property
    def code(self) -> int | None:
        """Its exit code, 128 and the signal's number where a signal ended it; None: it runs."""
        return None if self._process is None else self._process.returncode

    async def ended(self, within_s: float | None = None) -> bool:
        """Wait for its end, for so many seconds at most; whether it came."""
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), within_s)
        return self.code is not None

    async def stop(self) -> None:
        """Stop it with all it started; at once where it has ended."""
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        if not await self.ended(self._stop_s + 5.0):
            process.kill()  # the server dies with it
            await process.wait()

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """The last lines that this run wrote to its log, without keys."""
        return tail_of(self._log, lines, start=self._from)


def opened(log: Path) -> IO[bytes]:
    """Open a log to append to, which is for nobody else's eyes. Raises OSError where it cannot be written."""
    return open(log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600))


def tail_of(log: Path, lines: int = _TAIL_LINES, *, start: int = 0) -> str:
    """The last lines of a log from byte `start` on, without keys; empty where there are none."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            # One that was emptied meanwhile is all this run's.
            file.seek(max(start if start <= end else 0, end - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    # A progress bar writes over its own line; what stood there last is what a terminal would show.
    shown = [line.rstrip().rpartition("\r")[2] for line in text.split("\n") if line.strip()]
    return redact("\n".join(shown[-lines:]))


def ending(code: int) -> str:
    """An exit code in words."""
    if code == 127:
        return "could not be started (exit code 127)"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(code - 128).name}"
    return f"ended with exit code {code}"


def free_port() -> int:
    """A port on this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def taken(port: int) -> str:
    """Who listens on the port, as far as that can be seen; empty: nobody."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was left a moment ago is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            who = f" ({error.strerror})" if isinstance(error, PermissionError) else _listener(port)
            return who or " by another program"
    return ""


def _listener(port: int) -> str:
    with contextlib.suppress(Exception):  # psutil comes with accelerate; what it may not see, it does not tell
        psutil: Any = importlib.import_module("psutil")
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    return ""


def _die_with_parent() -> None:
    # The pipe cannot tell of the supervisor's own death; the kernel can, where it is Linux.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def supervise(stop_s: float, command: Sequence[str]) -> int:
    """Run the command until it ends or our stdin does; returns its exit code."""
    try:
        process = subprocess.Popen(  # noqa: S603 - the command is the person's own
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # safe: no other thread runs yet
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror or error}", file=sys.stderr)
        return 127

    def send(number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    def stop(*_: object) -> None:
        send(signal.SIGTERM)
        killer = threading.Timer(stop_s, send, (signal.SIGKILL,))
        killer.daemon = True
        killer.start()

    def watch() -> None:
        while os.read(0, 64):
            pass
        stop()

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, daemon=True).start()
    code = process.wait()
    send(signal.SIGKILL)  # workers that outlived it
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(supervise(float(sys.argv[1]), sys.argv[2:]))

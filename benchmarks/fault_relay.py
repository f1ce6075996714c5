"""An S3 server, and the one way to it, which can be cut and mended."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from types import TracebackType

import httpx

from benchmarks.fault_host import until
from hypersam.demo import free_port


@contextlib.contextmanager
def s3(command: str) -> Iterator[int]:
    """A server with the bucket ``faults``; gives its port. It keeps its objects in memory, so it is not killed."""
    port = free_port()
    quiet = subprocess.DEVNULL
    with subprocess.Popen([command, "-H", "127.0.0.1", "-p", str(port)], stdout=quiet, stderr=quiet) as server:

        def made() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.put(f"http://127.0.0.1:{port}/faults").status_code == 200
            return False

        try:
            if not until(made):
                raise SystemExit("the S3 server does not start")
            yield port
        finally:
            server.kill()


class Relay:
    """Passes connections on to a port of this machine. Cut, it resets those that are open and refuses new ones."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.port = free_port()
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Relay:
        self.mend()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()

    def mend(self) -> None:
        """Listen again."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Nothing gets through any more."""
        listener, self._listener = self._listener, None
        for link in (*((listener,) if listener else ()), *tuple(self._open)):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = listener.accept()
                there = socket.create_connection(("127.0.0.1", self._target))
                self._open |= {here, there}
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(1 << 16):
                sink.sendall(block)
        for link in (source, sink):
            self._open.discard(link)
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()

"""Processes of a job notice each other's end, also where a device would wait for it without a limit."""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from mf_lightning.callbacks.preemption import Preempted

_KEY, _BYE, _FAILED = "mf_lightning/liveness", b"bye", b"failed"
_gone: threading.Event | None = None
_sockets: list[socket.socket] = []


def first_is_gone(wait_s: float) -> bool | None:
    """Tell whether the connection to the first process has broken, waiting for it a little; None: there is none."""
    return None if _gone is None else _gone.wait(wait_s)


def tell_failure() -> None:
    """Tell the others that this process ends with an error of which it has told the user."""
    for each in _sockets:
        with suppress(OSError):
            each.sendall(_FAILED)


class Liveness(Callback):
    """Each process holds a connection to the first one, over which nothing goes; the end of a process closes it.

    gloo notices a lost process at once, NCCL after its timeout (half an hour) or never. Here a process that ends without saying
    goodbye takes the others down after ``grace_s``, time for their own messages; a machine that is gone is noticed by the
    keepalive of TCP, about 30 s later. A process that hangs is not noticed: only its end is certain.

    Args:
        grace_s: seconds between the loss and the end of this process.
    """

    def __init__(self, grace_s: float = 10.0) -> None:
        self.grace_s = grace_s
        self._rank = self._times = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect; every process comes here."""
        if trainer.world_size == 1 or not dist.is_initialized() or _sockets:
            return
        global _gone
        self._rank, store = trainer.global_rank, dist.distributed_c10d._get_default_store()
        self._times += 1
        key = f"{_KEY}/{self._times}"
        if self._rank == 0:
            server = socket.create_server(("", 0), backlog=trainer.world_size)
            _sockets.append(server)
            store.set(key, str(server.getsockname()[1]))
            target, args = self._watch_all, (server,)
        else:
            address = (os.environ["MASTER_ADDR"], int(store.get(key)))
            try:
                connection = socket.create_connection(address, timeout=60)
            except OSError as error:
                who = f"process {self._rank} on {socket.gethostname()}"
                what = "if another one is lost, it ends only when the backend's own timeout has passed"
                print(f"note: {who} cannot reach {address[0]}:{address[1]} ({error}): {what}.", file=sys.stderr)
                return
            connection.settimeout(None)
            _keep_alive(connection)
            connection.sendall(f"{self._rank} on {socket.gethostname()}\n".encode())
            _sockets.append(connection)
            _gone = threading.Event()
            target, args = self._watch_first, (connection, _gone)
        threading.Thread(target=target, args=args, name="liveness", daemon=True).start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say goodbye."""
        global _gone
        for each in _sockets:
            with suppress(OSError):  # the listening one, and those whose process has gone before
                each.sendall(_BYE)
        while _sockets:
            _sockets.pop().close()
        _gone = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say goodbye where all processes go."""
        if isinstance(exception, Preempted):
            self.teardown(trainer, pl_module, "fit")

    def _watch_all(self, server: socket.socket) -> None:
        names: dict[socket.socket, str] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while server in _sockets:
                for key, _ in selector.select(timeout=1.0):
                    if key.fileobj is server:
                        try:
                            connection, _ = server.accept()
                        except OSError:  # closed
                            return
                        _keep_alive(connection)
                        _sockets.append(connection)
                        selector.register(connection, selectors.EVENT_READ)
                    else:
                        said = _received(key.fileobj)
                        if said.endswith(b"\n"):
                            names[key.fileobj] = said.decode().strip()
                            continue
                        selector.unregister(key.fileobj)
                        if not said.endswith(_BYE) and server in _sockets:
                            self._end(names.get(key.fileobj, "?"), told=said.endswith(_FAILED))

    def _watch_first(self, connection: socket.socket, gone: threading.Event) -> None:
        said = _received(connection)
        if said != _BYE and connection in _sockets:
            gone.set()
            self._end("0", told=said == _FAILED)

    def _end(self, which: str, *, told: bool) -> None:
        time.sleep(self.grace_s)  # for messages of the main thread's own
        if _sockets and self._rank <= 1 and not told:  # one voice: of the first process, or where that is gone, the second
            why = "killed (for memory?), or its machine is gone. Its own message, if any, stands in this log"
            how = "Go on from the last checkpoint with --ckpt_path=auto"
            print(f"error: process {which} has ended without a word: {why}. {how}.", file=sys.stderr, flush=True)
        if _sockets:
            tell_failure()
            os._exit(1)


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1024)
    except OSError:
        return b""


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

"""Where a page may listen: an address of this machine and a port that nobody uses."""

from __future__ import annotations

import errno
import socket

from mf_lightning.types import UserError

LOOPBACK = "127.0.0.1"
PORTS = range(7860, 7960)


def free_port(host: str, port: int | None) -> int:
    """Return the port asked for, or the first of ``PORTS`` that nobody listens at.

    Raises:
        UserError: it is in use or not allowed, or the host is not this machine's.
    """
    if port is None:
        found = next((candidate for candidate in PORTS if _is_free(host, candidate)), None)
        if found is None:
            raise UserError(
                f"Got no free port from {PORTS.start} to {PORTS.stop - 1}, expected one. Give another, --port=9000."
            )
        return found
    if not 1 <= port <= 65535:
        raise UserError(f"Got --port={port}, expected a number from 1 to 65535, or none: a free one is then found.")
    if not _is_free(host, port):
        after = [*range(port + 1, min(port + 100, 65536)), *PORTS]
        other = next((candidate for candidate in after if _is_free(host, candidate)), None)
        raise UserError(f"Got --port={port}, which is in use, expected a free one. Give --port={other}, or leave it out.")
    return port


def _is_free(host: str, port: int) -> bool:
    """Return whether nobody listens at a port, of the loopback either, where Gradio looks."""
    for name in dict.fromkeys((host, LOOPBACK)):
        try:
            family, kind, *_, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that closed a moment ago is free
                trial.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            why = f"Got --host={host} and port {port}, where this machine may not listen ({error.strerror or error})"
            raise UserError(
                f"{why}, expected an address of this machine and a port above 1023. Try --host={LOOPBACK}."
            ) from error
    return True

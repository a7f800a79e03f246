"""What systemd wants to hear of a service of Type=notify, over the datagram socket that it names. Any thread."""

from __future__ import annotations

import socket
from contextlib import suppress


class Notifier:
    """Says how it goes to whoever started the daemon; to nobody where `address` is empty."""

    def __init__(self, address: str) -> None:
        """`address`: a path, or a name in the abstract namespace that begins with @."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None
        if self._socket is not None:
            self._socket.setblocking(False)

    def say(self, **values: str | int) -> None:
        """E.g. READY=1, STATUS="..."; lost where nobody listens, for a daemon does not fall over that."""
        if self._socket is not None:
            text = "\n".join(f"{name}={value}" for name, value in values.items())
            with suppress(OSError):
                self._socket.sendto(text.encode(), self._address)

    def ready(self, status: str) -> None:
        """Requests are taken from now on."""
        self.say(READY=1, STATUS=status)

    def needs(self, seconds: float) -> None:
        """What goes on, start or stop, takes up to so much longer."""
        self.say(EXTEND_TIMEOUT_USEC=int(seconds * 1e6))

    def stopping(self, seconds: float, status: str) -> None:
        """The end has begun, and takes up to so long."""
        self.say(STOPPING=1, STATUS=status, EXTEND_TIMEOUT_USEC=int(seconds * 1e6))

    def alive(self, status: str) -> None:
        """The watchdog may rest."""
        self.say(WATCHDOG=1, STATUS=status)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

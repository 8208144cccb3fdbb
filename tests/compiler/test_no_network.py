"""A compilation asks no network for anything: no name is looked up, and nothing is connected to or sent."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch

import kancompile
from benchmarks.kills import Waves

ASKING = ("connect", "connect_ex", "sendto", "sendmsg", "bind")


def test_a_compilation_uses_no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refused(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            raise OSError(f"{name} was called")

        return call

    monkeypatch.setattr(socket, "getaddrinfo", refused("getaddrinfo"))
    monkeypatch.setattr(socket, "create_connection", refused("create_connection"))
    blocked = type("Blocked", (socket.socket,), {name: refused(name) for name in ASKING})
    monkeypatch.setattr(socket, "socket", blocked)
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    compiled = kancompile.compile(Waves(), x, recipe={"goal_sqnr": None})
    assert compiled.validate(x).passed
    assert asked == []
    with socket.socket() as one, pytest.raises(OSError, match="connect was called"):
        one.connect(("192.0.2.1", 9))

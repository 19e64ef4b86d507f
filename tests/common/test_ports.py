"""Ports that nobody else gets."""

import socket

from frugal.common import ports
from frugal.common.ports import free_port


def test_free_ports_are_lent_to_no_connection_and_kept_by_nobody(monkeypatch, tmp_path) -> None:
    lent = tmp_path / "range"
    monkeypatch.setattr(ports, "_LENT", lent)
    lent.write_text("10000\t65533\n")
    assert {free_port() for _ in range(20)} == {65534, 65535}
    with socket.socket() as other:
        other.bind(("127.0.0.1", 65534))
        assert {free_port() for _ in range(20)} == {65535}
    lent.write_text("10000\t65535\n")  # nothing is outside
    assert 0 < free_port() <= 65535
    lent.unlink()
    assert not 32_768 <= free_port() <= 60_999

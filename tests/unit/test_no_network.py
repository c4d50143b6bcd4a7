"""The guard that every other test relies on."""

import os
import socket
import threading

import pytest


def test_a_connection_to_another_machine_is_refused():
    with socket.socket() as one, pytest.raises(OSError, match="no network"):
        one.connect(("192.0.2.1", 80))


def test_a_name_is_not_looked_up():
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("huggingface.co", 443))


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=server.accept, daemon=True).start()
        with socket.create_connection(server.getsockname()) as one:
            assert one.getpeername() == server.getsockname()


def test_the_loaders_are_told_to_stay_offline():
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"

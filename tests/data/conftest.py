"""Fixtures that the tests of data share."""

import sys

import pytest
from hub_server import HubServer

from nanochat_jax import dataset


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `dataset` in this process: (exit code, output, errors)."""

    def run(*arguments):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
        monkeypatch.setattr(sys, "argv", ["dataset", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            dataset.main()
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that speaks the Hub's protocol, for this process's client."""
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path)
        yield server

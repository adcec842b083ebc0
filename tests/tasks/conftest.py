"""Fixtures that the tests of tasks share."""

import pytest

from nanochat_jax import files
from nanochat_jax.paths import Paths
from nanochat_jax.tasks import hub

REFERENCE_DATA = ("task_data", "words_alpha.txt", "identity_conversations.jsonl")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was asked for something")

    monkeypatch.setattr(hub, "list_dataset", refuse)
    monkeypatch.setattr(hub, "fetch", refuse)
    monkeypatch.setattr(files.urllib.request, "urlopen", refuse)


@pytest.fixture
def paths(tmp_path, test_data, no_network) -> Paths:
    """A base directory that holds the reference data."""
    for name in REFERENCE_DATA:
        (tmp_path / name).symlink_to(test_data / "data" / name)
    return Paths(tmp_path)

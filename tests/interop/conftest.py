"""Fixtures: models, and upstream's checkpoints of them."""

import shutil

import pytest
from interop_models import MODELS, VOCABULARY, random_params

from nanochat_jax.interop.torch_checkpoint import write_checkpoint


@pytest.fixture
def arch():
    """`parametrize("arch", MODELS)` runs a test with both."""
    return "modern"


@pytest.fixture
def model(arch):
    return MODELS[arch], random_params(MODELS[arch])


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A directory per architecture as upstream would have written it, at steps 7 and 12."""
    directories = {}
    for arch, config in MODELS.items():
        directories[arch] = tmp_path_factory.mktemp(arch)
        meta = {"val_bpb": 1.5, "user_config": {}}
        for step in (7, 12):
            model = (config, random_params(config), VOCABULARY)
            write_checkpoint(directories[arch], *model, step=step, meta=meta)
    return directories


@pytest.fixture
def exported(arch, written, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(written[arch], tmp_path / "upstream")


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"

"""The stages: each continues the one before, resumes bit for bit and survives kill -9."""

import dataclasses
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_line import losses, make_base

from nanochat_jax.checkpoint import load_model
from nanochat_jax.model.sharding import make_mesh, param_shardings
from nanochat_jax.model.weights import abstract_params
from nanochat_jax.train import finetune
from nanochat_jax.train.finetune import warm_optimizer
from nanochat_jax.train.optim import OptimizerConfig, Schedules, constant, make_optimizer
from nanochat_jax.train.pretrain import BaseTrainConfig, pretrain
from nanochat_jax.train.stages import ChatSFTConfig, MidTrainConfig, midtrain, supervised_finetune
from scripts import base_loss

needs_chitchat = pytest.mark.skipif(
    importlib.util.find_spec("chitchat_dataset") is None, reason="the extra offline"
)
COMMON = dict(
    mesh="1x1",
    total_batch_size=256,
    device_batch_size=2,
    num_iterations=6,
    save_every=3,
    keep=3,
    eval_every=-1,
    eval_tokens=256,
    model_tag="d2",
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def base_config(**changes):
    shape = dict(depth=2, aspect_ratio=16, head_dim=16, max_seq_len=64, data="embedded")
    return BaseTrainConfig(**shape | COMMON | changes)


@needs_chitchat
@pytest.mark.slow
def test_every_stage_continues_the_one_before_and_resumes_bit_for_bit(paths, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(paths.base))
    for source, stage, config in (
        ("base", pretrain, base_config()),
        ("mid", midtrain, MidTrainConfig(load_optimizer=True, **COMMON)),
        ("sft", supervised_finetune, ChatSFTConfig(**COMMON)),
    ):
        directory = paths.checkpoints(source) / "d2"
        stage(config)
        first = losses(directory)
        shutil.rmtree(directory / "6")  # as if killed before the last save
        stage(dataclasses.replace(config, resume=True))
        assert len(first) == 6 and first == losses(directory), source

    before = sorted(path.name for path in paths.checkpoints("mid").rglob("*"))
    midtrain(MidTrainConfig(dry_run=True, **COMMON))
    assert before == sorted(path.name for path in paths.checkpoints("mid").rglob("*"))

    base_loss.main(base_loss.BaseLossConfig(mesh="1x1", device_batch_size=2, split_tokens=512))
    written = "".join(path.read_text() for path in paths.report.glob("*.md"))
    for section in ("Base model training", "Midtraining", "Chat SFT", "Base model loss"):
        assert f"## {section}" in written


@pytest.fixture(scope="module", params=["modern", "classic"])
def trained(request, paths):
    """The tag of a base model of that architecture."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(paths.base))
        pretrain(base_config(arch=request.param, model_tag=request.param))
    return request.param


@needs_chitchat
@pytest.mark.slow
def test_muons_momentum_warms_up_except_in_classic_sft(paths, trained, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(paths.base))
    momenta = []

    class Recorded(Exception):
        pass

    def record(config, rates, schedules, compute):
        momenta.append([float(schedules.momentum(step)) for step in (0, 150, 300, 900)])
        raise Recorded

    monkeypatch.setattr(finetune, "make_optimizer", record)
    common = COMMON | dict(model_tag=trained)
    for stage, config in (
        (midtrain, MidTrainConfig(**common)),
        (supervised_finetune, ChatSFTConfig(source="base", **common)),
    ):
        with pytest.raises(Recorded):
            stage(config)
    warming = [pytest.approx(value) for value in (0.85, 0.9, 0.95, 0.95)]
    assert momenta == [warming, [pytest.approx(0.95)] * 4 if trained == "classic" else warming]


@needs_chitchat
@pytest.mark.slow
def test_a_warm_optimizer_has_the_saved_moments_and_schedules_at_step_0(paths, trained):
    loaded, mesh = load_model(paths, "base", tag=trained), make_mesh("1x1")
    optimizer = make_optimizer(
        loaded.config,
        OptimizerConfig(),
        Schedules(lr_multiplier=constant(1.0), momentum=constant(0.9)),
    )
    shardings = param_shardings(loaded.config, mesh)
    warm = warm_optimizer(loaded, optimizer, abstract_params(loaded.config), shardings, mesh)
    saved = (
        ocp.CheckpointManager(paths.checkpoints("base") / trained)
        .restore(6, args=ocp.args.Composite(optimizer=ocp.args.StandardRestore()))
        .optimizer
    )
    flat = [np.asarray(leaf) for leaf in jax.tree.leaves(saved)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(warm):
        name = jax.tree_util.keystr(path)
        if leaf.ndim:
            assert any(
                np.array_equal(leaf, other) for other in flat if other.shape == leaf.shape
            ), name
        elif "matrices" in name:
            assert leaf == 0, name
    assert jax.tree.structure(warm) == jax.tree.structure(
        jax.eval_shape(optimizer.init, abstract_params(loaded.config))
    )


@pytest.mark.slow
def test_killed_runs_end_like_a_run_that_was_not():
    command = [sys.executable, Path(__file__).parents[1] / "kill_runs.py", "--kills", "3"]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == 0, killed.stdout + killed.stderr

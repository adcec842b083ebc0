"""The training scripts on a small corpus: each stage reads the one before it, resumes bit for bit,
and survives kill -9.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_line import losses, make_base, start

from nanochat_jax.checkpoint import load_model
from nanochat_jax.model.sharding import make_mesh, param_shardings
from nanochat_jax.model.weights import abstract_params
from nanochat_jax.train import finetune
from nanochat_jax.train.finetune import warm_optimizer
from nanochat_jax.train.optim import OptimizerConfig, Schedules, constant, make_optimizer
from scripts import base_loss, base_train, chat_sft, mid_train

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


@needs_chitchat
@pytest.mark.slow
def test_every_stage_builds_on_the_one_before_and_resumes_bit_for_bit(paths, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(paths.base))
    for source, script, config in (
        (
            "base",
            base_train,
            lambda **more: base_train.BaseTrainConfig(
                depth=2,
                aspect_ratio=16,
                head_dim=16,
                max_seq_len=64,
                data="embedded",
                **COMMON,
                **more,
            ),
        ),
        (
            "mid",
            mid_train,
            lambda **more: mid_train.MidTrainConfig(load_optimizer=True, **COMMON, **more),
        ),
        ("sft", chat_sft, lambda **more: chat_sft.ChatSFTConfig(**COMMON, **more)),
    ):
        directory = paths.checkpoints(source) / "d2"
        script.main(config())
        first = losses(directory)
        shutil.rmtree(directory / "6")  # as if killed before the last save
        script.main(config(resume=True))
        assert len(first) == 6 and first == losses(directory), source

    before = sorted(path.name for path in paths.checkpoints("mid").rglob("*"))
    mid_train.main(mid_train.MidTrainConfig(dry_run=True, **COMMON))
    assert before == sorted(path.name for path in paths.checkpoints("mid").rglob("*"))

    base_loss.main(base_loss.BaseLossConfig(mesh="1x1", device_batch_size=2, split_tokens=512))
    written = "".join(path.read_text() for path in paths.report.glob("*.md"))
    for section in ("Base model training", "Midtraining", "Chat SFT", "Base model loss"):
        assert f"## {section}" in written


@pytest.fixture(scope="module", params=["modern", "classic"])
def trained(request, paths):
    """The tag of a base model of that arch."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(paths.base))
        base_train.main(
            base_train.BaseTrainConfig(
                depth=2,
                aspect_ratio=16,
                head_dim=16,
                max_seq_len=64,
                data="embedded",
                arch=request.param,
                **COMMON | dict(model_tag=request.param),
            )
        )
    return request.param


@needs_chitchat
@pytest.mark.slow
def test_muons_momentum_warms_up_but_in_classic_finetuning(paths, trained, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(paths.base))
    seen = []

    class Seen(Exception):
        pass

    def record(config, rates, schedules, compute):
        seen.append([float(schedules.momentum(step)) for step in (0, 150, 300, 900)])
        raise Seen

    monkeypatch.setattr(finetune, "make_optimizer", record)
    common = COMMON | dict(model_tag=trained)
    for run in (
        lambda: mid_train.main(mid_train.MidTrainConfig(**common)),
        lambda: chat_sft.main(chat_sft.ChatSFTConfig(source="base", **common)),
    ):
        with pytest.raises(Seen):
            run()
    warming = [pytest.approx(value) for value in (0.85, 0.9, 0.95, 0.95)]
    assert seen == [warming, [pytest.approx(0.95)] * 4 if trained == "classic" else warming]


@needs_chitchat
@pytest.mark.slow
def test_a_warm_optimizer_has_the_moments_of_the_stage_before_and_schedules_that_begin_anew(
    paths, trained
):
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
def test_killed_runs_end_as_if_they_had_been_left_alone():
    killed = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "kill_runs.py", "--kills", "3"],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == 0, killed.stdout + killed.stderr


@pytest.mark.slow
def test_a_device_type_that_is_not_there_is_refused_in_one_line(paths):
    (process,) = start("base_loss", "--device-type", "cuda", base=paths.base)
    said = process.communicate()[1]
    assert (
        process.returncode == 2
        and said.startswith("error: --device-type cuda")
        and said.count("\n") == 1
    ), said

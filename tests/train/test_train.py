"""The training loop: equal on any mesh, exact when resumed, robust to damaged checkpoints."""

import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nanochat_jax.checkpoint import claim_directory, load_model
from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.metrics import read_metrics
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.paths import Paths, saved_steps
from nanochat_jax.speedrun.runner import clear_tag
from nanochat_jax.train import memory
from nanochat_jax.train.config import TrainConfig
from nanochat_jax.train.job import Evaluation, Job, LoaderSource
from nanochat_jax.train.loop import train
from nanochat_jax.train.memory import choose_batch_shape, compile_step
from nanochat_jax.train.optim import (
    OptimizerConfig,
    Schedules,
    cosine_decay,
    make_optimizer,
    modern_momentum,
    trapezoid,
)
from nanochat_jax.train.pretrain import BaseTrainConfig
from nanochat_jax.train.resume import differences, require_same_run
from nanochat_jax.train.step import batch_shape, init_state, make_train_step
from nanochat_jax.train.stopping import EXIT_STOPPED

MODEL = GPTConfig.modern(3, n_embd=32, n_head=4, n_kv_head=4, vocab_size=100, sequence_len=16)
ROWS, STEPS = 8, 6
EVALUATIONS = (Evaluation(-1, lambda params: {"val_bpb": 1.0}),)


class CountedBatches:
    """Batch i is a function of i; the position is i. Some targets are ignored, unevenly over the
    rows.
    """

    def __init__(self, stop_at=None):
        self.count, self.stop_at = 0, stop_at

    def __next__(self):
        if self.count == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        rng = np.random.default_rng(self.count)
        self.count += 1
        tokens = rng.integers(0, MODEL.vocab_size, (ROWS, MODEL.sequence_len + 1)).astype(np.int32)
        targets = np.where(rng.random((ROWS, MODEL.sequence_len)) < 0.3, -1, tokens[:, 1:]).astype(
            np.int32
        )
        return {"inputs": tokens[:, :-1], "targets": targets}

    @property
    def position(self):
        return {"position": self.count}

    def get_state(self):
        return {"position": self.count}

    def set_state(self, state):
        self.count = state["position"]


@functools.cache
def program(model, mesh, device_batch, fsdp):
    """(batch shape, multiplier, initial state on the host, shardings, step function).

    Schedules are those of 20 steps, so that shorter runs are the same program.
    """
    mesh = make_mesh(mesh)
    multiplier = trapezoid(20, warmup=2, warmdown_ratio=0.5, final_fraction=0.1)
    schedules = Schedules(
        lr_multiplier=multiplier,
        momentum=modern_momentum(20, 0.5),
        weight_decay=cosine_decay(0.1, 20),
        lr_scale=0.05,
    )
    optimizer = make_optimizer(model, OptimizerConfig(), schedules, Compute(mesh=mesh))
    state, shardings = init_state(model, optimizer, mesh, fsdp=fsdp, seed=1)
    step = make_train_step(model, optimizer, Compute(mesh=mesh), shardings)
    shape = batch_shape(ROWS * model.sequence_len, device_batch, model.sequence_len, mesh)
    return shape, multiplier, jax.device_get(state), shardings, step


def run(
    directory,
    *,
    logs=None,
    model=MODEL,
    mesh="1x1",
    device_batch=ROWS,
    fsdp=False,
    batches=None,
    evaluations=EVALUATIONS,
    num_steps=STEPS,
    **flags,
):
    """(losses of all steps, final parameters)."""
    logs = logs or directory
    shape, multiplier, state, shardings, step = program(model, mesh, device_batch, fsdp)
    job = Job(
        name="test",
        config=TrainConfig(**flags),
        model=model,
        directory=directory,
        logs=logs,
        num_steps=num_steps,
        shape=shape,
        lr_multiplier=multiplier,
        metadata={},
        evaluations=evaluations,
    )
    source = LoaderSource(batches or CountedBatches(), shape, shardings.params["wte"].mesh)
    outcome = train(job, jax.device_put(state, shardings), shardings, step, source)
    return train_losses(logs), jax.tree.map(np.asarray, outcome.params)


def train_losses(logs):
    lines = read_metrics(logs / "metrics.jsonl")
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run(tmp_path_factory.mktemp("reference") / "d3")


@pytest.fixture(scope="module")
def long_reference(tmp_path_factory):
    return run(tmp_path_factory.mktemp("long") / "d3", num_steps=20)[0]


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A finished run with the steps 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("saved") / "d3"
    run(directory, save_every=2, keep=3)
    return directory


@pytest.mark.parametrize(
    "mesh, device_batch, fsdp",
    [("8x1", 1, False), ("4x2", 2, False), ("2x4", 2, False), ("8x1", 1, True), ("1x1", 2, False)],
)
def test_losses_do_not_depend_on_the_mesh_or_the_micro_batches(
    long_reference, tmp_path, mesh, device_batch, fsdp
):
    losses, _ = run(tmp_path / "d3", mesh=mesh, device_batch=device_batch, fsdp=fsdp, num_steps=20)
    assert len(losses) == 20
    np.testing.assert_allclose(losses, long_reference, rtol=1e-5)


def test_a_stopped_run_resumes_bit_for_bit(reference, tmp_path):
    with pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
        run(tmp_path / "d3", batches=CountedBatches(stop_at=3))
    losses, params = run(tmp_path / "d3", resume=True)
    assert losses == reference[0]
    jax.tree.map(np.testing.assert_array_equal, params, reference[1])


def test_a_run_resumes_on_another_mesh(reference, tmp_path):
    for mesh, device_batch, stop_at in (("8x1", 1, 1), ("4x2", 2, 3), ("1x1", ROWS, None)):
        with pytest.raises(SystemExit) if stop_at else nullcontext():
            batches = CountedBatches(stop_at=stop_at)
            run(tmp_path / "d3", mesh=mesh, device_batch=device_batch, batches=batches, resume=True)
    losses = train_losses(tmp_path / "d3")
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)


def test_a_signal_interrupts_an_evaluation_and_saves(reference, tmp_path):
    ended = []

    def evaluate(params):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        ended.append(True)

    with pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
        run(tmp_path / "d3", evaluations=[Evaluation(2, evaluate)], save_every=0)
    assert not ended
    assert saved_steps(tmp_path / "d3") == [2]
    assert run(tmp_path / "d3", resume=True)[0] == reference[0]


def test_a_second_signal_ends_the_process_immediately():
    code = """
import os, signal, time
from nanochat_jax.train.stopping import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reached(0)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
"""
    assert (
        subprocess.run([sys.executable, "-c", code], timeout=25).returncode == 128 + signal.SIGINT
    )


def test_every_evaluation_comes_after_a_save(tmp_path):
    saves = []

    def evaluate(params):
        saves.append(saved_steps(tmp_path / "d3") or list((tmp_path / "d3").glob("*tmp*")))
        return {"val_bpb": 1.0}

    run(tmp_path / "d3", evaluations=[Evaluation(3, evaluate)], keep=1)
    assert len(saves) == 2 and all(saves)
    assert saved_steps(tmp_path / "d3") == [STEPS]


def test_a_save_that_fails_in_the_background_stops_the_run_at_the_next_step(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    class Slow(CountedBatches):
        def __next__(self):
            if self.count == 2:
                time.sleep(2)
            return super().__next__()

    monkeypatch.setattr(
        "orbax.checkpoint._src.path.atomicity.AtomicRenameTemporaryPath.finalize", full
    )
    batches = Slow()
    with pytest.raises(UsageError, match="step 2 could not be written.*No space left"):
        run(tmp_path / "d3", save_every=2, batches=batches)
    assert batches.count <= 4 and not saved_steps(tmp_path / "d3")


def test_resume_from_step_goes_back_and_keeps_what_it_replaces(reference, saved_run, tmp_path):
    directory = shutil.copytree(saved_run, tmp_path / "d3")
    losses, params = run(directory, save_every=0, keep=3, resume_from_step=2)
    assert losses == reference[0]
    assert saved_steps(directory) == [2, STEPS]
    assert (directory / "replaced-4").is_dir() and (directory / "replaced-6").is_dir()
    with pytest.raises(UsageError, match="no step 3"):
        run(directory, resume_from_step=3)


def test_another_model_is_refused_and_nothing_is_renamed(saved_run, tmp_path):
    directory = shutil.copytree(saved_run, tmp_path / "d3")
    with pytest.raises(UsageError, match="another shape"):
        run(directory, model=dataclasses.replace(MODEL, n_layer=2), resume=True)
    assert saved_steps(directory) == [2, 4, 6]


def test_a_refused_resume_lists_the_settings_that_differ_and_renames_nothing(saved_run, tmp_path):
    class Other(CountedBatches):
        def set_state(self, state):
            raise UsageError("the data is another")

    directory = shutil.copytree(saved_run, tmp_path / "d3")
    said = r"the data is another\. "
    said += r"The saved run had `total_batch_size=-1` \(now `total_batch_size=64`\)$"
    for how in (dict(resume=True), dict(resume_from_step=2)):
        with pytest.raises(UsageError, match=said):
            run(directory, total_batch_size=64, batches=Other(), **how)
    with pytest.raises(UsageError, match="set `num_iterations=6` or more"):
        run(directory, num_steps=3, resume=True)
    assert saved_steps(directory) == [2, 4, 6]


def test_fresh_deletes_the_steps_of_the_tag_and_nothing_else(saved_run, tmp_path):
    for clear in (
        lambda path: claim_directory(path, resume=False, fresh=True),
        lambda path: clear_tag(path, delete=True),
    ):
        directory = shutil.copytree(saved_run, tmp_path / "tags" / "d3")
        others = [
            directory / "notes" / "mine.txt",
            directory / "mine.txt",
            directory / "damaged-3" / "params" / "x",
            directory.parent / "d33" / "5" / "params" / "x",
        ]
        for path in others:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("mine")
        clear(directory)
        assert saved_steps(directory) == [] and not (directory / "4").exists()
        assert [path.read_text() for path in others] == ["mine"] * len(others)
        shutil.rmtree(directory.parent)


# Orbax drops readers of the torn step
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage", ["truncate", "remove", "one bit of the arrays", "a digit of the state"]
)
def test_a_damaged_checkpoint_falls_back_to_the_step_before(
    reference, saved_run, tmp_path, caplog, damage
):
    shutil.copytree(saved_run, tmp_path / "d3")
    torn = max((tmp_path / "d3").glob("[0-9]*"), key=lambda path: int(path.name))
    files = sorted(
        (path for path in torn.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    if damage == "truncate":
        os.truncate(files[-1], files[-1].stat().st_size // 2)
    elif damage == "remove":
        shutil.rmtree(torn / "params")
    elif damage == "one bit of the arrays":
        content = bytearray(files[-1].read_bytes())
        content[len(content) // 2] ^= 1
        files[-1].write_bytes(content)
    else:
        state = torn / "state" / "metadata"
        state.write_text(
            state.read_text().replace('"position": {"position": 6}', '"position": {"position": 5}')
        )
    losses, params = run(tmp_path / "d3", save_every=2, keep=3, resume=True)
    assert str(torn) in caplog.text
    assert (tmp_path / "d3" / f"damaged-{torn.name}").is_dir()
    assert losses == reference[0]
    jax.tree.map(np.testing.assert_array_equal, params, reference[1])


def test_a_model_is_compared_as_a_config():
    job = SimpleNamespace(model=MODEL, directory="d3", metadata={}, num_steps=STEPS)
    before = dataclasses.asdict(MODEL)
    for config, accepted in (
        ({name: value for name, value in before.items() if name != "softcap"}, True),
        (before | {"softcap": 30.0}, False),
        (before | {"a_later_field": 1}, False),
    ):
        with nullcontext() if accepted else pytest.raises(UsageError, match="another shape"):
            require_same_run(job, {"model_config": config, "step": 2})


def test_an_existing_run_is_neither_overwritten_nor_continued_unasked(tmp_path):
    run(tmp_path / "d3")
    with pytest.raises(UsageError, match="`resume` continues"):
        run(tmp_path / "d3")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Broken(CountedBatches):
        def __next__(self):
            batch = super().__next__()
            return (
                batch if self.count <= 2 else {n: np.full_like(x, 2**30) for n, x in batch.items()}
            )

    with pytest.raises(UsageError, match=r"loss of step 2 .*last good checkpoint is step 2"):
        run(tmp_path / "d3", batches=Broken(), save_every=2)
    dumped = np.load(tmp_path / "d3" / "bad-batch-2-0.npz")
    assert (dumped["inputs"] == 2**30).all()


def test_a_batch_without_supervised_tokens_changes_nothing_but_decay(tmp_path):
    class Silent(CountedBatches):
        def __next__(self):
            batch = super().__next__()
            return batch | {"targets": np.full_like(batch["targets"], -1)}

    losses, params = run(tmp_path / "d3", batches=Silent())
    assert losses == [0.0] * STEPS
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_the_automatic_batch_is_the_largest_that_fits(monkeypatch):
    mesh, length = make_mesh("2x1"), MODEL.sequence_len
    schedules = Schedules(lr_multiplier=lambda step: 1.0, momentum=lambda step: 0.9)
    optimizer = make_optimizer(MODEL, OptimizerConfig(), schedules, Compute(mesh=mesh))
    state, shardings = init_state(MODEL, optimizer, mesh, fsdp=False, seed=0)
    step_fn = make_train_step(MODEL, optimizer, Compute(mesh=mesh), shardings)
    shapes = {size: batch_shape(48 * length, size, length, mesh) for size in (12, 24)}
    needed = {size: compile_step(step_fn, state, shape, mesh)[1] for size, shape in shapes.items()}
    assert needed[12] < needed[24]
    monkeypatch.setattr(memory, "memory_limit", lambda: needed[12] / 0.7 + 1)
    assert choose_batch_shape(48 * length, length, "auto", mesh, step_fn, state) == shapes[12]
    monkeypatch.setattr(memory, "memory_limit", lambda: needed[12] - 1)
    with pytest.raises(UsageError, match=r"halve `device_batch_size` \(try 6\)"):
        compile_step(step_fn, state, shapes[12], mesh)


@pytest.mark.parametrize("mesh", ["16x1", "3", "0x1", "8x", "axb"])
def test_a_mesh_that_does_not_fit_is_refused(mesh):
    with pytest.raises(UsageError, match=mesh):
        make_mesh(mesh)


@pytest.mark.parametrize("total, device_batch", [(100, 1), (16 * 12, 1), (16 * 24, 2)])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_would(total, device_batch):
    with pytest.raises(UsageError, match="try"):
        batch_shape(total, device_batch, 16, make_mesh("8x1"))


def test_checkpoints_of_nanochats_pytorch_code_are_left_alone(tmp_path):
    theirs = tmp_path / "base_checkpoints" / "d20"
    theirs.mkdir(parents=True)
    (theirs / "model_021400.pt").write_text("weights")
    for fresh in (False, True):
        with pytest.raises(UsageError, match="model_021400.pt"):
            claim_directory(theirs, resume=False, fresh=fresh)
    assert (theirs / "model_021400.pt").read_text() == "weights"
    for tag in (None, "d20"):
        with pytest.raises(NotFound, match=f"import_weights --from {theirs}"):
            load_model(Paths(tmp_path), "base", tag=tag)
    (theirs.parent / "d4" / "7" / "params").mkdir(parents=True)
    with pytest.raises(NotFound, match="there are d4"):
        load_model(Paths(tmp_path), "base", tag="d8")


def test_the_largest_model_that_has_a_step_is_meant_where_no_tag_is_named(tmp_path):
    for name in ("d9", "d4-test", "d4", "mine"):
        (tmp_path / "base_checkpoints" / name).mkdir(parents=True)
    with pytest.raises(NotFound, match="scripts.base_train"):
        Paths(tmp_path).find_tag("base")
    for name in ("mine", "d4-test", "d4"):
        (tmp_path / "base_checkpoints" / name / "7" / "params").mkdir(parents=True)
        assert Paths(tmp_path).find_tag("base") == name


@pytest.mark.parametrize(
    "before, resolved, flags, now, difference",
    [
        (
            dict(total_batch_size=128),
            {},
            dict(total_batch_size=256),
            {},
            "`total_batch_size=128` (now `total_batch_size=256`)",
        ),
        ({}, dict(data="embedded"), {}, dict(data="custom"), "`data=embedded` (now `data=custom`)"),
        (dict(data_shards=4), {}, {}, {}, "`data_shards=4` (now no `data_shards`)"),
        (dict(eval_every=3, seed=1), {}, {}, {}, ""),
    ],
)
def test_only_settings_that_a_saved_state_depends_on_are_listed(
    before, resolved, flags, now, difference
):
    saved = {"config": dataclasses.asdict(BaseTrainConfig(**before)), **resolved}
    text = f". The saved run had {difference}" if difference else ""
    assert differences(BaseTrainConfig(**flags), now, saved) == text


def test_profile_writes_a_trace_of_the_steps(tmp_path):
    run(tmp_path / "d3", profile="2:4")
    assert list((tmp_path / "d3" / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match="4:2"):
        TrainConfig(profile="4:2")

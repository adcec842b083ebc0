"""The training loop: equal on any mesh, exact when resumed, never fooled by a torn checkpoint."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.cli import UsageError
from nanochat_jax.config import GPTConfig
from nanochat_jax.metrics import read_metrics
from nanochat_jax.optim import OptimizerConfig, cosine_decay, make_optimizer, modern_momentum, trapezoid
from nanochat_jax.sharding import make_mesh
from nanochat_jax.step import batch_shape, init_state, make_train_step
from nanochat_jax.stopping import EXIT_STOPPED
from nanochat_jax.train import Evaluation, Job, TrainConfig, train

MODEL = GPTConfig.modern(3, n_embd=32, n_head=4, n_kv_head=4, vocab_size=100, sequence_len=16)
ROWS, STEPS = 8, 6


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """Most runs here compile the same step."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


class CountedBatches:
    """Batch i is a function of i; the position is i. Some targets are ignored, unevenly over the rows."""

    def __init__(self, stop_at=None):
        self.position, self.stop_at = 0, stop_at

    def __next__(self):
        if self.position == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        rng = np.random.default_rng(self.position)
        self.position += 1
        tokens = rng.integers(0, MODEL.vocab_size, (ROWS, MODEL.sequence_len + 1)).astype(np.int32)
        targets = np.where(rng.random((ROWS, MODEL.sequence_len)) < 0.3, -1, tokens[:, 1:]).astype(np.int32)
        return {"inputs": tokens[:, :-1], "targets": targets}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def run(directory, *, mesh="1x1", device_batch=ROWS, fsdp=False, batches=None, **flags):
    mesh = make_mesh(mesh)
    config = TrainConfig(eval_every=-1, **flags)
    shape = batch_shape(ROWS * MODEL.sequence_len, device_batch, MODEL.sequence_len, mesh)
    multiplier = trapezoid(STEPS, warmup=2, warmdown_ratio=0.5, final_fraction=0.1)
    optimizer = make_optimizer(MODEL, OptimizerConfig(), lr_multiplier=multiplier, momentum=modern_momentum(STEPS, 0.5),
                               weight_decay=cosine_decay(0.1, STEPS), lr_scale=0.05, mesh=mesh)
    state, shardings = init_state(MODEL, optimizer, mesh, fsdp=fsdp, seed=1)
    step = make_train_step(MODEL, optimizer, dtype=jnp.float32, mesh=mesh, shardings=shardings)
    job = Job(name="test", config=config, model=MODEL, directory=directory, num_steps=STEPS, shape=shape,
              lr_multiplier=multiplier, evaluations=[Evaluation(-1, lambda params: {"val_bpb": 1.0})], metadata={})
    outcome = train(job, state, shardings, step, batches or CountedBatches())
    losses = [line["loss"] for line in read_metrics(directory / "metrics.jsonl") if line["kind"] == "train"]
    return losses, jax.tree.map(np.asarray, outcome.params)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run(tmp_path_factory.mktemp("reference") / "d3")


@pytest.mark.parametrize("mesh, device_batch, fsdp", [
    ("8x1", 1, False), ("4x2", 2, False), ("2x4", 2, False), ("8x1", 1, True), ("1x1", 2, False)])
def test_losses_do_not_depend_on_the_mesh_or_on_how_a_batch_is_cut(reference, tmp_path, mesh, device_batch, fsdp):
    losses, _ = run(tmp_path / "d3", mesh=mesh, device_batch=device_batch, fsdp=fsdp)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)


def test_a_stopped_run_resumes_bit_for_bit(reference, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "d3", batches=CountedBatches(stop_at=3))
    assert stopped.value.code == EXIT_STOPPED
    losses, params = run(tmp_path / "d3", resume=True)
    assert losses == reference[0]
    jax.tree.map(np.testing.assert_array_equal, params, reference[1])


def test_a_run_resumes_on_another_mesh(reference, tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path / "d3", mesh="8x1", device_batch=1, batches=CountedBatches(stop_at=3))
    losses, _ = run(tmp_path / "d3", mesh="4x2", device_batch=2, resume=True)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax drops readers of the torn step
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_torn_checkpoint_falls_back_to_the_step_before(reference, tmp_path, caplog, damage):
    run(tmp_path / "d3", save_every=2, keep=3)
    torn = max((tmp_path / "d3").glob("[0-9]*"), key=lambda path: int(path.name))
    files = sorted((path for path in torn.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "truncate":
        os.truncate(files[-1], files[-1].stat().st_size // 2)
    else:
        shutil.rmtree(torn / "params")
    losses, params = run(tmp_path / "d3", save_every=2, keep=3, resume=True)
    assert str(torn) in caplog.text
    assert losses == reference[0]
    jax.tree.map(np.testing.assert_array_equal, params, reference[1])


def test_an_existing_run_is_neither_overwritten_nor_continued_unasked(tmp_path):
    run(tmp_path / "d3")
    with pytest.raises(UsageError, match="--resume"):
        run(tmp_path / "d3")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Broken(CountedBatches):
        def __next__(self):
            return super().__next__() if self.position < 2 else {
                name: np.full((ROWS, MODEL.sequence_len), 2**30, np.int32) for name in ("inputs", "targets")}

    with pytest.raises(UsageError, match="loss of step"):
        run(tmp_path / "d3", batches=Broken())


@pytest.mark.parametrize("mesh", ["16x1", "3", "0x1", "8x", "axb"])
def test_a_mesh_that_does_not_fit_is_refused(mesh):
    with pytest.raises(UsageError, match=mesh):
        make_mesh(mesh)


@pytest.mark.parametrize("total, device_batch", [(100, 1), (16 * 12, 1), (16 * 24, 2)])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_would(total, device_batch):
    with pytest.raises(UsageError, match="try"):
        batch_shape(total, device_batch, 16, make_mesh("8x1"))


def test_metrics_are_whole_json_lines(reference, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 0}) + "\n" + '{"step": 1, "lo')
    assert read_metrics(path) == [{"step": 0}]

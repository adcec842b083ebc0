"""Several processes: losses equal those of one, and any number continues their checkpoints."""

import os
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from small_line import MODEL, errors_of, lines, losses, make_base, run, start

from nanochat_jax import cli
from nanochat_jax.devices import Processes, join_processes
from nanochat_jax.errors import UsageError
from nanochat_jax.train.stopping import EXIT_STOPPED

pytestmark = pytest.mark.slow
STEPS = 4
FLAGS = [
    *MODEL,
    *f"--total-batch-size 1024 --device-batch-size 1 --num-iterations {STEPS}".split(),
    *"--save-every 2 --keep 3 --eval-every -1 --eval-tokens 512".split(),
]
ENDLESS = [*FLAGS, *"--num-iterations 100000 --save-every 0 --mesh 8x1".split()]
ONE, TWO = dict(devices=8), dict(devices=4, processes=2)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def train(paths, tag, mesh, where, *more):
    """Standard error of process 0."""
    flags = [*FLAGS, "--mesh", mesh, "--model-tag", tag, *more]
    return run("base_train", *flags, base=paths.base, **where)


@pytest.fixture(scope="module")
def one(paths):
    """One process with 8 devices."""
    train(paths, "one", "8x1", ONE)
    return paths.checkpoints("base") / "one"


@pytest.fixture(scope="module")
def named(paths):
    """Two processes with 4 devices each, named by flags: their directory and standard errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [*FLAGS, *f"--mesh 8x1 --model-tag two --coordinator 127.0.0.1:{port}".split()]
    count = "--num-processes 2 --process-id".split()
    running = [
        start("base_train", *flags, *count, str(index), base=paths.base, devices=4)[0]
        for index in range(2)
    ]
    logs = errors_of(running)
    assert [process.returncode for process in running] == [0, 0], logs
    return paths.checkpoints("base") / "two", logs


@pytest.fixture(scope="module")
def two(named):
    return named[0]


def assert_equal_runs(run, expected):
    np.testing.assert_allclose(losses(run), losses(expected), rtol=1e-5)
    assert len(losses(run)) == STEPS
    bpb = [[line["val_bpb"] for line in lines(path, "eval")] for path in (run, expected)]
    np.testing.assert_allclose(*bpb, rtol=1e-5)


def test_a_run_of_two_processes_is_continued_by_one(paths, one, two):
    assert_equal_runs(two, one)
    handed = shutil.copytree(two, two.with_name("handed"))
    shutil.rmtree(handed / "4")  # as if killed before the last save
    train(paths, "handed", "4x2", ONE, "--resume")
    assert_equal_runs(handed, one)


def test_a_step_that_one_process_cannot_read_is_skipped_by_all(paths, one, two):
    torn = shutil.copytree(two, two.with_name("torn"))
    # the share of process 1
    for file in (torn / "4" / "optimizer" / "ocdbt.process_1" / "d").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    log = train(paths, "torn", "8x1", TWO, "--resume")
    assert f"{torn / '4'} cannot be read (process 1: " in log
    assert (torn / "damaged-4").is_dir() and (torn / "4").is_dir()
    assert_equal_runs(torn, one)


def test_a_run_of_one_process_is_continued_with_a_model_axis_over_two(paths, one):
    both = shutil.copytree(one, one.with_name("both"))
    shutil.rmtree(both / "4")
    train(paths, "both", "1x8", TWO, "--resume")
    assert_equal_runs(both, one)


def start_endless(paths, tag):
    """Two processes that have finished a step, and the directory of their run."""
    running = start("base_train", *ENDLESS, "--model-tag", tag, base=paths.base, **TWO)
    directory = paths.checkpoints("base") / tag
    deadline = time.monotonic() + 300
    while not ((directory / "metrics.jsonl").exists() and losses(directory)):
        assert time.monotonic() < deadline and running[0].poll() is None
        time.sleep(0.1)
    return running, directory


def test_a_preempted_process_stops_all_of_them_at_one_step(paths):
    running, directory = start_endless(paths, "preempted")
    running[1].send_signal(signal.SIGTERM)
    logs = errors_of(running)
    assert [process.returncode for process in running] == [EXIT_STOPPED] * 2, logs
    (step,) = (int(name) for name in os.listdir(directory) if name.isdigit())
    assert len(losses(directory)) == step


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_others_with_an_error(paths, victim):
    running, _ = start_endless(paths, f"dead-{victim}")
    running[victim].kill()
    _, log = running[1 - victim].communicate(timeout=150)
    assert running[1 - victim].returncode not in (0, EXIT_STOPPED), log
    running[victim].communicate()


def test_flags_name_the_processes_as_the_environment_does(one, named):
    """The other tests name them by the environment."""
    directory, logs = named
    assert_equal_runs(directory, one)
    assert "in 4 steps" in logs[0] and "in 4 steps" not in logs[1]


@pytest.mark.parametrize(
    "flags",
    [
        "--coordinator here",
        "--num-processes 2",
        "--coordinator a:1 --num-processes 2 --process-id 2",
    ],
)
def test_incomplete_process_flags_are_refused(flags):
    with pytest.raises(UsageError, match="--process-id|`process_id`"):
        join_processes(cli.parse(Processes, flags.split(), prog="test", description=""))

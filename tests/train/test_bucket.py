"""Checkpoints in a bucket, against a server that speaks Google Cloud Storage's API."""

import itertools
import json
import os
import shutil
import time

import jax
import numpy as np
import pytest
from gcs_server import GCSServer, Refused
from small_line import MODEL, errors_of, losses, make_base, run, start
from test_train import STEPS, CountedBatches
from test_train import run as train_run

pytest.importorskip("gcsfs")

from nanochat_jax import storage  # noqa: E402
from nanochat_jax.checkpoint import lock_tag, locking  # noqa: E402
from nanochat_jax.errors import UsageError  # noqa: E402
from nanochat_jax.metrics import read_metrics  # noqa: E402
from nanochat_jax.paths import Paths, saved_steps  # noqa: E402


@pytest.fixture(scope="module")
def server():
    """One for all tests: clients look at the environment once."""
    with GCSServer() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def place(server, request):
    """A directory of a tag in the bucket, of this test alone."""
    yield (
        storage.open_bucket("gs://bucket/run")
        / "base_checkpoints"
        / request.node.name.replace("[", "-").strip("]")
    )
    server.before_change = lambda name: None


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run on a disk."""
    return train_run(tmp_path_factory.mktemp("reference") / "d3")


@pytest.fixture(scope="module")
def saved(server, tmp_path_factory):
    """The objects of a finished run with the steps 2, 4 and 6, by their names under the tag."""
    directory = storage.open_bucket("gs://bucket/saved") / "d3"
    train_run(directory, logs=tmp_path_factory.mktemp("saved"), save_every=2, keep=3)
    return {
        name.removeprefix("bucket/saved/d3"): server.objects[name]
        for name in server.under("bucket/saved/d3/")
    }


def copy_to(server, objects, directory):
    for name, content in objects.items():
        server.store(str(directory).removeprefix("gs://") + name, content)


def test_a_stopped_run_goes_on_bit_for_bit_on_a_machine_that_has_only_the_bucket(
    reference, server, place, tmp_path
):
    with pytest.raises(SystemExit):
        train_run(place, logs=tmp_path / "one", batches=CountedBatches(stop_at=3))
    assert saved_steps(place) == [4]
    found, params = train_run(place, logs=tmp_path / "another", resume=True)
    assert found == reference[0]
    jax.tree.map(np.testing.assert_array_equal, params, reference[1])
    assert (place / "metrics.jsonl").read_text() == (
        tmp_path / "another" / "metrics.jsonl"
    ).read_text()


def test_keep_deletes_old_steps_and_nothing_else(server, place, tmp_path):
    train_run(place, logs=tmp_path, save_every=1, keep=2)
    assert saved_steps(place) == [STEPS - 1, STEPS]
    assert {path.name for path in place.iterdir()} == {str(STEPS - 1), str(STEPS), "metrics.jsonl"}


def test_steps_there_are_neither_overwritten_nor_continued_unasked_and_fresh_deletes_them(
    server, saved, place, tmp_path
):
    copy_to(server, saved, place)
    with pytest.raises(UsageError, match="2, 4, 6.*`resume`"):
        train_run(place, logs=tmp_path)
    train_run(place, logs=tmp_path, fresh=True, save_every=0)
    assert saved_steps(place) == [STEPS]


# Orbax drops readers of the torn step
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["cut", "gone", "one bit"])
def test_a_damaged_step_falls_back_to_the_one_before(
    reference, server, saved, place, tmp_path, caplog, damage
):
    copy_to(server, saved, place)
    start_of_name = str(place).removeprefix("gs://")
    largest = max(server.under(f"{start_of_name}/6/"), key=lambda name: len(server.objects[name]))
    content = bytearray(server.objects[largest])
    if damage == "one bit":
        content[len(content) // 2] ^= 1
    server.store(largest, bytes(content if damage == "one bit" else content[: len(content) // 2]))
    if damage == "gone":
        del server.objects[largest]
    found, params = train_run(place, logs=tmp_path, resume=True, save_every=2, keep=3)
    assert f"{place}/6 cannot be read" in caplog.text
    assert found == reference[0]
    jax.tree.map(np.testing.assert_array_equal, params, reference[1])
    assert (place / "damaged-6" / storage.COMMITTED).exists() and saved_steps(place) == [2, 4, 6]


def test_wherever_a_move_breaks_off_one_of_both_is_whole(server, saved, place):
    step = {
        name.removeprefix("/2/"): content
        for name, content in saved.items()
        if name.startswith("/2/")
    }
    start_of_name = str(place).removeprefix("gs://")

    def there(name):
        return {
            key.removeprefix(f"{start_of_name}/{name}/"): server.objects[key]
            for key in server.under(f"{start_of_name}/{name}/")
        }

    for changes in itertools.count():
        server.before_change = lambda name: None
        storage.delete(place)
        copy_to(server, {f"/2/{name}": content for name, content in step.items()}, place)
        left = iter(range(changes))

        def refuse_after(name, left=left):
            if next(left, None) is None:
                raise Refused(403)

        server.before_change = refuse_after
        try:
            storage.move(place / "2", place / "replaced-2")
        except OSError:
            marked = [
                found for found in (there("2"), there("replaced-2")) if storage.COMMITTED in found
            ]
            assert marked and all(found == step for found in marked)
        else:
            assert not there("2") and there("replaced-2") == step
            break
    assert changes > 2 * len(step) - 1


def test_refused_writes_stop_the_run_in_one_line(server, place, tmp_path):
    def refuse(name):
        if "/4/" in name:
            raise Refused(403)

    server.before_change = refuse
    with pytest.raises(
        UsageError, match="step 4 could not be written.*last good checkpoint is step 2"
    ) as stopped:
        train_run(place, logs=tmp_path, save_every=2)
    assert "\n" not in str(stopped.value)


def test_a_bucket_out_of_reach_is_one_line(server):
    with pytest.raises(UsageError, match="gs://missing/run cannot be reached .*404") as error:
        storage.open_bucket.__wrapped__("gs://missing/run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("NANOCHAT_CHECKPOINT_DIR", "s3://bucket", "gs://bucket"),
        ("NANOCHAT_CHECKPOINT_DIR", "/mnt", "NANOCHAT_BASE_DIR"),
        ("NANOCHAT_BASE_DIR", "gs://bucket", "NANOCHAT_CHECKPOINT_DIR"),
    ],
)
def test_other_places_are_refused_with_what_to_give_instead(
    monkeypatch, tmp_path, name, value, said
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{name}={value}.*{said}"):
        Paths.from_env()


def lock_object(place):
    return f"{str(place.parent).removeprefix('gs://')}/.{place.name}.lock"


def hold(server, place, *, pid=1, machine=None, expires=60.0):
    """The lock of another run, as its process wrote it."""
    holder = {
        "id": "other",
        "process": "process 1 on host",
        "pid": pid,
        "expires": time.time() + expires,
        "machine": storage._machine() if machine is None else machine,
    }
    server.store(lock_object(place), json.dumps(holder).encode())


@pytest.mark.parametrize(
    "holder",
    [dict(machine="another"), dict(pid=os.getppid()), dict(machine="another", pid=2**22 + 1)],
    ids=["host", "parent", "its pid"],
)
def test_a_tag_in_use_in_the_bucket_is_refused(server, place, tmp_path, holder):
    hold(server, place, **holder)
    before = server.objects[lock_object(place)]
    with (
        pytest.raises(
            UsageError, match=f"^{place} is in use by process 1 on host: wait"
        ) as refused,
        lock_tag(place),
    ):
        raise AssertionError("two runs hold the lock")
    assert "\n" not in str(refused.value) and server.objects[lock_object(place)] == before


@pytest.mark.parametrize(
    "holder",
    [
        None,
        dict(machine="another", expires=-1.0),
        dict(pid=2**22 + 1),
        dict(pid=os.getpid()),
        b"torn",
    ],
    ids=["none", "expired", "dead", "same number", "torn"],
)
def test_a_lock_that_a_crash_left_in_the_bucket_is_taken_over_and_released(server, place, holder):
    if isinstance(holder, bytes):
        server.store(lock_object(place), holder)
    elif holder is not None:
        hold(server, place, **holder)
    with lock_tag(place):
        assert json.loads(server.objects[lock_object(place)])["pid"] == os.getpid()
    assert lock_object(place) not in server.objects


def test_a_lock_whose_answer_was_lost_is_still_ones_own(server, place, monkeypatch):
    from google.api_core.exceptions import PreconditionFailed
    from google.cloud.storage import Blob

    upload = Blob.upload_from_string

    def lose(self, *args, **options):
        upload(self, *args, **options)
        raise PreconditionFailed("the client tried again")

    monkeypatch.setattr(storage, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(Blob, "upload_from_string", lose)
    with lock_tag(place):
        first = server.generations[lock_object(place)]
        deadline = time.monotonic() + 60
        while server.generations[lock_object(place)] < first + 2:  # heartbeats
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not locking._bucket_locks[str(place)].lost
    assert lock_object(place) not in server.objects


def test_a_lock_in_the_bucket_is_renewed_until_another_run_takes_it(
    server, place, tmp_path, monkeypatch
):
    monkeypatch.setattr(storage, "HEARTBEAT_S", 0.05)

    def wait_for(what):
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with lock_tag(place):
        first = server.generations[lock_object(place)]
        wait_for(lambda: server.generations[lock_object(place)] > first + 1)
        hold(server, place, machine="another")
        wait_for(lambda: locking._bucket_locks[str(place)].lost)
        with pytest.raises(UsageError, match="another run has taken .* over"):
            train_run(place, logs=tmp_path)
    assert json.loads(server.objects[lock_object(place)])["id"] == "other"
    assert saved_steps(place) == []


FLAGS = [
    *MODEL,
    *"--total-batch-size 512 --device-batch-size 1 --num-iterations 8".split(),
    *"--save-every 2 --eval-every -1 --eval-tokens 512".split(),
]


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_saves_loses_nothing(server, tmp_path):
    paths, env = make_base(tmp_path), {"NANOCHAT_CHECKPOINT_DIR": "gs://bucket/killed"}
    run("base_train", *FLAGS, "--model-tag", "alone", base=paths.base)  # on the disk
    whole, victims = [], []
    # At the first object of a step; among its arrays; at the object that would make it whole.
    for last in ("/2/", "/4/optimizer/manifest.ocdbt", f"/6/{storage.COMMITTED}"):

        def kill(name, last=last):
            if last in name:
                victims[-1].kill()
                victims[-1].wait()
                raise Refused(503)

        server.before_change = lambda name: None
        (process,) = start(
            "base_train", *FLAGS, "--model-tag", "killed", "--resume", base=paths.base, env=env
        )
        victims.append(process)
        server.before_change = kill
        assert process.wait(timeout=300) == -9, process.stderr.read()
        process.stderr.close()
        place = storage.open_bucket("gs://bucket/killed") / "base_checkpoints" / "killed"
        whole.append(max(saved_steps(place), default=0))
    server.before_change = lambda name: None
    assert whole == [0, 2, 4]
    shutil.rmtree(paths.logs("base") / "killed")
    run("base_train", *FLAGS, "--model-tag", "killed", "--resume", base=paths.base, env=env)
    alone, killed = (paths.logs("base") / tag for tag in ("alone", "killed"))
    assert losses(killed) == losses(alone) and len(losses(killed)) == 8
    # Another command on a machine with the bucket alone: the tokenizer comes from there, too.
    (tmp_path / "empty").mkdir()
    paths.data("embedded").rename(tmp_path / "empty" / paths.data("embedded").name)
    flags = "--split-tokens 512 --device-batch-size 2".split()
    said = run("base_loss", *flags, base=tmp_path / "empty", env=env)
    assert f"{read_metrics(killed / 'metrics.jsonl')[-1]['val_bpb']:.4f}" in said


@pytest.mark.slow
def test_two_processes_without_a_disk_in_common_train_as_one_and_go_on_as_one(server, tmp_path):
    bases = [make_base(tmp_path / str(index)).base for index in range(2)]
    env = {"NANOCHAT_CHECKPOINT_DIR": "gs://bucket/pod"}
    run("base_train", *FLAGS, "--mesh", "2x1", base=bases[0], devices=2)  # on the disk
    flags = [*FLAGS, "--mesh", "2x1", "--model-tag", "pod"]
    refused = start("base_train", *flags, base=bases, devices=1, processes=2)
    said = errors_of(refused)
    assert all(process.returncode == 2 for process in refused) and all(
        "NANOCHAT_CHECKPOINT_DIR" in text for text in said
    ), said
    run("base_train", *flags, "--keep", "3", base=bases, devices=1, processes=2, env=env)
    place = storage.open_bucket("gs://bucket/pod") / "base_checkpoints" / "pod"
    assert saved_steps(place) == [4, 6, 8]
    np.testing.assert_allclose(
        losses(bases[0] / "base_checkpoints" / "pod"),
        losses(bases[0] / "base_checkpoints" / "d2"),
        rtol=1e-5,
    )
    storage.delete(place / "8")
    run("base_train", *flags, "--resume", base=bases[1], devices=2, env=env)
    np.testing.assert_allclose(
        losses(bases[1] / "base_checkpoints" / "pod"),
        losses(bases[0] / "base_checkpoints" / "d2"),
        rtol=1e-5,
    )

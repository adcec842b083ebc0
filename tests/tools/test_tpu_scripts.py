"""The launch scripts: a dry run prints every command and runs none."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

TPU = Path(__file__).parents[2] / "tpu"
SCRIPTS = sorted(path.name for path in TPU.glob("*.sh") if path.name != "common.sh")


@pytest.fixture
def gcloud(tmp_path):
    """A stand-in first on PATH that notes its arguments and says ACTIVE."""
    (tmp_path / "gcloud").write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$*" >>{tmp_path}/called\necho ${{STATE:-ACTIVE}}\n'
    )
    (tmp_path / "gcloud").chmod(0o755)
    return tmp_path


def launch(gcloud, script, *argv, **env):
    return subprocess.run(
        ["bash", TPU / script, *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ
        | {"PATH": f"{gcloud}:{os.environ['PATH']}", "TPU_REPO": "https://example.org/a b.git"}
        | env,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_commands_and_runs_none(gcloud, script):
    argv = ["base_train", "--depth", "20"] if script in ("run.sh", "resume.sh") else []
    done = launch(gcloud, script, "--dry-run", *argv)
    assert done.returncode == 0, done.stderr
    assert not (gcloud / "called").exists()
    printed = [shlex.split(line) for line in done.stdout.splitlines()]
    assert printed and all(words[:3] == ["gcloud", "compute", "tpus"] for words in printed)


def test_what_is_printed_is_what_is_run(gcloud):
    for script, *argv in (
        ["create.sh"],
        ["setup.sh"],
        ["delete.sh"],
        ["run.sh", "base_train", "--run", "my run; rm -rf /"],
    ):
        (gcloud / "called").unlink(missing_ok=True)
        printed = [
            " ".join(shlex.split(line)[1:])
            for line in launch(gcloud, script, "--dry-run", *argv).stdout.splitlines()
        ]
        assert launch(gcloud, script, *argv).returncode == 0
        assert (gcloud / "called").read_text().splitlines() == printed


@pytest.mark.parametrize("state, asked", [("ACTIVE", False), ("SUSPENDED", True)])
def test_only_a_lost_slice_is_deleted_and_asked_for_again(gcloud, state, asked):
    # create.sh waits for ACTIVE: a stand-in that says SUSPENDED for ever makes it give up, after
    # it has asked.
    launch(gcloud, "resume.sh", "base_train", STATE=state)
    called = (gcloud / "called").read_text()
    assert (" delete " in called, " create " in called) == (asked, asked)
    assert ("--resume" in called) != asked


@pytest.mark.parametrize(
    "script, argv", [("run.sh", []), ("run.sh", ["a;b"]), ("create.sh", ["x"]), ("resume.sh", [])]
)
def test_mistakes_are_refused_before_anything_is_run(gcloud, script, argv):
    done = launch(gcloud, script, *argv)
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and not (gcloud / "called").exists()
    )


def test_flags_reach_the_workers_quoted(gcloud):
    command = shlex.split(
        launch(gcloud, "run.sh", "--dry-run", "base_train", "--run", "my run; rm -rf /").stdout
    )[-1]
    assert r"my\ run\;\ rm\ -rf\ /" in command and "NANOCHAT_DISTRIBUTED=1" in command

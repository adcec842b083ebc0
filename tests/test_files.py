"""Files and directories appear whole or not at all, and replace only what they should."""

import contextlib
import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

from nanochat_jax import files
from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.files import (
    empty_directory,
    entries,
    fetch_file,
    finish_directory,
    is_complete,
    keep_old,
    lock_file,
    new_directory,
    set_aside,
    write_file,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.txt"
    write_file(path, "é")
    assert path.read_text(encoding="utf-8") == "é" and names(path.parent) == ["a.txt"]

    def full(path):
        raise OSError("no space left")

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_file(path, b"other")
    assert path.read_text(encoding="utf-8") == "é" and names(path.parent) == ["a.txt"]


def named(kind: str, tmp_path: Path, monkeypatch) -> Path:
    """A directory to fill, of one of the kinds that people name."""
    real = tmp_path / "real"
    if kind != "missing":
        real.mkdir()
    if kind == "link":
        (tmp_path / "link").symlink_to(real)
        return tmp_path / "link"
    if kind == "new disk":  # also what a killed process left
        (real / "lost+found").mkdir()
        (real / ".partial").mkdir()
        (real / ".partial" / "left").touch()
    if kind == "working directory":
        monkeypatch.chdir(real)
        return Path(".")
    return real / "below" if kind == "missing" else real


@pytest.mark.parametrize("kind", ["missing", "empty", "link", "new disk", "working directory"])
def test_a_directory_is_filled_in_place(tmp_path, monkeypatch, kind):
    directory = named(kind, tmp_path, monkeypatch)
    before = directory.stat().st_ino if directory.exists() else None
    with pytest.raises(ZeroDivisionError), new_directory(directory) as partial:
        (partial / "file").write_text(f"{1 / 0}")
    assert directory.exists() == (before is not None) and (
        before is None or entries(directory) == []
    )
    with new_directory(directory) as partial:
        (partial / "file").write_text("1")
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("2")
        assert partial.parent == directory and entries(directory) == []
    assert names(directory) == ["file", *(["lost+found"] if kind == "new disk" else []), "sub"]
    assert (directory / "sub" / "file").read_text() == "2" and is_complete(directory)
    assert before in (None, directory.stat().st_ino)  # a mount point cannot be renamed or replaced
    assert (tmp_path / "link").is_symlink() == (kind == "link")
    with (
        pytest.raises(UsageError, match="not an empty directory .it holds (file|sub)"),
        new_directory(directory),
    ):
        raise AssertionError("refused before the work")
    assert (directory / "file").read_text() == "1"


def test_files_are_added_and_replaced_only_when_told_to(tmp_path):
    for content, add in (("1", False), ("2", True)):
        with new_directory(tmp_path / "a", add=add) as partial:
            (partial / "same").write_text(content)
            (partial / f"of {content}").touch()
    assert (
        names(tmp_path / "a") == ["of 1", "of 2", "same"]
        and (tmp_path / "a" / "same").read_text() == "2"
    )


def test_files_that_came_meanwhile_are_not_replaced(tmp_path):
    with (
        pytest.raises(UsageError, match="not an empty directory"),
        new_directory(tmp_path / "a") as partial,
    ):
        (partial / "file").write_text("ours")
        (tmp_path / "a" / "file").write_text("the user's")
    assert (
        names(tmp_path / "a") == ["file"] and (tmp_path / "a" / "file").read_text() == "the user's"
    )


@pytest.mark.parametrize("moves", range(4))
def test_a_directory_whose_process_was_killed_is_not_taken_for_complete(
    tmp_path, monkeypatch, moves
):
    directory, replace = tmp_path / "a", Path.replace
    left = iter(range(moves))

    def killed(path, target):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with contextlib.suppress(KeyboardInterrupt), new_directory(directory) as partial:
        for size, name in ((900, "weights"), (3, "config"), (20, "tokenizer")):
            (partial / name).write_bytes(bytes(size))
    monkeypatch.undo()
    assert sorted(path.name for path in entries(directory)) == sorted(
        ["config", "tokenizer", "weights"][:moves]
    )
    assert is_complete(directory) == (moves == 3)
    finish_directory(directory)
    assert names(directory) == ["config", "tokenizer", "weights"] and is_complete(directory)


@pytest.mark.parametrize(
    "way, said",
    [
        ("file", "base is a file where a directory is needed: move it away"),
        ("file above", "base is a file where a directory is needed: move it away"),
        ("lost link", "base is a link to .*gone, which is not a directory: create or mount that"),
        (
            "lost link above",
            "base is a link to .*gone, which is not a directory: create or mount that",
        ),
        ("read-only", "cannot write to .*base: Read-only file system"),
        ("other process", "another process is writing to .*base: wait for it"),
    ],
)
def test_a_directory_that_cannot_be_written_is_refused_before_the_work(
    tmp_path, monkeypatch, way, said
):
    base = tmp_path / "base"
    directory = base / "a" / "b" if way.endswith("above") else base
    if way.startswith("file"):
        base.write_text("mine")
    elif way.startswith("lost link"):
        base.symlink_to(tmp_path / "gone")
    else:
        base.mkdir()
    if way == "read-only":

        def refuse(dir):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with contextlib.ExitStack() as stack:
        if way == "other process":
            stack.enter_context(new_directory(base))
        with pytest.raises(UsageError, match=said), new_directory(directory):
            raise AssertionError("refused before the work")
    if way.startswith("file"):
        with pytest.raises(UsageError, match=said):
            write_file(directory / "x", "")
        assert base.read_text() == "mine"


def test_a_link_to_a_file_is_written_through(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    for content in ("1", "2"):
        write_file(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (
            tmp_path / "disk" / "file"
        ).read_text() == content


def test_what_a_linked_directory_holds_is_set_aside_or_deleted_in_place(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    assert (
        set_aside(link, ".replaced") is None
        and set_aside(tmp_path / "missing", ".replaced") is None
    )
    for number in range(2):
        (real / "100" / "params").mkdir(parents=True)
        (real / ".lock").touch()
        assert set_aside(link, ".replaced") == link / f".replaced-{number}"
        assert (real / f".replaced-{number}" / "100" / "params").is_dir() and entries(link) == []
    (real / "200").mkdir()
    (real / "profile").symlink_to(tmp_path)  # is not followed
    empty_directory(link)
    assert link.is_symlink() and names(real) == [".lock", ".replaced-0", ".replaced-1"]


def test_a_file_in_the_way_is_kept_under_a_free_name(tmp_path):
    assert keep_old(tmp_path / "report.md") is None
    for number in (1, 2):
        (tmp_path / "report.md").write_text(f"{number}")
        assert keep_old(tmp_path / "report.md") == tmp_path / f"report.old-{number}.md"
    assert [(tmp_path / name).read_text() for name in names(tmp_path)] == ["1", "2"]


HOLD = """
import sys, time
from pathlib import Path
from nanochat_jax.files import lock_file
with lock_file(Path(sys.argv[1]), "d4", ""):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_lock_names_its_process_and_ends_with_it_however_it_ends(tmp_path):
    path = tmp_path / "tag" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        said = rf"d4 is in use by process {process.pid} on .*\(python -c .*\): wait"
        with pytest.raises(UsageError, match=said) as refused, lock_file(path, "d4", "wait"):
            raise AssertionError("two processes hold the lock")
        assert "\n" not in str(refused.value)
        process.kill()
    for _ in range(2):
        with lock_file(path, "d4", "wait"):
            assert str(os.getpid()) in path.read_text()


def test_a_file_system_without_locks_is_warned_of_and_used(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with lock_file(tmp_path / ".lock", "d4", "wait"), new_directory(tmp_path / "a") as partial:
        (partial / "file").touch()
    assert "without locks" in caplog.text and names(tmp_path / "a") == ["file"]


def test_a_file_is_fetched_once_whole_and_as_it_should_be(tmp_path):
    with HubServer() as server:
        server.plain |= {"words": b"word\n", "short": b"word\n" * 100}
        server.faults["short"] = "gone"
        url = f"{server.url}/files"
        path = tmp_path / "base" / "words.txt"
        checksum = hashlib.sha256(b"word\n").hexdigest()
        assert fetch_file(f"{url}/words", path, sha256=checksum).read_bytes() == b"word\n"
        path.write_text("mine")
        assert fetch_file(f"{url}/words", path, sha256=checksum).read_text() == "mine"
        for bad, options in (("missing", {}), ("short", {}), ("words", {"sha256": "0" * 64})):
            with pytest.raises(
                NotFound, match=rf"{bad}\.new.*could not be fetched from {url}/{bad}"
            ):
                fetch_file(f"{url}/{bad}", tmp_path / "base" / f"{bad}.new", **options)
        assert server.asked("/files/short") == files.ATTEMPTS
    assert names(path.parent) == ["words.txt"]

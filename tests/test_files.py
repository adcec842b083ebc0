"""Files and directories appear whole or not at all, and what was there is lost only to what replaces it."""

import hashlib
from pathlib import Path

import pytest
from hub_server import HubServer

from nanochat_jax import files
from nanochat_jax.cli import NotFound
from nanochat_jax.files import fetch_file, new_directory, undo_replacement, write_file


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


def test_a_directory_takes_its_name_when_it_is_full(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "of a killed process").touch()
    with new_directory(tmp_path / "a") as aside:
        (aside / "file").write_text("1")
        assert not (tmp_path / "a").exists()
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["file"]
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "b") as aside:
        (aside / "file").write_text(f"{1 / 0}")
    with pytest.raises(OSError), new_directory(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "file").read_text() == "1"


def test_a_directory_is_replaced_at_once_or_can_be_had_back(tmp_path, monkeypatch):
    directory = tmp_path / "a"
    with new_directory(directory) as aside:
        (aside / "old").touch()
    with new_directory(directory, replace=True) as aside:
        (aside / "new").touch()
    assert names(tmp_path) == ["a"] and names(directory) == ["new"]
    rename = Path.rename

    def killed(path, target):
        if path.name == ".a.partial":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt), new_directory(directory, replace=True) as aside:
        (aside / "newest").touch()
    monkeypatch.undo()
    undo_replacement(directory)
    undo_replacement(directory)
    assert names(tmp_path) == ["a"] and names(directory) == ["new"]


def test_a_directory_that_was_replaced_but_not_tidied_up_can_be_replaced_again(tmp_path):
    directory, left = tmp_path / "a", tmp_path / ".a.replaced"
    for path in (directory, left):  # as a kill between the new name and the deletion of the old leaves them
        path.mkdir()
        (path / "file").touch()
    with new_directory(directory, replace=True) as aside:
        (aside / "new").touch()
    assert names(tmp_path) == ["a"] and names(directory) == ["new"]
    left.mkdir()
    undo_replacement(directory)
    directory.rename(tmp_path / "removed")
    undo_replacement(directory)
    assert names(tmp_path) == ["removed"]


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
            with pytest.raises(NotFound, match=rf"{bad}\.new.*could not be fetched from {url}/{bad}"):
                fetch_file(f"{url}/{bad}", tmp_path / "base" / f"{bad}.new", **options)
        assert server.asked("/files/short") == files.ATTEMPTS
    assert names(path.parent) == ["words.txt"]

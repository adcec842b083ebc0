"""Facts about the machine and the code, without initializing an accelerator."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

SOURCE_SUFFIXES = (".py", ".md", ".rs", ".html", ".toml", ".sh")
CHARS_PER_TOKEN = 4


def machine_facts() -> dict[str, str]:
    facts = {}
    if root := _checkout():
        branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD")
        commit = _git(root, "rev-parse", "--short", "HEAD")
        if branch and commit:
            state = "modified" if _git(root, "status", "--porcelain") else "clean"
            subject = (_git(root, "log", "-1", "--format=%s") or "")[:80]
            facts["Git"] = f"{branch} {commit} ({state}) {subject}".rstrip()
    facts["Platform"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    facts["CPU cores"] = str(os.cpu_count())
    if "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        facts["Memory"] = f"{memory / 2**30:.1f} GiB"
    facts["Python"] = platform.python_version()
    facts["JAX"] = importlib.metadata.version("jax")
    return facts


def code_size() -> str | None:
    """Size of the tracked sources; None outside of a checkout."""
    if (root := _checkout()) is None:
        return None
    names = (_git(root, "ls-files", "-z") or "").split("\0")
    files = [root / name for name in names if name.endswith(SOURCE_SUFFIXES)]
    texts = [path.read_text("utf-8", errors="replace") for path in files if path.is_file()]
    chars, lines = sum(map(len, texts)), sum(text.count("\n") for text in texts)
    tokens = chars // CHARS_PER_TOKEN
    return (
        f"{chars:,} characters, {lines:,} lines, {len(texts):,} files, about {tokens:,} tokens"
        if texts
        else None
    )


def _checkout() -> Path | None:
    """The git checkout that this package runs from; None if it is installed elsewhere."""
    root = Path(__file__).resolve().parents[2]
    top = _git(root, "rev-parse", "--show-toplevel")
    return root if top and Path(top).resolve() == root else None


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command; None if git is missing or fails."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

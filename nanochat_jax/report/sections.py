"""The report of a run: every stage logs a section, `generate` makes one document of them.

    python -m nanochat_jax.report reset       before a run: drop old sections, note the time and
    the machine python -m nanochat_jax.report generate    after it: report.md, report.html (with
    curves) and results.json

Stages call `log_section` from process 0. A section is two files in the report directory:
`<slug>.md` for people and `<slug>.json` for `generate`, which never reads numbers back out of
prose.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from nanochat_jax import cli
from nanochat_jax.cli import NoFlags
from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.files import keep_old, locked, make_directory, parse_json, write_file
from nanochat_jax.paths import Paths
from nanochat_jax.report.html import Report, Section, label_of, page, percent

logger = logging.getLogger(__name__)

SECTION_ORDER = (
    "tokenizer-training",
    "tokenizer-evaluation",
    "base-model-training",
    "base-model-loss",
    "base-model-evaluation",
    "midtraining",
    "chat-evaluation-mid",
    "chat-sft",
    "chat-evaluation-sft",
    "chat-rl",
    "chat-evaluation-rl",
)
COLUMNS = ("BASE", "MID", "SFT", "RL")
COLUMN_OF_STAGE = {
    "base_train": "BASE",
    "base_loss": "BASE",
    "base_eval": "BASE",
    "mid_train": "MID",
    "chat_eval_mid": "MID",
    "chat_sft": "SFT",
    "chat_eval_sft": "SFT",
    "chat_rl": "RL",
    "chat_eval_rl": "RL",
}
# these and the evaluations make the summary table
LOSS_METRICS = ("train_bpb", "val_bpb", "val_loss")
DOCUMENTS = ("report.md", "report.html", "results.json")
RESERVED_SLUGS = ("header", "report", "results")
SOURCE_SUFFIXES = (".py", ".md", ".rs", ".html", ".toml", ".sh")
CHARS_PER_TOKEN = 4


def slug_of(section: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", section.lower()).strip("-")
    if not slug or slug in RESERVED_SLUGS:
        raise ValueError(
            f"section {section!r} cannot name a report file (reserved: {', '.join(RESERVED_SLUGS)})"
        )
    return slug


def log_section(
    report_dir: Path,
    section: str,
    items: Sequence[str | Mapping[str, Any] | None],
    *,
    stage: str,
    results: Mapping[str, float | int | str] | None = None,
    curves: Path | None = None,
    model: str | None = None,
) -> None:
    """Write one section of the report; a later call with the same name replaces it. Call it from
    process 0 only.

    Args:
      section: title, e.g. "Base model training"; its slug gives the place in the report
        (`SECTION_ORDER`).
      items: markdown strings, taken as they are, and mappings, printed as `- key: value`; empty
        ones are skipped.
      stage: the key in results.json, e.g. "base_train", "base_loss", "base_eval", "chat_eval_sft".
      results: the numbers, by the names they have in results.json. The summary shows "core" of the
        base evaluation, all of the chat evaluations, and the losses "train_bpb", "val_bpb" and
        "val_loss" of the other stages. A "device" is shown in the header. Not-a-number and
        infinities are stored as strings.
      curves: the stage's metrics.jsonl, drawn in report.html.
      model: what was evaluated; see `earlier_evaluation`.

    Raises:
      ValueError: the name has no letters or digits, or is one of `RESERVED_SLUGS`.
    """
    slug, timestamp = slug_of(section), _now()
    lines, kept = (
        [f"## {section}", f"timestamp: {_clock(timestamp)}", ""],
        list[str | dict[str, str]](),
    )
    for item in items:
        if not item:
            continue
        if isinstance(item, Mapping):
            values = {str(key): format_value(value) for key, value in item.items()}
            kept.append(values)
            lines += [f"- {key}: {value}" for key, value in values.items()]
        else:
            kept.append(item)
            lines.append(item.rstrip("\n"))
        lines.append("")
    entry = {
        "section": section,
        "stage": stage,
        "timestamp": timestamp,
        "results": dict(results or {}),
        "curves": str(Path(curves).absolute()) if curves else None,
        "items": kept,
        "model": model,
    }
    write_file(report_dir / f"{slug}.md", "\n".join(lines).rstrip("\n") + "\n")
    write_file(report_dir / f"{slug}.json", _to_json(entry))


@contextlib.contextmanager
def earlier_evaluation(report_dir: Path, section: str, model: str) -> Iterator[Section | None]:
    """The section that an earlier evaluation of `model` logged, for the block to log it again with
    more results.

    A section of another model first moves to a name of its own, so no evaluation removes another's
    results. Evaluations that run at the same time enter the block one after the other.
    """
    path, own = (report_dir / f"{slug_of(name)}.json" for name in (section, f"{section} {model}"))
    with locked(report_dir):
        found = _read_section(path) if path.exists() else None
        if found is not None and found.model not in (None, model):
            log_section(
                report_dir,
                f"{section} {found.model}",
                found.items,
                stage=f"{found.stage} {found.model}",
                results=found.results,
                model=found.model,
            )
            found = _read_section(own) if own.exists() else None
        yield found
        for file in (own, own.with_suffix(".md")):
            file.unlink(missing_ok=True)


def format_value(value: Any) -> str:
    """A number as people read it: 0.8121, 1.2e-05, 21,400; text on one line."""
    value = _plain(value)
    if isinstance(value, float):
        if value and math.isfinite(value) and not 1e-3 <= abs(value) < 1e9:
            return f"{value:.4g}"
        return f"{value:.4f}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10000:
        return f"{value:,}"
    return str(value).replace("\r", "").replace("\n", "\\n")


def reset(report_dir: Path) -> None:
    """Delete the sections and documents of an earlier run; write header.md and header.json for a
    new one.
    """
    make_directory(report_dir)
    slugs = {section.slug for section in _read_sections(report_dir, strict=False)} | set(
        SECTION_ORDER
    )
    for name in (
        *DOCUMENTS,
        *(f"{slug}.md" for slug in slugs),
        *(f"{slug}.json" for slug in slugs),
    ):
        (report_dir / name).unlink(missing_ok=True)
    started, facts = _now(), _machine_facts()
    write_file(report_dir / "header.json", _to_json({"started": started, "facts": facts}))
    lines = ["# nanochat training report", "", f"Run started: {_clock(started)}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    write_file(report_dir / "header.md", "\n".join(lines) + "\n")


def generate(report_dir: Path, out_dir: Path) -> None:
    """Write report.md, report.html and results.json to `report_dir`; copy the first two to
    `out_dir`.

    A file of that name in `out_dir` is kept under another name, unless it is a report as written
    here.

    Raises:
      NotFound: no section has been logged.
      UsageError: a section file is not what `log_section` writes; or a directory cannot be written.
    """
    for directory in (report_dir, out_dir):
        make_directory(directory)
    sections = _read_sections(report_dir)
    if not sections:
        raise NotFound(
            f"no sections in {report_dir}: run a stage first, e.g. `python -m scripts.tok_train`"
        )
    header, prose = report_dir / "header.json", report_dir / "header.md"
    started, facts = None, _machine_facts()
    if header.exists():  # else nobody ran `reset`: the start of the run is unknown
        try:
            noted = parse_json(header.read_bytes())
            started, facts = noted["started"], noted["facts"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{header} cannot be read ({error!r}): delete it, and the report knows no start"
            ) from error
    header_text = prose.read_text("utf-8") if prose.exists() else "# nanochat training report\n"
    if devices := dict.fromkeys(
        str(s.results["device"]) for s in sections if s.results.get("device")
    ):
        facts["Devices"] = ", ".join(devices)
        header_text += f"- Devices: {facts['Devices']}\n"
    if size := _code_size():
        facts["Code size"] = size
    results: dict[str, dict[str, Any]] = {}
    for section in sections:
        results.setdefault(section.stage, {}).update(section.results)
    report = Report(
        sections=sections,
        started=_clock(started) if started else None,
        generated=_clock(_now()),
        facts=facts,
        summary=summary_rows(sections),
        results=results,
        wall_clock=_wall_clock(started, sections),
        missing=[slug for slug in SECTION_ORDER if slug not in {s.slug for s in sections}],
    )
    texts = [
        header_text,
        *((report_dir / f"{section.slug}.md").read_text("utf-8") for section in sections),
        _summary_markdown(report),
    ]
    write_file(report_dir / "results.json", _to_json(results))
    for name, text in (("report.md", "\n".join(texts)), ("report.html", page(report))):
        for path in dict.fromkeys([report_dir / name, out_dir / name]):
            if not _is_ours(path) and (old := keep_old(path)):
                logger.warning("%s is not a report of this program: kept as %s", path, old.name)
            write_file(path, text + _signature(text))


def _signature(text: str) -> str:
    """A last line that tells a report of ours from a file of the user's or a report that was
    edited.
    """
    return f"<!-- nanochat_jax.report {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _is_ours(path: Path) -> bool:
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError):
        return False
    start = text.rfind("<!-- nanochat_jax.report ")
    return start >= 0 and text[start:] == _signature(text[:start])


def summary_rows(sections: Sequence[Section]) -> list[list[str]]:
    """Results by stage under a head: CORE first, then losses, tasks by name, ChatCORE last; "-"
    where absent.
    """
    table: dict[str, dict[str, Any]] = {}
    for section in sections:
        for name, value in section.results.items():
            if section.stage == "base_eval":
                wanted = name == "core"  # its 22 tasks have a chart of their own
            else:
                wanted = section.stage.startswith("chat_eval_") or name in LOSS_METRICS
            if wanted and section.stage in COLUMN_OF_STAGE:
                shown = (
                    percent(value)
                    if section.stage.startswith("chat_eval_")
                    else format_value(value)
                )
                table.setdefault(name, {})[COLUMN_OF_STAGE[section.stage]] = shown

    def order(name: str) -> tuple[int, str]:
        return (
            0
            if name == "core"
            else 1
            if name in LOSS_METRICS
            else 3
            if name.startswith("chatcore")
            else 2,
            name,
        )

    rows = [
        [label_of(name), *(table[name].get(column, "-") for column in COLUMNS)]
        for name in sorted(table, key=order)
    ]
    return [["Metric", *COLUMNS], *rows] if rows else []


def _summary_markdown(report: Report) -> str:
    lines = ["## Summary", ""]
    if "Code size" in report.facts:
        lines += [f"- Code size: {report.facts['Code size']}", ""]
    if report.summary:
        table = [
            f"| {name:<15} | " + " | ".join(f"{cell:<8}" for cell in cells) + " |"
            for name, *cells in report.summary
        ]
        lines += [
            table[0],
            f"|{'-' * 17}|" + "|".join("-" * 10 for _ in COLUMNS) + "|",
            *table[1:],
            "",
        ]
    lines.append(f"Total wall clock time: {report.wall_clock}")
    if report.missing:
        lines += ["", f"Sections not logged: {', '.join(report.missing)}"]
    return "\n".join(lines) + "\n"


def _read_sections(report_dir: Path, strict: bool = True) -> list[Section]:
    """All logged sections: the known ones in `SECTION_ORDER`, others after them by name."""
    sections = []
    for path in sorted(report_dir.glob("*.json")):
        if path.stem in RESERVED_SLUGS:
            continue
        try:
            sections.append(_read_section(path))
        except UsageError:
            if strict:
                raise
    known = {slug: place for place, slug in enumerate(SECTION_ORDER)}
    return sorted(sections, key=lambda section: (known.get(section.slug, len(known)), section.slug))


def _read_section(path: Path) -> Section:
    try:
        section = Section(slug=path.stem, **parse_json(path.read_bytes()))
        if not (isinstance(section.results, dict) and isinstance(section.items, list)):
            raise TypeError("its results are not an object, or its items no array")
        return section
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{path} is not a report section ({error}): delete it and rerun its stage"
        ) from error


def _wall_clock(started: str | None, sections: Sequence[Section]) -> str:
    """From `reset` to the last section, as "3h51m"; RL is left out: it is run apart, often days
    later.
    """
    if started is None:
        return "unknown (no `report reset` before the run)"
    ends = [section.timestamp for section in sections if COLUMN_OF_STAGE.get(section.stage) != "RL"]
    if not ends:
        return "unknown (only RL sections)"
    seconds = max(
        (datetime.fromisoformat(end) - datetime.fromisoformat(started)).total_seconds()
        for end in ends
    )
    return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"


def _machine_facts() -> dict[str, str]:
    """Code version and machine, without touching an accelerator (stages log the devices they
    used).
    """
    facts = {}
    if root := _checkout():
        branch, commit = (
            _git(root, "rev-parse", "--abbrev-ref", "HEAD"),
            _git(root, "rev-parse", "--short", "HEAD"),
        )
        if branch and commit:
            state = "modified" if _git(root, "status", "--porcelain") else "clean"
            facts["Git"] = (
                f"{branch} {commit} ({state}) "
                f"{(_git(root, 'log', '-1', '--format=%s') or '')[:80]}".rstrip()
            )
    facts["Platform"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    facts["CPU cores"] = str(os.cpu_count())
    if "SC_PHYS_PAGES" in os.sysconf_names:
        facts["Memory"] = (
            f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
        )
    facts["Python"] = platform.python_version()
    facts["JAX"] = importlib.metadata.version("jax")
    return facts


def _checkout() -> Path | None:
    """The git checkout this package runs from; None when it is installed elsewhere."""
    root = Path(__file__).resolve().parents[1]
    top = _git(root, "rev-parse", "--show-toplevel")
    return root if top and Path(top).resolve() == root else None


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command; None where git is absent or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _code_size() -> str | None:
    """Size of the tracked sources, a number this project keeps small; None outside a checkout."""
    if (root := _checkout()) is None:
        return None
    names = (_git(root, "ls-files", "-z") or "").split("\0")
    files = [
        root / name for name in names if name.endswith(SOURCE_SUFFIXES) and (root / name).is_file()
    ]
    if not files:
        return None
    texts = [path.read_text("utf-8", errors="replace") for path in files]
    chars, lines = sum(map(len, texts)), sum(text.count("\n") for text in texts)
    tokens = chars // CHARS_PER_TOKEN
    return f"{chars:,} characters, {lines:,} lines, {len(files):,} files, about {tokens:,} tokens"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _clock(timestamp: str) -> str:
    return datetime.fromisoformat(timestamp).strftime("%Y-%m-%d %H:%M:%S")


def _plain(value: Any) -> Any:
    """Python scalars in place of NumPy's and JAX's."""
    return value.item() if hasattr(value, "item") else value


def _to_json(value: Any) -> str:
    def strict(node: Any) -> Any:
        node = _plain(node)
        if isinstance(node, Mapping):
            return {str(key): strict(child) for key, child in node.items()}
        if isinstance(node, list | tuple):
            return [strict(child) for child in node]
        if isinstance(node, float) and not math.isfinite(node):
            return str(node)  # JSON has no such number
        return node

    return (
        json.dumps(strict(value), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    )


def reset_main(_: NoFlags) -> None:
    report_dir = Paths.from_env().report
    reset(report_dir)
    print(f"report reset: {report_dir}")


def generate_main(_: NoFlags) -> None:
    report_dir = Paths.from_env().report
    generate(report_dir, Path.cwd())
    print(
        f"wrote report.md, report.html and results.json to {report_dir}; the first two also to "
        f"{Path.cwd()}"
    )


COMMANDS: dict[str, tuple[Callable[..., None], type, str]] = {
    "generate": (
        generate_main,
        NoFlags,
        "The report of a training run. Commands: generate (the default), reset.",
    ),
    "reset": (
        reset_main,
        NoFlags,
        "Start the report of a new run: remove the sections of the last one.",
    ),
}


def main() -> NoReturn:
    cli.run_commands(COMMANDS, default="generate", prog="nanochat_jax.report")

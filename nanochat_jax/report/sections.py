"""The sections that stages log for the report.

A section is two files in the report directory: `<slug>.md` for people, and `<slug>.json` for the
report, which never reads numbers out of prose.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from nanochat_jax.errors import UsageError, explaining
from nanochat_jax.files import locked, parse_json, write_file

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
RESERVED_SLUGS = ("header", "report", "results")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A logged section: `items` for people, `results` for tables and charts."""

    slug: str
    section: str
    stage: str
    timestamp: str  # ISO 8601 with offset
    items: list[Any] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    curves: str | None = None  # path of a metrics.jsonl
    model: str | None = None  # what was evaluated


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
    """Write a section, replacing an earlier one of the same name. Only process 0 may call this.

    Args:
      section: title, e.g. "Base model training". `SECTION_ORDER` has its position in the report.
      items: Markdown strings, and mappings, which become lists of `key: value`. Empty items are
        skipped.
      stage: key in results.json, e.g. "base_train" or "chat_eval_sft".
      results: numbers, with their names in results.json. summary.py selects those that the summary
        shows. "devices" is printed in the header. NaN and infinities are stored as strings.
      curves: the stage's metrics.jsonl, which report.html draws.
      model: the evaluated model; see `earlier_evaluation`.

    Raises ValueError if the title has no letters or digits, or its slug is reserved.
    """
    slug, timestamp = slug_of(section), now()
    lines = [f"## {section}", f"timestamp: {clock(timestamp)}", ""]
    kept: list[str | dict[str, str]] = []
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
    entry = Section(
        slug=slug,
        section=section,
        stage=stage,
        timestamp=timestamp,
        items=kept,
        results=dict(results or {}),
        curves=str(Path(curves).absolute()) if curves else None,
        model=model,
    )
    fields = {name: value for name, value in asdict(entry).items() if name != "slug"}
    write_file(report_dir / f"{slug}.md", "\n".join(lines).rstrip("\n") + "\n")
    write_file(report_dir / f"{slug}.json", to_json(fields))


@contextlib.contextmanager
def earlier_evaluation(report_dir: Path, section: str, model: str) -> Iterator[Section | None]:
    """The section that an earlier evaluation of `model` logged, if any.

    The block logs it again, with more results. A section of another model is first renamed after
    that model, so no evaluation removes another's results. Concurrent evaluations wait for each
    other.
    """
    path, own = (report_dir / f"{slug_of(name)}.json" for name in (section, f"{section} {model}"))
    with locked(report_dir):
        earlier = read_section(path) if path.exists() else None
        if earlier is not None and earlier.model not in (None, model):
            log_section(
                report_dir,
                f"{section} {earlier.model}",
                earlier.items,
                stage=f"{earlier.stage} {earlier.model}",
                results=earlier.results,
                model=earlier.model,
            )
            earlier = read_section(own) if own.exists() else None
        yield earlier
        for file in (own, own.with_suffix(".md")):
            file.unlink(missing_ok=True)


def read_section(path: Path) -> Section:
    with explaining(f"{path} is not a report section", "delete it and rerun its stage"):
        section = Section(slug=path.stem, **parse_json(path.read_bytes()))
        if not (isinstance(section.results, dict) and isinstance(section.items, list)):
            raise TypeError("`results` must be an object and `items` an array")
        return section


def read_sections(report_dir: Path, *, strict: bool = True) -> list[Section]:
    """All sections: those of `SECTION_ORDER` first, then the others by name.

    A damaged section raises `UsageError`, or is left out if not `strict`.
    """
    sections = []
    for path in report_dir.glob("*.json"):
        if path.stem not in RESERVED_SLUGS:
            with contextlib.suppress(*() if strict else (UsageError,)):
                sections.append(read_section(path))
    rank = {slug: index for index, slug in enumerate(SECTION_ORDER)}
    return sorted(sections, key=lambda section: (rank.get(section.slug, len(rank)), section.slug))


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def clock(timestamp: str) -> str:
    return datetime.fromisoformat(timestamp).strftime("%Y-%m-%d %H:%M:%S")


def format_value(value: Any) -> str:
    """A value for people, on one line: 0.8121, 1.2e-05, 21,400."""
    value = _plain(value)
    if isinstance(value, float):
        if value and math.isfinite(value) and not 1e-3 <= abs(value) < 1e9:
            return f"{value:.4g}"
        return f"{value:.4f}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10000:
        return f"{value:,}"
    return str(value).replace("\r", "").replace("\n", "\\n")


def to_json(value: Any) -> str:
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


def _plain(value: Any) -> Any:
    """A NumPy or JAX scalar as a Python scalar."""
    return value.item() if hasattr(value, "item") else value

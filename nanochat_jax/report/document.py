"""Generates the report of a run: report.md, report.html and results.json."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.files import keep_old, make_directory, parse_json, write_file
from nanochat_jax.report.html import page
from nanochat_jax.report.machine import code_size, machine_facts
from nanochat_jax.report.sections import SECTION_ORDER, clock, now, read_sections, to_json
from nanochat_jax.report.summary import (
    Report,
    missing_sections,
    summary_markdown,
    summary_rows,
    wall_clock,
)

log = logging.getLogger(__name__)

DOCUMENTS = ("report.md", "report.html", "results.json")
MARK = "<!-- nanochat_jax.report "


def reset(report_dir: Path) -> None:
    """Delete the last run's sections and documents; write header.md and header.json."""
    make_directory(report_dir)
    slugs = {section.slug for section in read_sections(report_dir, strict=False)}
    for slug in slugs | set(SECTION_ORDER):
        for suffix in (".md", ".json"):
            (report_dir / f"{slug}{suffix}").unlink(missing_ok=True)
    for name in DOCUMENTS:
        (report_dir / name).unlink(missing_ok=True)
    started, facts = now(), machine_facts()
    write_file(report_dir / "header.json", to_json({"started": started, "facts": facts}))
    lines = ["# nanochat training report", "", f"Run started: {clock(started)}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    write_file(report_dir / "header.md", "\n".join(lines) + "\n")


def generate(report_dir: Path, out_dir: Path) -> None:
    """Write the three documents to `report_dir`, and report.md and report.html also to `out_dir`.

    An existing file that is not a report, or was edited, is renamed.

    Raises `NotFound` if no section was logged, and `UsageError` for a damaged section or a
    directory that cannot be written.
    """
    for directory in (report_dir, out_dir):
        make_directory(directory)
    sections = read_sections(report_dir)
    if not sections:
        raise NotFound(
            f"no sections in {report_dir}: run a stage first, e.g. `python -m scripts.tok_train`"
        )
    started, facts, header = _header(report_dir)
    devices = dict.fromkeys(
        str(section.results["devices"]) for section in sections if section.results.get("devices")
    )
    if devices:
        facts["Devices"] = ", ".join(devices)
        header += f"- Devices: {facts['Devices']}\n"
    if size := code_size():
        facts["Code size"] = size
    results: dict[str, dict[str, Any]] = {}
    for section in sections:
        results.setdefault(section.stage, {}).update(section.results)
    report = Report(
        sections=sections,
        started=clock(started) if started else None,
        generated=clock(now()),
        facts=facts,
        summary=summary_rows(sections),
        results=results,
        wall_clock=wall_clock(started, sections),
        missing=missing_sections(sections),
    )
    prose = [(report_dir / f"{section.slug}.md").read_text("utf-8") for section in sections]
    write_file(report_dir / "results.json", to_json(results))
    markdown = "\n".join([header, *prose, summary_markdown(report)])
    for name, text in (("report.md", markdown), ("report.html", page(report))):
        for path in dict.fromkeys([report_dir / name, out_dir / name]):
            if not _is_report(path) and (old := keep_old(path)):
                log.warning("%s is not a report of this program: kept as %s", path, old.name)
            write_file(path, text + _signature(text))


def _header(report_dir: Path) -> tuple[str | None, dict[str, str], str]:
    """Start of the run (None without `reset`), facts, and the first lines of report.md."""
    path, prose = report_dir / "header.json", report_dir / "header.md"
    text = prose.read_text("utf-8") if prose.exists() else "# nanochat training report\n"
    if not path.exists():
        return None, machine_facts(), text
    try:
        header = parse_json(path.read_bytes())
        return header["started"], header["facts"], text
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be read ({error!r}): delete it; the report then has no start time"
        ) from error


def _signature(text: str) -> str:
    """The last line of a report, by which an unchanged report is recognized."""
    return f"{MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _is_report(path: Path) -> bool:
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError):
        return False
    start = text.rfind(MARK)
    return start >= 0 and text[start:] == _signature(text[:start])

"""What both documents show: the table of results by stage, and how values are printed."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nanochat_jax.report.sections import SECTION_ORDER, Section, format_value

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
COLUMNS = tuple(dict.fromkeys(COLUMN_OF_STAGE.values()))
LOSSES = ("train_bpb", "val_bpb", "val_loss")
LABELS = {  # of results that people spell differently
    "core": "CORE",
    "chatcore_5": "ChatCORE (5)",
    "chatcore_6": "ChatCORE (6)",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "spelling_bee": "SpellingBee",
    "train_bpb": "train bpb",
    "val_bpb": "val bpb",
    "val_loss": "val loss",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    sections: list[Section]  # in order
    started: str | None  # times for people
    generated: str
    facts: dict[str, str]  # about the machine and the code
    summary: list[list[str]]  # rows of printed cells, the head first, "-" for a missing value
    results: dict[str, dict[str, Any]]  # by stage
    wall_clock: str
    missing: list[str]  # slugs of sections that were not logged


def summary_rows(sections: Sequence[Section]) -> list[list[str]]:
    """Results by stage, with a head: CORE, losses, tasks by name, ChatCORE; [] without results."""
    table: dict[str, dict[str, str]] = {}
    for section in sections:
        column, is_chat = COLUMN_OF_STAGE.get(section.stage), section.stage.startswith("chat_eval_")
        shown = {"core"} if section.stage == "base_eval" else LOSSES
        for name, value in section.results.items():
            if column and (is_chat or name in shown):
                text = percent(value) if is_chat else format_value(value)
                table.setdefault(name, {})[column] = text

    def order(name: str) -> tuple[bool, bool, bool, str]:
        return name.startswith("chatcore"), name != "core", name not in LOSSES, name

    rows = [
        [LABELS.get(name, name.replace("_", " "))] + [table[name].get(c, "-") for c in COLUMNS]
        for name in sorted(table, key=order)
    ]
    return [["Metric", *COLUMNS], *rows] if rows else []


def figures_of(
    sections: Sequence[Section], source: str, tag: str, step: int
) -> list[tuple[str, str]]:
    """Names and values of the summary's results that are those of one model."""

    def is_own(section: Section) -> bool:
        if COLUMN_OF_STAGE.get(section.stage) != source.upper():
            return False
        if section.curves is None:
            return section.model == f"{tag}, step {step}"
        trained = Path(section.curves).parent.name, section.results.get("num_iterations")
        return trained == (tag, step)

    column = 1 + COLUMNS.index(source.upper())
    rows = summary_rows([section for section in sections if is_own(section)])
    return [(row[0], row[column]) for row in rows[1:]]


def summary_markdown(report: Report) -> str:
    lines = ["## Summary", ""]
    if "Code size" in report.facts:
        lines += [f"- Code size: {report.facts['Code size']}", ""]
    if report.summary:
        rule = f"|{'-' * 17}|" + "|".join("-" * 10 for _ in COLUMNS) + "|"
        head, *rows = [
            f"| {name:<15} | " + " | ".join(f"{cell:<8}" for cell in cells) + " |"
            for name, *cells in report.summary
        ]
        lines += [head, rule, *rows, ""]
    lines.append(f"Total wall clock time: {report.wall_clock}")
    if report.missing:
        lines += ["", f"Sections not logged: {', '.join(report.missing)}"]
    return "\n".join(lines) + "\n"


def missing_sections(sections: Sequence[Section]) -> list[str]:
    logged = {section.slug for section in sections}
    return [slug for slug in SECTION_ORDER if slug not in logged]


def wall_clock(started: str | None, sections: Sequence[Section]) -> str:
    """Time from `reset` to the last section, as "3h51m".

    RL is left out, because it often runs days later.
    """
    if started is None:
        return "unknown (no `report reset` before the run)"
    ends = [section.timestamp for section in sections if COLUMN_OF_STAGE.get(section.stage) != "RL"]
    if not ends:
        return "unknown (only RL sections)"
    last = max(map(datetime.fromisoformat, ends))
    seconds = (last - datetime.fromisoformat(started)).total_seconds()
    return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"


def percent(accuracy: Any) -> str:
    return f"{accuracy:.1%}" if isinstance(accuracy, float) else str(accuracy)

"""Helpers that the tests of tasks share."""

import json


def questions(task):
    """The first message of every conversation."""
    return [conversation["messages"][0]["content"] for conversation in task]


def write_lines(path, values):
    path.write_text("\n".join(map(json.dumps, values)))
    return path

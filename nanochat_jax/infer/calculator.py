"""The calculator the model may call: arithmetic on numbers and counting letters in a word.

Model output is untrusted, so it is never evaluated as Python: the expression is parsed and only
the nodes below are computed. Every step is bounded, so no time limit is needed.
"""

import ast
import math
import operator
from collections.abc import Callable

MAX_CHARACTERS = 256
MAX_MAGNITUDE = 10**50  # of every intermediate value
ARITHMETIC_CHARACTERS = frozenset("0123456789*+-/.() ")

OPERATORS: dict[type, Callable[..., int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class _Rejected(Exception):
    """The calculator does not support the expression."""


def calculate(expression: str) -> int | float | None:
    """Value of `expression`, or None if it is unsupported or invalid; never raises.

    >>> calculate("1,200 * 3"), calculate("7 / 2"), calculate("'strawberry'.count('r')")
    (3600, 3.5, 3)

    Supported: `+ - * / //` and parentheses on decimal numbers (thousands separators are dropped),
    and `"text".count("part")` with either quote. `**` is not: its result can be arbitrarily large.
    """
    if len(expression) > MAX_CHARACTERS:
        return None
    if '"' not in expression and "'" not in expression:
        expression = expression.replace(",", "")
        if not ARITHMETIC_CHARACTERS.issuperset(expression):
            return None
    elif "\\" in expression:  # the parser warns about unknown escapes
        return None
    try:
        return _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (_Rejected, SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None  # the parser raises the last two on deep nesting


def _evaluate(node: ast.expr) -> int | float:
    value: int | float
    if (
        isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and not isinstance(node.value, bool)
    ):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_evaluate(node.operand))
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "count"
        and len(node.args) == 1
        and not node.keywords
    ):
        value = _literal(node.func.value).count(_literal(node.args[0]))
    else:
        raise _Rejected(type(node).__name__)
    if not math.isfinite(value) or abs(value) > MAX_MAGNITUDE:
        raise _Rejected("out of range")
    return value


def _literal(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise _Rejected(type(node).__name__)

"""Conditions on the numbers of a question, such as `gen > ref and (iou < 0.3 or ratio < 0.05)`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

#: what a condition may speak of: score, intersection over union with the boxes and share of the
#: tokens that were kept, of the left file (gen) and of the right one (ref)
NAMES = ("gen", "ref", "iou", "ratio", "ref_iou", "ref_ratio")
COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
Numbers = Mapping[str, float | None]
Condition = Callable[[Numbers], bool]


def read_condition(text: str) -> Condition:
    """The condition in a text; without words it is always true. A comparison with a number that is
    not known is not true.

    Raises ValueError that says what a condition is made of.
    """
    if not text.strip():
        return lambda numbers: True
    try:
        return _truth(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is no condition: {HELP}") from None


HELP = (
    f"compare {', '.join(NAMES)} and numbers by < <= > >= == !=, and put that together with and, "
    "or, not and brackets"
)


def _truth(node: ast.AST) -> Condition:
    if isinstance(node, ast.BoolOp):
        parts, rule = list(map(_truth, node.values)), all if isinstance(node.op, ast.And) else any
        return lambda numbers: rule(part(numbers) for part in parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _truth(node.operand)
        return lambda numbers: not inner(numbers)
    if isinstance(node, ast.Compare) and all(type(op) in COMPARISONS for op in node.ops):
        values = list(map(_value, (node.left, *node.comparators)))
        rules = [COMPARISONS[type(op)] for op in node.ops]

        def holds(numbers: Numbers) -> bool:
            found = [value(numbers) for value in values]
            if any(number is None for number in found):
                return False
            return all(map(lambda rule, a, b: rule(a, b), rules, found, found[1:]))

        return holds
    raise ValueError(f"{ast.unparse(node)!r} is no comparison: {HELP}")


def _value(node: ast.AST) -> Callable[[Numbers], float | None]:
    if isinstance(node, ast.Name) and node.id in NAMES:
        return lambda numbers: numbers.get(node.id)
    sign = -1 if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else 1
    inner = node.operand if sign < 0 else node
    if isinstance(inner, ast.Constant) and type(inner.value) in (int, float):
        return lambda numbers: sign * inner.value
    raise ValueError(f"{ast.unparse(node)!r} is no number: {HELP}")

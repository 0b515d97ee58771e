"""What a clause compares, found in its tree: numbers with the cuts drawn through them, values that are told apart.

`0.5 <= aspect <= 2` is the measure `aspect` with two cuts, `width > 2 * height` the difference of both with a cut at
0, and `format in ("jpeg", "png")` the values of `format`. What is only true or false is a value, too.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipelines.columns.evaluation import evaluate_node, kind_of
from pipelines.columns.expressions import Expression
from pipelines.columns.grammar import dotted_name

MAX_MEASURES, MAX_CUTS = 4, 3
# A comparison read from its other end.
MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
# The value at the cut itself is on the lower side.
LOWER_AT_CUT = (ast.Gt, ast.LtE)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A number that a measure is compared with, as the comparison rounds it."""

    value: float
    is_at_cut_lower: bool

    def is_above(self, values: np.ndarray) -> np.ndarray:
        """Return which values are on the upper side, bool [n]; of NaN it is false."""
        return values > self.value if self.is_at_cut_lower else values >= self.value


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is looked at of a clause.

    Attributes:
        expression: its value for each sample.
        is_number: whether that is a number; else it is a text, or true or false.
        is_integer: of a number, whether there are whole ones alone.
        cuts: of a number, what it is compared with, in rising order.
        named: of others, values that the clause names.
    """

    expression: Expression
    is_number: bool
    is_integer: bool = False
    cuts: tuple[Cut, ...] = ()
    named: tuple[str, ...] = ()

    def numbers(self, table: pa.Table) -> np.ndarray:
        """Return its numbers, float64 [n], with NaN where they are unknown."""
        return np.asarray(self.expression.evaluate(table).fill_null(float("nan")), np.float64)

    def values(self, table: pa.Table) -> pa.Array | pa.ChunkedArray:
        """Return its values, bool or text [n], with null where they are unknown."""
        return self.expression.evaluate(table)


def shown(value: object) -> str:
    """Return a value that is told apart as the page shows it: `yes` or `no`, or the text."""
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def measures_of(clause: Expression, schema: pa.Schema) -> list[Measure]:
    """Return what a clause compares, in written order, each once; no more than the first few.

    Args:
        clause: one that has been checked.
        schema: of the columns there are, by dotted name.
    """
    empty = pa.schema([schema.field(name) for name in clause.names]).empty_table()
    found: dict[str, Measure] = {}
    for each in _walk(clause.node, clause, empty):
        text = each.expression.text
        former = found.get(text)
        found[text] = each if former is None else _joined(former, each)
    return list(found.values())[:MAX_MEASURES]


def _joined(former: Measure, other: Measure) -> Measure:
    cuts = {(cut.value, cut.is_at_cut_lower): cut for cut in (*former.cuts, *other.cuts)}
    named = tuple(dict.fromkeys((*former.named, *other.named)))
    return replace(former, cuts=tuple(cuts[key] for key in sorted(cuts))[:MAX_CUTS], named=named)


def _walk(node: ast.expr, clause: Expression, empty: pa.Table) -> Iterator[Measure]:
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            yield from _walk(part, clause, empty)
    elif isinstance(node, ast.UnaryOp):
        yield from _walk(node.operand, clause, empty)
    elif isinstance(node, ast.IfExp):
        for part in (node.test, node.body, node.orelse):
            yield from _walk(part, clause, empty)
    elif isinstance(node, ast.Compare):
        parts = [node.left, *node.comparators]
        for comparison, left, right in zip(node.ops, parts, parts[1:], strict=False):
            yield from _of_pair(comparison, left, right, clause, empty)
    elif not _is_constant(node):
        yield _of_kind(node, clause, empty)


def _of_pair(
    comparison: ast.cmpop, left: ast.expr, right: ast.expr, clause: Expression, empty: pa.Table
) -> Iterator[Measure]:
    if _is_constant(left) and _is_constant(right):
        return
    if isinstance(comparison, ast.In | ast.NotIn):
        if isinstance(right, ast.Tuple | ast.List | ast.Set):
            yield _of_kind(left, clause, empty, named=right.elts)
        else:  # "part" in a text: what is in it is not told apart, the answer is
            yield _of_kind(ast.Compare(left=left, ops=[ast.In()], comparators=[right]), clause, empty)
        return
    if _is_constant(left):
        left, right = right, left
        comparison = MIRRORED.get(type(comparison), type(comparison))()
    if kind_of(evaluate_node(left, empty).type) != "number":
        yield _of_kind(left, clause, empty, named=[right] if _is_constant(right) else [])
        return
    if _is_constant(right):
        number, at = left, _constant_value(right)
    else:
        number, at = ast.BinOp(left=left, op=ast.Sub(), right=right), 0.0
    measure = _of_kind(number, clause, empty)
    if pa.types.is_float32(evaluate_node(number, empty).type):
        at = float(np.float32(at))
    yield replace(measure, cuts=(Cut(value=at, is_at_cut_lower=isinstance(comparison, LOWER_AT_CUT)),))


def _of_kind(node: ast.expr, clause: Expression, empty: pa.Table, *, named: Sequence[ast.expr] = ()) -> Measure:
    arrow_type = evaluate_node(node, empty).type
    expression = Expression(key=clause.key, node=node, source=clause.source)
    if kind_of(arrow_type) == "number":
        cuts = [Cut(value=_constant_value(each), is_at_cut_lower=False) for each in named if _is_constant(each)]
        cuts.sort(key=lambda cut: cut.value)
        return Measure(
            expression=expression,
            is_number=True,
            is_integer=pa.types.is_integer(arrow_type),
            cuts=tuple(cuts[:MAX_CUTS]),
        )
    texts = tuple(shown(each.value) for each in named if isinstance(each, ast.Constant))
    return Measure(expression=expression, is_number=False, named=texts)


def _is_constant(node: ast.expr) -> bool:
    """Whether no column is in it: names of functions are none."""
    return not any(dotted_name(part) for part in _parts(node))


def _parts(node: ast.expr) -> Iterator[ast.AST]:
    yield node
    children = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
    for child in children:
        if isinstance(child, ast.expr):
            yield from _parts(child)


def _constant_value(node: ast.expr) -> float:
    one_row = pa.table({"": pa.array([True])})
    return float(evaluate_node(node, one_row)[0].as_py())

"""Expressions over the columns of samples: read from a recipe, checked against columns, evaluated on tables.

Three-valued, as in SQL: what is null or NaN is unknown, and so is what depends on it. `unknown and False` is False,
`unknown or True` is True, and nobody is chosen by an unknown.
"""

import ast
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pyarrow as pa

from errors import UserError
from pipelines.as_typed import did_you_mean
from pipelines.columns.evaluation import ExpressionFault, evaluate_node, kind_of
from pipelines.columns.grammar import dotted_name, parse, segment

Kind = Literal["bool", "number", "text"]
EXAMPLES = {"bool": "min_side >= 512", "number": "exp(clip_score / 0.1)", "text": "lower(caption)"}
SHOWN_NAMES = 12


@dataclass(frozen=True, kw_only=True)
class Expression:
    """An expression that has been read; made by `parse_expression`.

    Attributes:
        key: of the recipe, which errors name.
        node: its tree.
        source: the text that the places of its nodes are counted in.
    """

    key: str
    node: ast.expr
    source: str

    @cached_property
    def text(self) -> str:
        """What it says, in one line."""
        text = ast.get_source_segment(self.source, self.node) or ""
        return ast.unparse(self.node) if "\n" in text or not text else text

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Dotted names of the columns that it needs, each once, in order."""
        found: dict[str, None] = {}
        waiting: list[ast.AST] = [self.node]
        while waiting:
            node = waiting.pop()
            if name := dotted_name(node):
                found[name] = None
            else:
                children = node.args if isinstance(node, ast.Call) else list(ast.iter_child_nodes(node))
                waiting += reversed(children)
        return tuple(found)

    @cached_property
    def clauses(self) -> tuple["Expression", ...]:
        """What must all be true for it to be true, in written order: the parts of its outermost `and`."""
        if isinstance(self.node, ast.BoolOp) and isinstance(self.node.op, ast.And):
            parts = [Expression(key=self.key, node=node, source=self.source) for node in self.node.values]
            return tuple(clause for part in parts for clause in part.clauses)
        return (self,)

    def check(self, schema: pa.Schema, wants: Kind) -> None:
        """Find, before anything runs, what could not be evaluated on tables of a schema.

        Args:
            schema: of the columns there are, by dotted name.
            wants: what it should give.

        Raises:
            UserError: a column is not known, types do not fit, or it gives something else; names key and place.
        """
        for name in self.names:
            if name not in schema.names:
                raise UserError(
                    f"{self.key}: there is no column {name!r}{did_you_mean(name, schema.names)}{_known(schema, name)}"
                )
        empty = pa.schema([schema.field(name) for name in self.names]).empty_table()
        kind = kind_of(self.evaluate(empty).type)
        if kind != wants:
            what = "what is true or false" if wants == "bool" else f"a {wants}"
            raise UserError(
                f"{self.key}: {segment(self.node, self.source)!r} is a {kind}, and {what} is needed, "
                f"such as {EXAMPLES[wants]}"
            )

    def evaluate(self, table: pa.Table) -> pa.Array | pa.ChunkedArray:
        """Return its value for each row: bool, float64 or text, with null where it is unknown.

        Args:
            table: has a column of each of `names`; others are not looked at.

        Raises:
            UserError: types do not fit; names key and place.
        """
        try:
            value = evaluate_node(self.node, table)
        except ExpressionFault as fault:
            raise UserError(f"{self.key}: {segment(fault.node, self.source)!r}: {fault}") from None
        return value.cast(pa.float64(), safe=False) if kind_of(value.type) == "number" else value


def parse_expression(text: str, *, key: str) -> Expression:
    """Return an expression that a recipe has under `key`.

    Raises:
        UserError: it is none; names the key, the place, and for habits of SQL what to write instead.
    """
    node, source = parse(text, key=key)
    return Expression(key=key, node=node, source=source)


def _known(schema: pa.Schema, name: str) -> str:
    """Return the columns that are named as the house names them where there are few of them."""
    parent = name.rpartition(".")[0]
    near = [known for known in schema.names if known.rpartition(".")[0] == parent] or schema.names
    shown = ", ".join(near[:SHOWN_NAMES])
    more = len(near) - SHOWN_NAMES
    return f"; there are {shown}{f' and {more} more' if more > 0 else ''}" if near else ""

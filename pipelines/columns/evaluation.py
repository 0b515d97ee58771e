"""Values of expressions by pyarrow.compute: typed as they are made, so that an empty table is enough to check one."""

import ast
import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.columns.grammar import dotted_name

Value = Any  # pa.Array, pa.ChunkedArray, or pa.Scalar of what is written out
COMPARERS: dict[type[ast.cmpop], str] = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
NUMBER = re.compile(r"\s*[+-]?\d+(\.\d*)?([eE][+-]?\d+)?\s*")
ORDERED = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
    ast.Pow: "power",
}
OF_NUMBERS = {"exp": "exp", "log": "ln", "sqrt": "sqrt", "abs": "abs"}


class ExpressionFault(Exception):
    """A part of an expression that has no value, whatever the rows are."""

    def __init__(self, node: ast.AST, message: str) -> None:
        super().__init__(message)
        self.node = node


def kind_of(arrow_type: pa.DataType) -> str:
    """Return what expressions make of an Arrow type: bool, number, text, list, or the name of another."""
    types = pa.types
    if types.is_dictionary(arrow_type):
        return kind_of(arrow_type.value_type)
    if types.is_boolean(arrow_type):
        return "bool"
    if types.is_integer(arrow_type) or types.is_floating(arrow_type) or types.is_decimal(arrow_type):
        return "number"
    if types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type):
        return "text"
    if types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type):
        return "list"
    return str(arrow_type)


def evaluate_node(node: ast.expr, table: pa.Table) -> pa.Array | pa.ChunkedArray:
    """Return the value of a node for each row of a table.

    Raises:
        ExpressionFault: types do not fit.
    """
    value = _value(node, table)
    return pa.repeat(value, table.num_rows) if isinstance(value, pa.Scalar) else value


def _arrow(function: str, *values: Value, options: pc.FunctionOptions | None = None) -> Value:
    return pc.call_function(function, list(values), options)


def _value(node: ast.expr, table: pa.Table) -> Value:
    if name := dotted_name(node):
        return _column(table.column(name).combine_chunks())
    if isinstance(node, ast.Constant):
        return _constant(node.value)
    if isinstance(node, ast.BoolOp):
        return _all_or_any(node, table)
    if isinstance(node, ast.UnaryOp):
        return _unary(node, table)
    if isinstance(node, ast.BinOp):
        return _arithmetic(node, table)
    if isinstance(node, ast.Compare):
        return _compare(node, table)
    if isinstance(node, ast.IfExp):
        condition = _bool(node.test, table, what="if")
        return _arrow("if_else", condition, *_alike([node.body, node.orelse], table, whole=node))
    if isinstance(node, ast.Call):
        return _call(node, table)
    raise ExpressionFault(node, "a list of values stands after in or not in alone")


def _column(values: Value) -> Value:
    """Return a column as it is reckoned with: int64, float32 or 64, text or bool; a number that is none is null."""
    arrow_type = values.type
    if pa.types.is_dictionary(arrow_type):
        values, arrow_type = values.cast(arrow_type.value_type), arrow_type.value_type
    kind = kind_of(arrow_type)
    if kind == "text":
        return values.cast(pa.string()) if not pa.types.is_string(arrow_type) else values
    if kind != "number":
        return values
    if pa.types.is_integer(arrow_type) and not pa.types.is_uint64(arrow_type):
        return values.cast(pa.int64())
    is_short = pa.types.is_float32(arrow_type) or pa.types.is_float16(arrow_type)
    return _known(values.cast(pa.float32() if is_short else pa.float64(), safe=False))


def _constant(value: Any) -> pa.Scalar:
    # Beyond int64 a number is what float64 makes of it.
    is_small = not isinstance(value, int) or isinstance(value, bool) or abs(value) < 1 << 63
    return pa.scalar(value if is_small else float(value))


def _known(values: Value) -> Value:
    """Return values of floats with null for what is no number."""
    return _arrow("if_else", _arrow("is_nan", values), pa.scalar(None, values.type), values)


def _typed(node: ast.expr, table: pa.Table, *, kind: str, what: str) -> Value:
    value = _value(node, table)
    found = kind_of(value.type)
    if found != kind:
        wanted = {"bool": "what is true or false", "number": "numbers", "text": "texts"}[kind]
        raise ExpressionFault(node, f"{what} is of {wanted}, and this is a {found}")
    return value


def _bool(node: ast.expr, table: pa.Table, *, what: str) -> Value:
    return _typed(node, table, kind="bool", what=what)


def _number(node: ast.expr, table: pa.Table, *, what: str) -> Value:
    return _typed(node, table, kind="number", what=what).cast(pa.float64(), safe=False)


def _text(node: ast.expr, table: pa.Table, *, what: str) -> Value:
    return _typed(node, table, kind="text", what=what)


def _arithmetic(node: ast.BinOp, table: pa.Table) -> Value:
    """Return what an operator makes of float64 values: they do not overflow, and what is no number is unknown."""
    left, right = (_number(part, table, what="arithmetic") for part in (node.left, node.right))
    if name := ARITHMETIC.get(type(node.op)):
        return _known(_arrow(name, left, right))
    quotient = _arrow("floor", _arrow("divide", left, right))
    is_quotient = isinstance(node.op, ast.FloorDiv)
    return _known(quotient if is_quotient else _arrow("subtract", left, _arrow("multiply", right, quotient)))


def _all_or_any(node: ast.BoolOp, table: pa.Table) -> Value:
    is_and = isinstance(node.op, ast.And)
    join, what = ("and_kleene", "and") if is_and else ("or_kleene", "or")
    result = _bool(node.values[0], table, what=what)
    for part in node.values[1:]:
        result = _arrow(join, result, _bool(part, table, what=what))
    return result


def _unary(node: ast.UnaryOp, table: pa.Table) -> Value:
    if isinstance(node.op, ast.Not):
        return _arrow("invert", _bool(node.operand, table, what="not"))
    value = _number(node.operand, table, what="a sign")
    return _arrow("negate", value) if isinstance(node.op, ast.USub) else value


def _compare(node: ast.Compare, table: pa.Table) -> Value:
    """Return whether all of a chain such as `0.2 < score <= 0.9` holds."""
    parts = [node.left, *node.comparators]
    result = None
    for comparison, left, right in zip(node.ops, parts, parts[1:], strict=False):
        if isinstance(comparison, ast.In | ast.NotIn):
            value = _is_in(left, right, table, whole=node)
            value = _arrow("invert", value) if isinstance(comparison, ast.NotIn) else value
        else:
            values = _alike([left, right], table, whole=node)
            if isinstance(comparison, ORDERED) and kind_of(values[0].type) == "bool":
                raise ExpressionFault(node, "what is true or false is neither more nor less than another")
            value = _arrow(COMPARERS[type(comparison)], *values)
        result = value if result is None else _arrow("and_kleene", result, value)
    return result


def _is_in(left: ast.expr, right: ast.expr, table: pa.Table, *, whole: ast.expr) -> Value:
    if not isinstance(right, ast.Tuple | ast.List | ast.Set):
        if isinstance(left, ast.Constant) and isinstance(left.value, str):
            return _arrow(
                "match_substring", _text(right, table, what="in"), options=pc.MatchSubstringOptions(left.value)
            )
        raise ExpressionFault(right, "write the values after in in brackets, such as ('a', 'b')")
    written = [part.operand if isinstance(part, ast.UnaryOp) else part for part in right.elts]
    if not written or not all(isinstance(part, ast.Constant) for part in written):
        raise ExpressionFault(right, "after in stand values that are written out, one or more")
    value, *known = _alike([left, *right.elts], table, whole=whole)
    found = _arrow("is_in", value, options=pc.SetLookupOptions(pa.array([one.as_py() for one in known], value.type)))
    return _arrow("if_else", _arrow("is_valid", value), found, pa.scalar(None, pa.bool_()))


def _alike(nodes: list[ast.expr], table: pa.Table, *, whole: ast.expr) -> list[Value]:
    """Return values of one kind, numbers of one type.

    Beside float32 alone, what is written out is rounded as the column's values were: 0.7 equals the 0.7 of a column.
    """
    values = [_value(node, table) for node in nodes]
    kinds = [kind_of(value.type) for value in values]
    for node, value, kind in zip(nodes, values, kinds, strict=True):
        if kind not in ("bool", "number", "text"):
            raise ExpressionFault(node, f"a {kind} is compared with nothing")
        if kind != kinds[0]:
            advice = next(filter(None, map(_unquoted, (values[0], value))), "") if "number" in {kind, kinds[0]} else ""
            raise ExpressionFault(whole, f"brings together a {kinds[0]} and a {kind}{advice}")
    if kinds[0] != "number":
        return values
    of_columns = {value.type for value in values if not isinstance(value, pa.Scalar)} or {pa.float64()}
    common = of_columns.pop() if len(of_columns) == 1 else pa.float64()
    if common == pa.int64() and any(value.type != common for value in values):
        common = pa.float64()
    return [value.cast(common, safe=False) for value in values]


def _unquoted(value: Value) -> str:
    """Return what to do about a number that stands in quotes."""
    if isinstance(value, pa.Scalar) and pa.types.is_string(value.type) and NUMBER.fullmatch(value.as_py()):
        return f": write {value.as_py().strip()} without quotes"
    return ""


def _call(node: ast.Call, table: pa.Table) -> Value:
    name, arguments = dotted_name(node.func), node.args
    if name in OF_NUMBERS:
        return _known(_arrow(OF_NUMBERS[name], _number(arguments[0], table, what=name)))
    if name in ("min", "max"):
        values = [_number(argument, table, what=name) for argument in arguments]
        options = pc.ElementWiseAggregateOptions(skip_nulls=False)
        return _arrow(f"{name}_element_wise", *values, options=options)
    if name == "lower":
        return _arrow("utf8_lower", _text(arguments[0], table, what=name))
    if name == "length":
        return _length(arguments[0], table)
    if name == "is_null":
        return _arrow("is_null", _value(arguments[0], table))
    if name == "coalesce":
        return _arrow("coalesce", *_alike(arguments, table, whole=node))
    text, pattern = _text(arguments[0], table, what=str(name)), _value(arguments[1], table).as_py()
    if name == "contains":
        return _arrow("match_substring", text, options=pc.MatchSubstringOptions(pattern))
    try:
        # Of no rows Arrow says nothing of a pattern.
        _arrow("match_substring_regex", pa.array([""]), options=pc.MatchSubstringOptions(pattern))
        return _arrow("match_substring_regex", text, options=pc.MatchSubstringOptions(pattern))
    except pa.ArrowInvalid as error:
        raise ExpressionFault(arguments[1], f"no regular expression ({error})") from None


def _length(node: ast.expr, table: pa.Table) -> Value:
    value = _value(node, table)
    kind = kind_of(value.type)
    if kind not in ("text", "list"):
        raise ExpressionFault(node, f"length is of texts and lists, and this is a {kind}")
    length = _arrow("utf8_length", value) if kind == "text" else _arrow("list_value_length", value)
    return length.cast(pa.int64())

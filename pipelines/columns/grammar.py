"""The grammar of expressions over columns: Python's, less most of it; what SQL would say is named with what to write.

Nothing here is ever run as code: the text becomes a tree of `ast`, and each of its nodes is one of a few kinds.
"""

import ast
import keyword
import math
import re
from collections.abc import Iterator

from errors import UserError
from pipelines.as_typed import did_you_mean

MAX_CHARACTERS, MAX_DEPTH = 20_000, 150
SHOWN_CHARACTERS = 60
# With the least number of arguments, and the most.
FUNCTIONS: dict[str, tuple[int, int | None]] = {
    "exp": (1, 1),
    "log": (1, 1),
    "sqrt": (1, 1),
    "abs": (1, 1),
    "min": (2, None),
    "max": (2, None),
    "lower": (1, 1),
    "length": (1, 1),
    "contains": (2, 2),
    "matches": (2, 2),
    "is_null": (1, 1),
    "coalesce": (2, None),
}
# These take a text that is written out as their second argument.
OF_PATTERNS = ("contains", "matches")
COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn)
ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
UNARY = (ast.Not, ast.USub, ast.UAdd)
WORD = re.compile(
    r"""(?P<text>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")(?P<again>\s*['"])?|(?P<word>[^\W\d]\w*)"""
    r"""|(?P<sign><>|&&|\|\||[<>=!]=|[=!&|~^;‘’“”])""",
    re.DOTALL,
)
TEXT_OR_COMMENT = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|#[^\n]*""", re.DOTALL)
SIGNS = {
    "=": "write == where two values are to be equal",
    "<>": "write != where two values are to differ",
    "&&": "write and",
    "&": "write and",
    "||": "write or",
    "|": "write or",
    "!": "write not",
    "~": "write not",
    "^": "write ** for a power",
    ";": "write one expression, with and between its clauses",
} | dict.fromkeys("‘’“”", "write a text in straight quotes, 'so' or \"so\"")
NULLS = "write is_null(…), or not is_null(…)"
WORDS = {
    "is": NULLS,
    "null": NULLS,
    "none": NULLS,
    "nan": f"{NULLS}: a number that is none is unknown, too",
    "like": "write contains(text, 'a part of it') or matches(text, 'a regular expression')",
    "ilike": "write contains(lower(text), 'a part of it')",
    "between": "write least <= value <= most",
}


def parse(text: str, *, key: str) -> tuple[ast.expr, str]:
    """Return the tree of an expression, and the text that its nodes' places are counted in.

    Raises:
        UserError: it is empty, too long or too deep, no expression of this grammar, or has a habit of SQL; names
            `key`, the place and what to write.
    """
    if not text.strip():
        raise UserError(f"{key} is empty: write an expression over columns, such as min_side >= 512, or leave it out")
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{key} has {len(text):,} characters, and an expression at most {MAX_CHARACTERS:,}: what chooses so many "
            "samples by name is better a column of a table that is joined by key ([columns.tables.<name>])"
        )
    _refuse_habits(text, key=key)
    # Within brackets an expression may have several lines.
    wrapped = f"({text}\n)"
    try:
        tree = ast.parse(wrapped, mode="eval").body
    except SyntaxError as error:
        place = _place(wrapped, error.lineno or 1, error.offset or 1)
        raise UserError(f"{key}: {_excerpt(text, place - 1)}: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise UserError(f"{key} is nested too deep ({_cut(text)})") from None
    except ValueError as error:
        raise UserError(f"{key}: {error} ({_cut(text)})") from None
    _require_shallow(tree, text, key=key)
    for node in _nodes(tree):
        if problem := _problem(node):
            raise UserError(f"{key}: {segment(node, wrapped)!r}: {problem}")
    return tree, wrapped


def segment(node: ast.AST, wrapped: str) -> str:
    """Return the text of a node, in one line and cut to what a message has room for."""
    return _cut(ast.get_source_segment(wrapped, node) or "")


def dotted_name(node: ast.AST) -> str | None:
    """Return `a.b.c` of a node that is one name, else None."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def is_word(name: str) -> bool:
    """Whether a name is a word of the grammar, or of SQL's: no expression could have a column of that name."""
    return keyword.iskeyword(name) or name.lower() in (*WORDS, "true", "false", "and", "or", "not", "in")


def _without_comments(text: str) -> str:
    """Return a text with blanks in the place of its comments."""
    return TEXT_OR_COMMENT.sub(lambda found: " " * len(found[0]) if found[0][0] == "#" else found[0], text)


def _refuse_habits(text: str, *, key: str) -> None:
    depth = 0
    for character in TEXT_OR_COMMENT.sub("", text):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            raise UserError(f"{key}: {_cut(text)!r} has a closing bracket without an opening one")
    for match in WORD.finditer(_without_comments(text)):
        if advice := _advice(match):
            shown = match["text"] or match["word"] or match["sign"]
            raise UserError(f"{key}: {_excerpt(text, match.start())}: {shown}: {advice}")


def _advice(match: re.Match[str]) -> str | None:
    if match["text"]:
        quoted = 'a quote within a text is written in quotes of the other kind, such as "it\'s"'
        return f"two texts side by side; {quoted}" if match["again"] else None
    if match["sign"]:
        return SIGNS.get(match["sign"])
    word, lower = match["word"], match["word"].lower()
    if lower in WORDS:
        return WORDS[lower]
    if lower in ("true", "false") and word not in ("True", "False"):
        return f"write {lower.capitalize()}"
    if lower in ("and", "or", "not", "in") and word != lower:
        return f"write {lower}"
    if keyword.iskeyword(word) and word not in ("and", "or", "not", "in", "if", "else", "True", "False"):
        return "a word of Python's own, which no column can have as its name"
    return None


def _problem(node: ast.AST) -> str | None:
    """Return what is wrong with one node, or None."""
    if isinstance(node, ast.Constant):
        return _problem_of_constant(node.value)
    if isinstance(node, ast.Call):
        return _problem_of_call(node)
    if isinstance(node, ast.Attribute):
        return None if dotted_name(node) else "only a name has parts after a dot, such as flags.loop"
    if isinstance(node, ast.Subscript):
        return "write flags.loop for the flag 'loop'; there are no brackets after a name"
    kinds = {ast.Compare: COMPARISONS, ast.BinOp: ARITHMETIC, ast.UnaryOp: UNARY}
    if isinstance(node, (*kinds, ast.BoolOp, ast.Name, ast.IfExp, ast.Tuple, ast.List, ast.Set)):
        operators = node.ops if isinstance(node, ast.Compare) else [getattr(node, "op", None)]
        allowed = next((kind for form, kind in kinds.items() if isinstance(node, form)), None)
        known = allowed is None or all(isinstance(operator, allowed) for operator in operators)
        return None if known else "an operator that expressions over columns do not have"
    return "not part of an expression over columns"


def _problem_of_constant(value: object) -> str | None:
    if isinstance(value, bool | str):
        return None
    if not isinstance(value, int | float):
        return NULLS if value is None else "neither a number nor a text nor True nor False"
    try:
        return None if math.isfinite(float(value)) else "no finite number"
    except OverflowError:
        return "too large a number"


def _problem_of_call(node: ast.Call) -> str | None:
    name = dotted_name(node.func)
    if name not in FUNCTIONS:
        return f"no function {name or ''}{did_you_mean(name or '', FUNCTIONS)}; there are {', '.join(FUNCTIONS)}"
    if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
        return f"{name} takes values alone, without names or stars"
    least, most = FUNCTIONS[name]
    if not least <= len(node.args) <= (most or len(node.args)):
        wanted = f"{least} values" if least > 1 else "1 value"
        return f"{name} takes {wanted}{'' if most else ' or more'}, not {len(node.args)}"
    last = node.args[-1]
    if name in OF_PATTERNS and not (isinstance(last, ast.Constant) and isinstance(last.value, str)):
        return f"{name} takes a text in quotes as its second value"
    return None


def _nodes(tree: ast.expr) -> Iterator[ast.AST]:
    """Yield the nodes of a tree that stand for something, but not the names of functions and of what has parts."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        children = node.args if isinstance(node, ast.Call) else list(ast.iter_child_nodes(node))
        if not isinstance(node, ast.Attribute):
            kinds = (ast.expr_context, ast.operator, ast.boolop, ast.unaryop, ast.cmpop)
            waiting += [child for child in reversed(children) if not isinstance(child, kinds)]


def _require_shallow(tree: ast.expr, text: str, *, key: str) -> None:
    waiting: list[tuple[ast.AST, int]] = [(tree, 1)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise UserError(f"{key} is nested more than {MAX_DEPTH} deep ({_cut(text)}): write it shorter")
        waiting += [(child, depth + 1) for child in ast.iter_child_nodes(node)]


def _place(wrapped: str, line: int, column: int) -> int:
    """Return where in a text a line and a column are, both counted from 1."""
    lines = wrapped.splitlines(keepends=True)
    return sum(map(len, lines[: line - 1])) + column - 1


def _excerpt(text: str, place: int) -> str:
    """Return what stands around a place, and its number, counted from 1."""
    place = max(0, min(place, len(text) - 1))
    start = max(0, place - SHOWN_CHARACTERS // 2)
    return f"{_cut(text[start:])!r}, at character {place + 1}"


def _cut(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= SHOWN_CHARACTERS else f"{words[:SHOWN_CHARACTERS]}…"

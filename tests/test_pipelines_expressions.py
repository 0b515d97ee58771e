"""Expressions over columns: what they say of rows, what is unknown, and how each slip is told before anything runs."""

import math

import pyarrow as pa
import pytest

from errors import UserError
from pipelines.columns.expressions import parse_expression

TABLE = pa.table(
    {
        "min_side": pa.array([256, 512, 1024, None], pa.int32()),
        "clip_score": pa.array([0.1, 0.7, math.nan, None], pa.float32()),
        "aesthetic": pa.array([1.0, -2.0, 0.0, 4.0], pa.float64()),
        "caption": pa.array(["A Dog", "two cats\nsit", "", None]),
        "duplicate": pa.array([False, True, None, False]),
        "flags": pa.array([["loop"], [], ["loop", "empty"], None], pa.list_(pa.string())),
        "flags.loop": pa.array([True, False, True, None]),
        "phash": pa.array([1, 2, 3, 4], pa.uint64()),
        "kind": pa.array(["exact", "near", "near", None]).dictionary_encode(),
        "short.num_tokens": pa.array([10, 20, 30, 40], pa.int16()),
        "half": pa.array([0.5, 1.0, 2.0, None], pa.float16()),
    }
)
UNKNOWN = None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("min_side >= 512", [False, True, True, UNKNOWN]),
        ("512 <= min_side < 1024", [False, True, False, UNKNOWN]),
        # What a table shows as 0.7 is 0.7, whatever it is stored as; a score that is NaN is neither good nor bad.
        ("clip_score >= 0.7", [False, True, UNKNOWN, UNKNOWN]),
        ("not clip_score >= 0.7", [True, False, UNKNOWN, UNKNOWN]),
        ("clip_score == 0.7 or min_side == 1024", [False, True, True, UNKNOWN]),
        ("duplicate and flags.loop", [False, False, UNKNOWN, False]),
        ("duplicate or flags.loop", [True, True, True, UNKNOWN]),
        ("not duplicate and not flags.loop", [False, False, False, UNKNOWN]),
        ("duplicate == False", [True, False, UNKNOWN, True]),
        ("min_side in (256, 1024)", [True, False, True, UNKNOWN]),
        ("min_side not in [256, -1]", [False, True, True, UNKNOWN]),
        ("min_side > 500.5", [False, True, True, UNKNOWN]),
        ("kind in {'near'}", [False, True, True, UNKNOWN]),
        ("'dog' in lower(caption)", [True, False, False, UNKNOWN]),
        ("contains(caption, 'cat')", [False, True, False, UNKNOWN]),
        ("matches(caption, '(?i)^a ')", [True, False, False, UNKNOWN]),
        ("length(caption) > 5", [False, True, False, UNKNOWN]),
        ("length(flags) == 0", [False, True, False, UNKNOWN]),
        ("is_null(clip_score)", [False, False, True, True]),
        ("is_null(flags)", [False, False, False, True]),
        ("coalesce(duplicate, True)", [False, True, True, False]),
        ("short.num_tokens % 20 == 0", [False, True, False, True]),
        ("short.num_tokens // 20 == 1", [False, True, True, False]),
        ("phash == 3", [False, False, True, False]),
        ("True", [True] * 4),
        # Several lines and comments, as a recipe's text may have them.
        ("min_side >= 512  # large\n and not duplicate", [False, False, UNKNOWN, UNKNOWN]),
        ("min_side >= 512  # it's as large as is 'good') && <> \n and not duplicate", [False, False, UNKNOWN, UNKNOWN]),
        ("caption == '# 1' or min_side >= 512", [False, True, True, UNKNOWN]),
    ],
)
def test_what_is_true_of_rows(text: str, expected: list[bool | None]) -> None:
    expression = parse_expression(text, key="where")
    expression.check(TABLE.schema, "bool")
    assert expression.evaluate(TABLE).to_pylist() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("min_side", [256.0, 512.0, 1024.0, None]),
        ("-aesthetic + 2 ** 3", [7.0, 10.0, 8.0, 4.0]),
        ("exp(aesthetic) * 0", [0.0, 0.0, 0.0, 0.0]),
        ("log(aesthetic)", [0.0, None, -math.inf, math.log(4)]),
        ("sqrt(aesthetic)", [1.0, None, 0.0, 2.0]),
        ("aesthetic / aesthetic", [1.0, 1.0, None, 1.0]),
        ("max(clip_score, 0.5, aesthetic)", [1.0, pytest.approx(0.7), None, None]),
        ("min(min_side, 300)", [256.0, 300.0, 300.0, None]),
        ("abs(aesthetic)", [1.0, 2.0, 0.0, 4.0]),
        ("2 if duplicate else 1", [1.0, 2.0, None, 1.0]),
        ("coalesce(half, 0)", [0.5, 1.0, 2.0, 0.0]),
        ("3", [3.0] * 4),
        ("99999999999999999999", [1e20] * 4),
    ],
)
def test_numbers_of_rows(text: str, expected: list[float | None]) -> None:
    expression = parse_expression(text, key="weight")
    expression.check(TABLE.schema, "number")
    found = expression.evaluate(TABLE)
    assert found.type == pa.float64()
    assert found.to_pylist() == expected


def test_names_and_clauses_are_in_written_order() -> None:
    text = "min_side >= 512 and (not flags.loop and clip_score > exp(aesthetic)) and (duplicate or min_side > 3)"
    expression = parse_expression(text, key="where")
    assert expression.names == ("min_side", "flags.loop", "clip_score", "aesthetic", "duplicate")
    assert [clause.text for clause in expression.clauses] == [
        "min_side >= 512",
        "not flags.loop",
        "clip_score > exp(aesthetic)",
        "duplicate or min_side > 3",
    ]
    assert expression.clauses[1].names == ("flags.loop",)
    for clause in expression.clauses:
        assert parse_expression(clause.text, key="where").evaluate(TABLE) == clause.evaluate(TABLE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_side = 512", "at character 10: =: write == where"),
        ("min_side <> 512", "<>: write !="),
        ("min_side > 1 AND duplicate", "AND: write and"),
        ("min_side IS NULL", "IS: write is_null"),
        ("min_side is None", "is: write is_null"),
        ("min_side == null", "null: write is_null"),
        ("clip_score == NaN", "NaN: write is_null"),
        ("caption LIKE '%cat%'", "LIKE: write contains"),
        ("min_side BETWEEN 1 and 2", "BETWEEN: write least <= value"),
        ("duplicate && flags.loop", "&&: write and"),
        ("!duplicate", "!: write not"),
        ("min_side ^ 2", r"write \*\*"),
        ("duplicate == true", "write True"),
        ("caption == 'it''s'", "two texts side by side"),
        ("caption == ‘dog’", "straight quotes"),
        ("caption == 'dog", "unterminated string"),
        ("min_side >", "invalid syntax"),
        ("min_side > 1) or (duplicate", "closing bracket without"),
        ("lambda: 1", "word of Python's own"),
        ("duplicate; flags.loop", ";: write one expression"),
        ("duplicate, flags.loop", "a list of values stands after in"),
        ("flags['loop']", "write flags.loop"),
        ("__import__('os').system('x')", "no function"),
        ("caption.upper()", "no function caption.upper"),
        ("lenght(caption)", r"no function lenght \(did you mean length\?\)"),
        ("exp(1, 2)", "exp takes 1 value, not 2"),
        ("max(1)", "max takes 2 values or more, not 1"),
        ("contains(caption, caption)", "a text in quotes as its second"),
        ("matches(caption, '(')", "no regular expression"),
        ("{'a': 1} == 1", "not part of an expression"),
        ("f'{caption}' == 'a'", "not part of an expression"),
        ("b'a' == caption", "neither a number nor a text"),
        ("1e999 > min_side", "no finite number"),
        (f"{'9' * 400} > min_side", "too large a number"),
        ("", "is empty"),
        (" \n", "is empty"),
        ("a\0b", "null bytes"),
        ("caption > 3", "'caption > 3': brings together a text and a number"),
        ("min_side == '512'", "a number and a text: write 512 without quotes"),
        ("min_side in (1, 'a')", "brings together a number and a text"),
        ("min_side in caption", "in brackets"),
        ("min_side in ()", "one or more"),
        ("min_side in (-min_side, 1)", "written out"),
        ("min_side and duplicate", "'min_side': and is of what is true or false, and this is a number"),
        ("not min_side", "not is of what is true"),
        ("duplicate < flags.loop", "neither more nor less"),
        ("duplicate + 1", "'duplicate': arithmetic is of numbers, and this is a bool"),
        ("flags == 'loop'", "'flags': a list is compared with nothing"),
        ("length(min_side) > 1", "length is of texts and lists"),
        ("min_side", "is a number, and what is true or false is needed, such as"),
        ("flags.lop", r"no column 'flags.lop' \(did you mean flags.loop\?\); there are flags.loop"),
        ("min_sid > 1", r"no column 'min_sid' \(did you mean min_side\?\)"),
    ],
)
def test_a_slip_is_told_with_key_and_place(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s)^features.a.where.*{message}") as error:
        parse_expression(text, key="features.a.where").check(TABLE.schema, "bool")
    assert str(error.value).isprintable()


def test_a_weight_is_a_number() -> None:
    with pytest.raises(UserError, match="weight: 'duplicate' is a bool, and a number is needed"):
        parse_expression("duplicate", key="weight").check(TABLE.schema, "number")


@pytest.mark.parametrize(
    "text",
    [
        "-" * 19_000 + "1",
        "(" * 5_000 + "1" + ")" * 5_000,
        "a" + ".b" * 9_000,
        "+".join(["1"] * 9_000),
        "not " * 4_000 + "a",
        "a if b else " * 1_000 + "1",
        "x" * 30_000,
        "[" * 199 + "]" * 199,
    ],
)
def test_no_expression_is_too_deep_or_too_long_to_be_told(text: str) -> None:
    with pytest.raises(UserError, match=r"^where"):
        parse_expression(text, key="where").check(TABLE.schema, "bool")


def test_many_clauses_and_values_are_no_depth() -> None:
    names = " or ".join(f"min_side == {number}" for number in range(800))
    assert parse_expression(names, key="where").evaluate(TABLE).to_pylist() == [True, True, False, None]
    chain = "0 < " * 4_000 + "min_side"
    assert parse_expression(chain, key="where").evaluate(TABLE).to_pylist() == [False] * 3 + [False]
    values = ", ".join(map(str, range(3_000)))
    assert parse_expression(f"min_side in ({values})", key="where").evaluate(TABLE).to_pylist()[:3] == [True] * 3


def test_what_is_written_is_shown_as_text() -> None:
    with pytest.raises(UserError) as error:
        parse_expression("caption == '\x1b[31m[bold]' + 1", key="where").check(TABLE.schema, "bool")
    assert "\x1b" not in str(error.value)
    assert "[bold]" in str(error.value)

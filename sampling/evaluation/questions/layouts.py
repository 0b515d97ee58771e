"""Benchmarks' prompts with their questions, read from the user's copies of the files as their authors publish them."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from encoders.answers import NUMBERS
from errors import MissingFileError, UserError
from pipelines.engine.progress import get_logger
from pipelines.raw.texts import decode_text
from sampling.evaluation.questions.wording import Question, compbench_questions, geneval_questions

# The parent of a question that has none, in dpg_bench.csv.
NO_PARENT = 0
DPG_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
ANSWERS = ("yes", "no", *NUMBERS)

Line = TypeVar("Line", bound=pydantic.BaseModel)

log = get_logger("evaluation")


@dataclass(frozen=True, kw_only=True)
class AskedPrompt:
    """A prompt of a benchmark and what is asked about its images.

    Attributes:
        key: as the images are called.
        group: GenEval's tag or T2I-CompBench's category; empty of the others.
        num_atoms: of GenEval 2, how much the prompt asks for.
    """

    key: str
    prompt: str
    questions: tuple[Question, ...]
    group: str = ""
    num_atoms: int | None = None


class GenEvalObject(pydantic.BaseModel):
    """What must, or must not, be in an image: `count` of a class or more; `position` is (where, of which other)."""

    name: str = pydantic.Field(alias="class", min_length=1)
    count: int = pydantic.Field(ge=1)
    color: str | None = None
    position: tuple[str, int] | None = None

    def outline(self) -> dict[str, Any]:
        """Return it as the file has it, without what it does not say."""
        return self.model_dump(by_alias=True, exclude_none=True)


class GenEvalLine(pydantic.BaseModel):
    """A line of `evaluation_metadata.jsonl`."""

    tag: str = pydantic.Field(min_length=1)
    prompt: str = pydantic.Field(min_length=1)
    include: list[GenEvalObject] = pydantic.Field(min_length=1)
    exclude: list[GenEvalObject] = pydantic.Field(default_factory=list)

    @pydantic.model_validator(mode="after")
    def _check_places(self) -> "GenEvalLine":
        for number, item in enumerate(self.include):
            if item.position is not None and not 0 <= item.position[1] < number:
                raise ValueError(f"include {number} is placed by object {item.position[1]}, which is none before it")
        return self


class GenEval2Line(pydantic.BaseModel):
    """A line of `geneval2_data.jsonl`, and of `evaluation.questions.file`."""

    prompt: str = pydantic.Field(min_length=1)
    vqa_list: list[tuple[str, str]] = pydantic.Field(min_length=1)
    skills: list[str]
    atom_count: int | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> "GenEval2Line":
        if len(self.skills) != len(self.vqa_list):
            raise ValueError(f"{len(self.vqa_list)} questions in vqa_list, but {len(self.skills)} skills")
        for question, answer in self.vqa_list:
            if answer.casefold() not in ANSWERS or not question.strip():
                raise ValueError(f"{question!r} has the answer {answer!r}, which is not one of {', '.join(ANSWERS)}")
        return self


def read_geneval(path: Path, *, key: str, num_per_tag: int | None = None) -> list[AskedPrompt]:
    """Read `evaluation_metadata.jsonl`; keys are the numbers of its lines in five digits, as its authors' folders.

    Raises:
        MissingFileError, UserError: there is no such file, or a line is not in that layout; names it and the recipe's
            `key`.
    """
    prompts: list[AskedPrompt] = []
    for number, line in _lines(path, GenEvalLine, key=key, name="GenEval's evaluation_metadata.jsonl"):
        try:
            questions = geneval_questions(
                [item.outline() for item in line.include], [item.outline() for item in line.exclude]
            )
        except UserError as error:
            raise UserError(f"{key} {path}, line {number + 1}: {error}") from None
        prompts.append(AskedPrompt(key=f"{number:05d}", prompt=line.prompt, questions=tuple(questions), group=line.tag))
    return _first_of_groups(prompts, num=num_per_tag)


def read_geneval2(path: Path, *, key: str, num_prompts: int | None = None) -> list[AskedPrompt]:
    """Read `geneval2_data.jsonl`; keys are the numbers of its lines in five digits; raises as `read_geneval`."""
    prompts = [
        AskedPrompt(
            key=f"{number:05d}",
            prompt=line.prompt,
            questions=tuple(
                Question(text=text, answer=answer.casefold(), group=skill)
                for (text, answer), skill in zip(line.vqa_list, line.skills, strict=True)
            ),
            num_atoms=line.atom_count,
        )
        for number, line in _lines(path, GenEval2Line, key=key, name="GenEval 2's geneval2_data.jsonl")
    ]
    repeated = [prompt for prompt, count in Counter(item.prompt for item in prompts).items() if count > 1]
    if repeated:
        raise UserError(f"{key} {path} has the prompt {repeated[0]!r} twice")
    return prompts[:num_prompts]


def with_questions(rows: list[dict[str, Any]]) -> list[AskedPrompt]:
    """Return T2I-CompBench's prompts, of key and prompt, with the questions of their category."""
    asked: list[AskedPrompt] = []
    for row in rows:
        category = row["key"].rpartition("-")[0]
        questions = compbench_questions(category, row["prompt"])
        asked.append(AskedPrompt(key=row["key"], prompt=row["prompt"], questions=tuple(questions), group=category))
    return asked


def read_dpg(path: Path, *, key: str, num_prompts: int | None = None) -> list[AskedPrompt]:
    """Read `dpg_bench.csv`, one proposition a row; keys are its item ids, as its authors call images.

    Raises:
        MissingFileError, UserError: as `read_geneval`.
    """
    rows = csv.DictReader(io.StringIO(_read(path, key=key), newline=""))
    missing = [name for name in DPG_COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise UserError(f"{key} {path} has no column {missing[0]}: give DPG-Bench's dpg_bench.csv")
    items: dict[str, dict[int, Question]] = {}
    texts: dict[str, str] = {}
    for row in _rows(rows, where=f"{key} {path}"):
        where = f"{key} {path}, line {rows.line_num}"
        item = (row["item_id"] or "").strip()
        number, question = _proposition(row, where=where)
        if not item or number in items.setdefault(item, {}):
            raise UserError(f"{where}: item {item!r} has no id, or proposition {number} twice")
        items[item][number] = question
        texts.setdefault(item, " ".join((row["text"] or "").split()))
    empty = [item for item, text in texts.items() if not text]
    if empty or not items:
        raise UserError(f"{key} {path}: {f'item {empty[0]} has no text' if empty else 'no proposition'}")
    asked = [
        AskedPrompt(key=item, prompt=texts[item], questions=_numbered(questions, item=item))
        for item, questions in items.items()
    ]
    return asked[:num_prompts]


def _rows(rows: "csv.DictReader[str]", *, where: str) -> Iterator[dict[str, str]]:
    try:
        yield from rows
    except csv.Error as error:  # such as a quote that never ends
        raise UserError(f"{where}, line {rows.line_num} is no row of a CSV: {error}") from None


def _proposition(row: Mapping[str, str | None], *, where: str) -> tuple[int, Question]:
    """Return a proposition's number and its question, whose parents are numbers of propositions still."""
    try:
        number = int(row["proposition_id"] or "")
        parents = tuple(int(parent) for parent in (row["dependency"] or "").split(","))
    except ValueError as error:
        raise UserError(f"{where}: proposition_id and dependency are whole numbers: {error}") from None
    text = " ".join((row["question_natural_language"] or "").split())
    # "entity - whole (helmet)" is about an entity.
    group = (row["tuple"] or "").partition("(")[0].partition("-")[0].strip().lower()
    if not text or not group:
        raise UserError(f"{where}: proposition {number} has no question, or a tuple without category")
    return number, Question(text=text, answer="yes", group=group, parents=parents)


def _numbered(questions: Mapping[int, Question], *, item: str) -> tuple[Question, ...]:
    """Return the questions of an item with parents by their places among them."""
    places = {number: place for place, number in enumerate(questions)}
    unknown = sorted({p for q in questions.values() for p in q.parents if p != NO_PARENT and p not in places})
    if unknown:
        log.warning(f"DPG-Bench, item {item}: propositions {unknown} are named as parents and are not there")
    return tuple(
        replace(question, parents=tuple(places[parent] for parent in question.parents if parent in places))
        for question in questions.values()
    )


def _first_of_groups(prompts: list[AskedPrompt], *, num: int | None) -> list[AskedPrompt]:
    taken: Counter[str] = Counter()
    kept: list[AskedPrompt] = []
    for prompt in prompts:
        taken[prompt.group] += 1
        if num is None or taken[prompt.group] <= num:
            kept.append(prompt)
    return kept


def _lines(path: Path, form: type[Line], *, key: str, name: str) -> Iterator[tuple[int, Line]]:
    """Yield number and content of each line of JSON; empty ones are passed over."""
    lines = _read(path, key=key).split("\n")  # and at no other end of a line: texts may hold those
    if not any(map(str.strip, lines)):
        raise UserError(f"{key} {path} is empty: give {name}")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            yield number, form.model_validate_json(line)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            said = f"{where}: {first['msg']}" if where else first["msg"]
            raise UserError(f"{key} {path}, line {number + 1} is not in the layout of {name}: {said}") from None


def _read(path: Path, *, key: str) -> str:
    if not path.is_file():
        raise MissingFileError(f"{key} {path} is no file")
    try:
        return decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{key} {path} is not UTF-8 text: {error}") from None

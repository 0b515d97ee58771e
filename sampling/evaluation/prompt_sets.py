"""Prompts of published benchmarks, read as their authors ship them and written as sampling reads prompts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import MissingFileError, UserError
from pipelines.raw.texts import decode_text
from pipelines.store.files import atomic_write_bytes, one_at_a_time, sha256_text
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.questions.layouts import AskedPrompt, read_dpg, read_geneval, read_geneval2

# Of T2I-CompBench (Huang et al. 2023), in the order of the paper's Table 3, then what T2I-CompBench++ added.
CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex", "3d_spatial", "numeracy")
COCO_PROMPTS = 30_000  # FID-30K
KEY = "evaluation.prompts"


def write_prompt_set(config: EvaluationConfig, *, run: Path) -> Path | None:
    """Write a benchmark's prompts to `RUN/evaluation/prompts/`; None where the recipe's own prompts are meant.

    Raises:
        MissingFileError: the benchmark's files are not there.
        UserError: they are not in the published layout; names file and line.
    """
    if config.prompt_set == "sampling":
        return None
    assert config.prompts is not None
    path = config.folder(config.prompts, run)
    if config.prompt_set == "t2i-compbench":
        rows = read_compbench(path, num_per_category=config.num_prompts)
    elif config.prompt_set == "coco":
        rows = read_coco(path, num_prompts=config.num_prompts or COCO_PROMPTS)
    else:
        rows = [{"key": item.key, "prompt": item.prompt} for item in read_asked(config, path)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    output = run / "evaluation" / "prompts" / f"{config.prompt_set}.jsonl"
    with one_at_a_time(output.parent):
        if not output.is_file() or output.read_bytes() != text.encode():
            atomic_write_bytes(output, text.encode())
    return output


def read_asked(config: EvaluationConfig, path: Path) -> list[AskedPrompt]:
    """Read the prompts of a benchmark whose file has their questions, too, or what they are made of.

    Raises:
        MissingFileError, UserError: there is no such file, or it is not in the published layout; names file and line.
    """
    if config.prompt_set == "geneval":
        return read_geneval(path, key=KEY, num_per_tag=config.num_prompts)
    if config.prompt_set == "geneval2":
        return read_geneval2(path, key=KEY, num_prompts=config.num_prompts)
    assert config.prompt_set == "dpg-bench"
    return read_dpg(path, key=KEY, num_prompts=config.num_prompts)


def read_compbench(folder: Path, *, num_per_category: int | None = None) -> list[dict[str, Any]]:
    """Read `<category>_val.txt`, one prompt a line, of every category that is there; keys are `color-0000`.

    Raises:
        MissingFileError: no category is there.
        UserError: a file is empty or not UTF-8.
    """
    rows: list[dict[str, Any]] = []
    for category in CATEGORIES:
        path = folder / f"{category}_val.txt"
        if not path.is_file():
            continue
        # Some lines carry remarks behind a tab.
        prompts = [line.split("\t")[0].strip() for line in _read_text(path).splitlines()]
        prompts = [prompt for prompt in prompts if prompt][:num_per_category]
        if not prompts:
            raise UserError(f"evaluation.prompts {path} holds no prompt")
        rows += [{"key": f"{category}-{number:04d}", "prompt": prompt} for number, prompt in enumerate(prompts)]
    if not rows:
        names = ", ".join(f"{category}_val.txt" for category in CATEGORIES[:6])
        raise MissingFileError(
            f"evaluation.prompts {folder} holds none of {names}: give T2I-CompBench's folder examples/dataset"
        )
    return rows


def read_coco(path: Path, *, num_prompts: int) -> list[dict[str, Any]]:
    """Read `captions_val2014.json`: one caption, that of the lowest id, of each of `num_prompts` images.

    Which images is decided by a hash of their ids, so it is the same everywhere; keys are the image ids in twelve
    digits, as in COCO's file names.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is not COCO's captions, or there are fewer images than prompts asked for.
    """
    if not path.is_file():
        raise MissingFileError(f"evaluation.prompts {path} does not exist: give COCO's captions_val2014.json")
    try:
        annotations = json.loads(_read_text(path))["annotations"]
        ordered: Sequence[dict[str, Any]] = sorted(annotations, key=lambda item: item["id"], reverse=True)
        captions = {int(item["image_id"]): " ".join(item["caption"].split()) for item in ordered}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"evaluation.prompts {path} is not COCO's captions (annotations of id, image_id, caption): {error!r}"
        ) from None
    if len(captions) < num_prompts:
        raise UserError(
            f"evaluation.prompts {path} has captions of {len(captions):,} images, {num_prompts:,} are asked for: set "
            "evaluation.num_prompts"
        )
    chosen = sorted(captions, key=lambda image_id: sha256_text(f"coco {image_id}"))[:num_prompts]
    empty = [image_id for image_id in chosen if not captions[image_id]]
    if empty:
        raise UserError(f"evaluation.prompts {path}: the caption of image {empty[0]} is empty")
    return [{"key": f"{image_id:012d}", "prompt": captions[image_id]} for image_id in chosen]


def _read_text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"evaluation.prompts {path} is not UTF-8 text: {error}") from None

"""Which prompts are asked about, of the recipe's `evaluation.prompt_set`, and from which files they are."""

from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from pipelines.store.files import sha256_file, sha256_text
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.prompt_sets import CATEGORIES, read_asked, read_compbench
from sampling.evaluation.questions.layouts import AskedPrompt, read_geneval2, with_questions

NAMES = {
    "sampling": "questions of the recipe's own",
    "geneval": "GenEval",
    "geneval2": "GenEval 2",
    "t2i-compbench": "T2I-CompBench",
    "dpg-bench": "DPG-Bench",
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Prompts with their questions, and the file or folder they are from with its hash.

    Attributes:
        set_name: the recipe's `evaluation.prompt_set`.
    """

    set_name: str
    prompts: list[AskedPrompt]
    path: Path
    sha256: str

    @property
    def is_by_prompt(self) -> bool:
        """Whether images are known by their prompts, and not by their keys, which are the recipe's own."""
        return self.set_name == "sampling"


def open_benchmark(config: EvaluationConfig, *, run: Path) -> Benchmark:
    """Read the prompts and questions that a recipe names.

    Raises:
        MissingFileError, UserError: a file is not there or not in its layout, or the prompts have no questions.
    """
    if config.prompt_set not in NAMES:
        raise UserError(
            f"evaluation.prompt_set {config.prompt_set!r} has no questions: {', '.join(map(repr, NAMES))} have"
        )
    if config.prompt_set == "sampling":
        if config.questions.file is None:
            raise UserError(
                "evaluation.questions.file is not set: the recipe's own prompts have no questions without it; set it, "
                "or evaluation.prompt_set to a benchmark"
            )
        path = config.folder(config.questions.file, run)
        return _benchmark(config, read_geneval2(path, key="evaluation.questions.file"), path=path)
    assert config.prompts is not None
    path = config.folder(config.prompts, run)
    if config.prompt_set == "t2i-compbench":
        rows = read_compbench(path, num_per_category=config.num_prompts)
        return _benchmark(config, with_questions(rows), path=path)
    return _benchmark(config, read_asked(config, path), path=path)


def _benchmark(config: EvaluationConfig, prompts: list[AskedPrompt], *, path: Path) -> Benchmark:
    files = [path] if path.is_file() else [path / f"{category}_val.txt" for category in CATEGORIES]
    hashes = [f"{file.name} {sha256_file(file)}" for file in files if file.is_file()]
    sha256 = sha256_file(path) if path.is_file() else sha256_text("\n".join(hashes))
    return Benchmark(set_name=config.prompt_set, prompts=prompts, path=path, sha256=sha256)

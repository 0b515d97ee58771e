"""All that one `make caption` has to do: the captions themselves, passes by other models, and cuts of all of these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from captioning.config import CaptioningConfig
from captioning.cuts.config import CutConfig
from captioning.cuts.job import CutJob
from captioning.given.addresses import MAIN_COLUMN
from captioning.job import CaptioningJob, read_job, select_raw
from captioning.passes import chosen_columns, cut_config, is_cut, pass_config
from encoders.weights import ModelSource, resolve_model
from errors import UserError
from pipelines.as_typed import did_you_mean
from pipelines.command import Command
from pipelines.engine.run import EngineConfig
from pipelines.raw.shards import describe_shards
from pipelines.recipe import DataConfig

ALT_TEXT = "alt_text"
# Engines whose model is here, and so is its tokenizer.
WITH_TOKENIZER = ("transformers", "generate", "vllm")


@dataclass(frozen=True, kw_only=True)
class PassJobs:
    """The jobs of a command, in the order in which they are done: what is cut comes after what it is cut of.

    `named` are the columns that it was asked for by name; empty where it makes all.
    """

    captions: list[CaptioningJob]
    cuts: list[CutJob]
    named: Sequence[str]


def read_pass_jobs(command: Command) -> PassJobs:
    """Validate the recipe's tables and read the headers of the raw shards; the captions come first, then each pass.

    All passes are checked, also those that are not to be made now.

    Raises:
        UserError, MissingFileError: a key is wrong, or a shard or a model is not there; names it.
    """
    config = command.recipe.table("captioning", CaptioningConfig)
    columns = chosen_columns(config)
    asked = {MAIN_COLUMN: config}
    asked |= {name: pass_config(command.recipe, name) for name, own in config.passes.items() if not is_cut(own)}
    cuts = _Cuts(
        {name: cut_config(command.recipe, name) for name, own in config.passes.items() if is_cut(own)}, asked=asked
    )
    captions = [
        read_job(command, asked[name], column=name, own_keys=config.passes.get(name, {}).keys())
        for name in asked
        if name in columns
    ]
    return PassJobs(
        captions=captions,
        cuts=[_cut_job(command, cuts, name) for name in cuts.in_order() if name in columns],
        named=columns if config.only.strip() else (),
    )


class _Cuts:
    """The passes that are cut, by name, and the captions that are `asked` of models or given."""

    def __init__(self, configs: Mapping[str, CutConfig], *, asked: Mapping[str, CaptioningConfig]) -> None:
        self.configs = configs
        self.asked = asked
        for name in configs:
            self._require_source(name)

    def in_order(self) -> list[str]:
        """Return the passes so that each comes after what it is cut of."""
        return sorted(self.configs, key=lambda name: len(self.chain(name)))

    def chain(self, name: str) -> list[str]:
        """Return a pass, the captions it is cut of, what those are cut of, and so on.

        Raises:
            UserError: that goes in a circle.
        """
        chain = [name]
        while (config := self.configs.get(chain[-1])) is not None:
            if config.of in chain:
                circle = " is cut of ".join([*chain, config.of])
                raise UserError(f"captioning.passes.{chain[-1]}.of = {config.of!r} goes in a circle: {circle}")
            chain.append(config.of)
        return chain

    def written_by(self, name: str) -> CaptioningConfig | None:
        """Return the settings of the captions that a pass is cut of in the end; None where they are another column."""
        return self.asked.get(self.chain(name)[-1])

    def shards(self, name: str) -> tuple[Sequence[str], str]:
        """Return the patterns of a pass's shards, and the table of the recipe that has them."""
        for column in self.chain(name):
            config = self.configs.get(column) or self.asked.get(column)
            patterns = None if config is None else config.shards
            if patterns is not None:
                is_own = column != MAIN_COLUMN and config is not None and "shards" in config.model_fields_set
                return patterns, f"captioning.passes.{column}" if is_own else "captioning"
        return self.asked[MAIN_COLUMN].shards, "captioning"

    def tokenizer(self, name: str) -> ModelSource | None:
        """Return the model whose tokens are counted.

        Raises:
            UserError: they are to be bounded, and no model is named whose they are.
        """
        config, key = self.configs[name], f"captioning.passes.{name}"
        if config.tokenizer is not None:
            return resolve_model(config.tokenizer, config.tokenizer_revision)
        writer = self.written_by(name)
        if writer is not None and writer.engine in WITH_TOKENIZER:
            return resolve_model(writer.model, writer.revision)
        if config.max_tokens is not None:
            raise UserError(
                f"{key}.max_tokens = {config.max_tokens}: {self.chain(name)[-1]!r} is written by no model whose "
                f"tokenizer is here; set {key}.tokenizer to one, or {key}.max_words"
            )
        return None

    def _require_source(self, name: str) -> None:
        of, key = self.configs[name].of, f"captioning.passes.{name}"
        table = self.asked[MAIN_COLUMN].table
        known = [*self.asked, ALT_TEXT, *(table if isinstance(table, dict) else ()), *self.configs]
        if of not in known:
            named = ", ".join(dict.fromkeys(known))
            raise UserError(f"{key}.of = {of!r} names no captions: there are {named}{did_you_mean(of, known)}")
        claims = self.asked[MAIN_COLUMN].claims.of
        if self.configs[name].supported and of not in claims:
            raise UserError(
                f"{key}.supported needs claims of {of!r}, which captioning.claims.of = {list(claims)} does not name"
            )
        self.chain(name)


def _cut_job(command: Command, cuts: _Cuts, name: str) -> CutJob:
    data = command.recipe.table("data", DataConfig)
    workers = command.recipe.table("engine", EngineConfig)
    patterns, table = cuts.shards(name)
    paths = select_raw(command, patterns, table=table)
    return CutJob(
        column=name,
        config=cuts.configs[name],
        # No model is run.
        workers=workers.model_copy(update={"gpus_per_worker": 0.0}),
        tokenizer=cuts.tokenizer(name),
        raw=[shard.source for shard in describe_shards(paths, data.reading, run=command.run)],
        run=command.run,
    )

"""What a recipe says of how raw shards are read."""

from dataclasses import dataclass

from errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the samples of raw shards are read: `[data]` of a recipe, as far as it decides what a sample is.

    Attributes:
        dialect: which texts count, see `DataConfig.dialect`.
        image_column: of rows, the column with the image or its path; None finds it by type and name.
        text_column: of rows the column, of files the member or field of the JSON that is the text; None is the first of
            `TEXT_FIELDS`.
    """

    dialect: str = "auto"
    image_column: str | None = None
    text_column: str | None = None


AS_IT_COMES = Reading()


class UnreadableShardError(UserError):
    """A file or folder is no raw shard, or one whose samples cannot be read by place; names it."""

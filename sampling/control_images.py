"""Images that lead what is drawn: looked at before anything is drawn, and cut to its size as features cut images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from errors import MissingFileError, UserError
from pipelines.raw.images import Crop, SampleReject, decode_image, image_size, plan_crop, resize_and_crop
from pipelines.recipe import DataConfig
from pipelines.store.files import sha256_file

if TYPE_CHECKING:
    from PIL import Image

KEY = "sampling.control"
MAX_PIXELS: int = DataConfig.model_fields["max_pixels"].default


@dataclass(frozen=True, kw_only=True)
class ControlImage:
    """A file of an image that leads what is drawn.

    Attributes:
        path: of the file.
        identity: hash of its bytes.
        width, height: in pixels, turned as it is shown.
    """

    path: Path
    identity: str
    width: int
    height: int

    @property
    def aspect_ratio(self) -> float:
        """Width / height."""
        return self.width / self.height

    def decode(self) -> Image.Image:
        """Return its pixels, as features decode images; raises as `open_control_image` does."""
        data = _read(self.path)
        try:
            return decode_image(data, max_pixels=MAX_PIXELS)
        except SampleReject as reject:
            raise _refusal(self.path, reject) from None

    def plan_crop(self, width: int, height: int) -> Crop:
        """Return how it is resized and cut to a size in pixels.

        Raises:
            UserError: it is a line, of which next to nothing would be left.
        """
        try:
            return plan_crop(self.width, self.height, width, height, max_pixels=MAX_PIXELS)
        except SampleReject as reject:
            raise _refusal(self.path, reject) from None

    def cut(self, width: int, height: int) -> Image.Image:
        """Return it resized to cover a size in pixels and cut in the middle; raises as `decode` does."""
        self.plan_crop(width, height)
        return resize_and_crop(self.decode(), width, height, max_pixels=MAX_PIXELS)[0]

    def describe_crop(self, width: int, height: int) -> str:
        """Return what is done to it to have a size in pixels, in words."""
        if (self.width, self.height) == (width, height):
            return f"{self.width}x{self.height}, as what is drawn"
        crop = self.plan_crop(width, height)
        said = f"{self.width}x{self.height}, resized to {crop.resized_width}x{crop.resized_height}"
        if (crop.resized_width, crop.resized_height) == (width, height):
            return said
        return f"{said} and cut in the middle to {width}x{height}"


def open_control_image(path: Path) -> ControlImage:
    """Look at a file that leads what is drawn: what is in front of its pixels.

    Raises:
        MissingFileError: it does not exist.
        UserError: it is no image, or one that features would not take either; names the file.
    """
    if not path.exists():
        raise MissingFileError(f"{KEY} {path} does not exist")
    data = _read(path)
    try:
        width, height = image_size(data, max_pixels=MAX_PIXELS)
    except SampleReject as reject:
        raise _refusal(path, reject) from None
    return ControlImage(path=path.absolute(), identity=f"sha256:{sha256_file(path)}", width=width, height=height)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise UserError(f"{KEY} {path} is a folder: name an image in it") from None
    except OSError as error:
        raise UserError(f"{KEY} {path} cannot be read: {error.strerror or error}") from None


def _refusal(path: Path, reject: SampleReject) -> UserError:
    return UserError(f"{KEY} {path} cannot lead what is drawn: {reject}")

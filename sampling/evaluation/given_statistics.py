"""Mean and covariance of a reference set from a file: the `.npz` of pytorch-fid, clean-fid and ADM."""

import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import MissingFileError, UserError
from pipelines.as_typed import typed_path
from pipelines.store.files import sha256_file
from sampling.evaluation.distances import Gaussian

SUFFIX = ".npz"
KEYS = ("mu", "sigma")  # of pytorch-fid and clean-fid; ADM's reference batches have them beside images
INCEPTION_WIDTH = 2048
# Of a covariance that went through float32.
ASYMMETRY = 1e-4
REMARK = "what network, resizer, crop and how many images the statistics are of is not in their file"


@dataclass(frozen=True, kw_only=True)
class GivenStatistics:
    """A reference set of which there are no images here.

    Attributes:
        name: as the recipe has it.
        identity: SHA-256 of the file.
        gaussian: its mean and covariance; of how many images nobody knows, which is 0.
    """

    name: str
    identity: str
    gaussian: Gaussian


def is_statistics(reference: str) -> bool:
    """Whether `evaluation.reference` names such a file, by its extension."""
    return reference.endswith(SUFFIX)


def read_statistics(reference: str, *, run: Path) -> GivenStatistics:
    """Read the file of `evaluation.reference`.

    Raises:
        MissingFileError: it is not there.
        UserError: it is damaged, or holds no statistics of Inception's 2048 features; names what is wrong.
    """
    path = typed_path(reference.replace("{run}", str(run)))
    if not path.is_file():
        raise MissingFileError(f"evaluation.reference {path} does not exist")
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
            missing = [key for key in KEYS if key not in arrays]
            if missing:
                found = ", ".join(arrays.files) or "nothing"
                raise UserError(f"evaluation.reference {path} has no array {missing[0]!r}, but {found}")
            mean, covariance = (np.asarray(arrays[key], dtype=np.float64) for key in KEYS)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"evaluation.reference {path} is no readable {SUFFIX} file: {error}") from None
    width = INCEPTION_WIDTH
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise UserError(
            f"evaluation.reference {path}: mu is {list(mean.shape)} and sigma {list(covariance.shape)}, but those of "
            f"Inception are [{width}] and [{width}, {width}]"
        )
    scale = np.abs(covariance).max()
    if not np.isfinite(mean).all() or not np.abs(covariance - covariance.T).max() <= ASYMMETRY * scale:
        raise UserError(f"evaluation.reference {path}: mu or sigma is not finite, or sigma not symmetric")
    if covariance.diagonal().min() < 0:
        raise UserError(f"evaluation.reference {path}: sigma has a negative variance, {covariance.diagonal().min():g}")
    return GivenStatistics(
        name=str(path),
        identity="sha256:" + sha256_file(path),
        gaussian=Gaussian(mean=mean, covariance=covariance, num_images=0),
    )


def require_reference(network_keys: Iterable[str], statistics: GivenStatistics | None) -> None:
    """Refuse networks whose numbers need images of a reference, where there are none.

    Raises:
        UserError: there is such a network; names the recipe's key.
    """
    for key in network_keys:
        # CLIP alone has a number without a reference, its score.
        if key == "clip" or (key == "inception" and statistics is not None):
            continue
        if statistics is None:
            raise UserError(f"evaluation.{key} is set, but evaluation.reference is not: set both or none")
        raise UserError(
            f"evaluation.{key} is set, but evaluation.reference {statistics.name} has statistics of Inception's "
            "features alone: name its images, or leave that network out"
        )

"""What a sample says about the whole set: the standard error of every number.

A sample is drawn without replacement, each row alike (`sample_sources`). Two kinds of numbers come of it.

Means and shares, such as nouns per image, estimate those of the whole set. Their errors have closed forms (Cochran,
"Sampling Techniques", chapters 2 and 6), with the factor 1 - n/N for a sample of n from N.

DN, VN and VN/DN depend on how much text was read and are *not* those of the whole set: they are the numbers of n
rows, and their error says how much another n rows would differ. Its size is taken from the sample itself: from
random halves and quarters of the sample, whose spread is that of rows drawn without replacement from n, and the step
from a quarter to a half is repeated once, to n.

Rows are what is drawn, so how many of them are captions differs between samples as well: every total, DN and VN too,
varies with it.
"""

# n rows drawn, N rows in the set, k of the n are captions, T nouns in them, D distinct ones

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataset_stats.set_rows import SetRows

NUM_SUBSAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A set's sample, and the standard errors of its numbers.

    Attributes:
        num_samples: samples in the whole set.
        num_drawn: samples drawn of them.
        errors: standard error by name of the number, as in `SetMeasures.errors`.
        whole_captions: captions in the whole set, estimated, and the standard error.
        whole_total_nouns: total nouns of the whole set, estimated, and the standard error.
        rate_errors: by noun, the standard error of its occurrences per caption.
    """

    num_samples: int
    num_drawn: int
    errors: dict[str, float]
    whole_captions: tuple[float, float]
    whole_total_nouns: tuple[float, float]
    rate_errors: dict[str, float] = field(repr=False)


def estimate_set(
    of_set: SetRows,
    *,
    num_samples: int,
    seed: int,
    valid_threshold: int,
    singular: Callable[[str], str] | None,
) -> Estimate:
    """Standard errors of a sampled set's numbers.

    Args:
        of_set: its rows, with a column `nouns`.
        num_samples: samples in the whole set.
    """
    rows = pa.concat_tables([of_set.read(shard) for shard in range(len(of_set.files))])
    captions = rows.filter(pc.field("reject").is_null())
    unread = max(1 - len(rows) / num_samples, 0.0)
    errors = {name: error * unread**0.5 for name, error in _mean_errors(rows, captions).items()}
    nouns = captions["nouns"].combine_chunks()
    owners = nouns.value_parent_indices().to_numpy()  # int64 [T]
    words = nouns.flatten().dictionary_encode()
    codes = words.indices.to_numpy()  # int32 [T]
    distinct = words.dictionary.to_pylist()
    rng = np.random.default_rng(seed)
    kinds = {"": np.arange(len(distinct))}
    if singular is not None:
        kinds["folded_"] = np.unique([singular(noun) for noun in distinct], return_inverse=True)[1]
    for prefix, of_noun in kinds.items():
        # Captions stand for the first rows: which numbers the rejects have does not matter.
        spread = _distinct_errors((of_noun[codes], owners, len(rows)), valid_threshold=valid_threshold, rng=rng)
        errors |= {f"{prefix}{name}": error * unread**0.5 for name, error in spread.items()}
    rates = _rate_errors((codes, owners, len(captions)), len(distinct)) * unread**0.5
    return Estimate(
        num_samples=num_samples,
        num_drawn=len(rows),
        errors=errors,
        whole_captions=_total(rows["reject"].is_null().to_numpy(), num_samples, unread),
        whole_total_nouns=_total(_nouns_per_row(rows), num_samples, unread),
        rate_errors=dict(zip(distinct, rates.tolist(), strict=True)),
    )


def _mean_errors(rows: pa.Table, captions: pa.Table) -> dict[str, float]:
    """Errors of the means and shares, for a set without end."""
    nouns = captions["num_nouns"].to_numpy()
    errors = {
        "total_nouns": _mean_error(_nouns_per_row(rows)) * len(rows),
        "nouns_per_image": _mean_error(nouns),
        "tokens_per_caption": _mean_error(captions["num_tokens"].to_numpy()),
        "characters_per_caption": _mean_error(captions["num_characters"].to_numpy()),
        "boilerplate_fraction": _mean_error(captions["is_boilerplate"].to_numpy(zero_copy_only=False)),
    }
    flags = captions["flags"].to_pylist()
    for flag in sorted({flag for found in flags for flag in found}):
        errors[f"flag_fraction.{flag}"] = _mean_error(np.array([flag in found for found in flags]))
    languages = captions["language"].to_numpy()
    for language in sorted(set(languages.tolist())):
        errors[f"language_fraction.{language}"] = _mean_error(languages == language)
    rejects = rows["reject"].to_pylist()
    for reason in sorted({reason for reason in rejects if reason}):
        errors[f"reject_fraction.{reason}"] = _mean_error(np.array([found == reason for found in rejects]))
    if "num_text_tokens" in captions.column_names:
        lengths = captions["num_text_tokens"].to_numpy()
        errors["text_tokens_per_caption"] = _mean_error(lengths)
        for column in captions.column_names:
            if column.startswith("nouns_lost_"):
                limit = column.removeprefix("nouns_lost_")
                errors[f"over_limit_fraction.{limit}"] = _mean_error(lengths > int(limit))
                errors[f"nouns_lost_fraction.{limit}"] = _ratio_error(captions[column].to_numpy(), nouns)
    return errors


def _nouns_per_row(rows: pa.Table) -> np.ndarray:
    """Int32 [n]: rejects have none."""
    return rows["num_nouns"].fill_null(0).to_numpy()


def _mean_error(values: np.ndarray) -> float:
    """s / sqrt(k)."""
    return float(values.astype(np.float64).std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def _ratio_error(parts: np.ndarray, wholes: np.ndarray) -> float:
    """Of sum(parts) / sum(wholes): the error of the mean of the residuals, over the mean of the wholes."""
    if not wholes.sum():
        return 0.0
    return _mean_error(parts - wholes * (parts.sum() / wholes.sum())) / float(wholes.mean())


def _total(values: np.ndarray, num_samples: int, unread: float) -> tuple[float, float]:
    return float(values.mean() * num_samples), _mean_error(values) * num_samples * unread**0.5


def _rate_errors(drawn: tuple[np.ndarray, np.ndarray, int], num_distinct: int) -> np.ndarray:
    codes, owners, num_captions = drawn
    pairs, times = np.unique(owners * max(num_distinct, 1) + codes, return_counts=True)
    squares = np.bincount(pairs % max(num_distinct, 1), weights=times.astype(np.float64) ** 2, minlength=num_distinct)
    rates = np.bincount(codes, minlength=num_distinct) / max(num_captions, 1)
    variances = squares / max(num_captions, 1) - rates**2
    return np.sqrt(np.maximum(variances, 0) / max(num_captions - 1, 1))


def _distinct_errors(
    drawn: tuple[np.ndarray, np.ndarray, int], *, valid_threshold: int, rng: np.random.Generator
) -> dict[str, float]:
    """Errors of DN, VN and VN/DN, for a set without end."""
    kinds, owners, num_rows = drawn
    spreads = []
    for size in (num_rows // 4, num_rows // 2):
        numbers = np.zeros((NUM_SUBSAMPLES, 3))
        for row in numbers:
            chosen = np.zeros(num_rows, dtype=np.bool_)
            chosen[rng.permutation(num_rows)[:size]] = True
            counts = np.bincount(kinds[chosen[owners]])
            dn, vn = (counts > 0).sum(), (counts > valid_threshold).sum()
            row[:] = dn, vn, vn / max(dn, 1)
        # Drawn from n rows, `size` of them vary less than if drawn from a set without end.
        spreads.append(numbers.var(axis=0, ddof=1) / (1 - size / max(num_rows, 1)))
    quarter, half = spreads
    # A mean's variance halves as rows double, a total's doubles; these numbers are in between.
    growth = np.clip(np.divide(half, quarter, out=np.ones(3), where=quarter > 0), 0.5, 2.0)
    dn, vn, ratio = np.sqrt(half * growth).tolist()
    return {"distinct_nouns": dn, "valid_distinct_nouns": vn, "valid_fraction": ratio}

"""The parts of `make bench-gpu`, in the order in which they run, with the bars that their figures are held to.

A part is a function of its own name in `module`, imported in its own process only: it takes a `Size` and returns
figures whose keys begin with the part's name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Figure = float | str | bool | None
Figures = dict[str, Figure]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a part runs: tiny on a CPU, for its code path alone, or as the bars have it on a CUDA device.

    `keep` hands figures over before the part has ended; they stay should it fail or run out of time.
    """

    is_tiny: bool
    keep: Callable[[Figures], None]

    @property
    def device(self) -> str:
        """Where the part runs, as torch names it."""
        return "cpu" if self.is_tiny else "cuda"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a figure has to reach: `at_least` or `at_most`, whichever is given."""

    key: str
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        return f"{self.key} {'≥' if self.at_most is None else '≤'} {self._bound}"

    @property
    def _bound(self) -> float:
        bound = self.at_least if self.at_most is None else self.at_most
        assert bound is not None
        return bound

    def verdict(self, figures: Mapping[str, Figure]) -> str:
        """Say "met" or "short", and "open" where the figure is missing."""
        value = figures.get(self.key)
        if not isinstance(value, int | float):
            return "open"
        reaches = operator.ge if self.at_most is None else operator.le
        return "met" if reaches(value, self._bound) else "short"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part: its name, the module that has a function of that name, and its bars."""

    name: str
    module: str
    bars: tuple[Bar, ...]


PARTS: tuple[Part, ...] = (
    Part(
        name="train_256",
        module="benchmarks.gpu.training",
        bars=(
            Bar(key="train_256_ratio_compiled", at_least=1.15),
            Bar(key="train_256_ratio_eager", at_least=1.0),
            Bar(key="train_256_mfu", at_least=0.5),
        ),
    ),
    Part(
        name="train_1024",
        module="benchmarks.gpu.training",
        bars=(Bar(key="train_1024_ratio_compiled", at_least=1.2), Bar(key="train_1024_mfu", at_least=0.44)),
    ),
    Part(name="loop_256", module="benchmarks.gpu.loop", bars=(Bar(key="loop_256_ratio", at_least=0.97),)),
    *(
        Part(
            name=name,
            module="benchmarks.gpu.sampling",
            bars=(
                Bar(key=f"{name}_ratio_eager", at_least=1.4),
                Bar(key=f"{name}_ratio_compiled", at_least=1.1),
                Bar(key=f"{name}_distance_ratio", at_most=1.0),
            ),
        )
        for name in ("sample_1024", "sample_1024_4")
    ),
    Part(name="lcm_1024", module="benchmarks.gpu.sampling", bars=(Bar(key="lcm_1024_ratio", at_least=4.0),)),
    Part(
        name="caption_7b",
        module="benchmarks.gpu.captioning",
        bars=(
            Bar(key="caption_7b_ratio", at_least=6.0),
            Bar(key="caption_7b_share_of_bandwidth_32", at_least=0.55),
            Bar(key="caption_7b_share_of_bandwidth_96", at_least=0.55),
        ),
    ),
    Part(
        name="text_xxl",
        module="benchmarks.gpu.text",
        bars=(
            Bar(key="text_xxl_ratio", at_least=1.9),
            Bar(key="text_xxl_mfu", at_least=0.45),
            Bar(key="text_xxl_error_of_theirs", at_most=1.0),
        ),
    ),
    Part(name="latents", module="benchmarks.gpu.latents", bars=(Bar(key="latents_ratio", at_least=1.15),)),
    Part(name="fp8_256", module="benchmarks.gpu.products", bars=(Bar(key="fp8_256_ratio", at_least=1.1),)),
    Part(
        name="muon_256",
        module="benchmarks.gpu.muon",
        bars=(
            Bar(key="muon_256_share_of_step", at_most=0.18),
            Bar(key="muon_256_share_of_step_over_eight", at_most=0.03),
        ),
    ),
    Part(name="muon_loop_256", module="benchmarks.gpu.loop", bars=()),
    Part(name="train_512", module="benchmarks.gpu.training", bars=()),
    Part(name="heads64_256", module="benchmarks.gpu.training", bars=()),
)

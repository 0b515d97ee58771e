"""How much memory a rank has, and the micro-batches and activations that fit it.

Nothing here needs torch: the launcher says with it what to change where memory is short.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from errors import UserError
from pipelines.as_typed import typed_settings
from training.config import KeepActivations, StageTraining
from training.launch.reckoning import MAX_ZERO_STAGE, Demand

KEPT: tuple[KeepActivations, ...] = ("all", "products", "inputs")
# Of free memory, what is not given away: fragments (a CPU took up to 1.4 of what is reckoned), workspace, and others.
GPU_RESERVE, MACHINE_RESERVE = 0.08, 0.3
# With so many image tokens at once a GPU is busy; beyond it larger micro-batches gain less than recomputing costs.
ENOUGH_TOKENS = 8192
# What takes less of a GPU for moments and average, that which costs least first: the average goes over the bus in each
# step, moments in 8 bits are rounded, an optimizer on the CPU is slow.
SAVING: tuple[Mapping[str, Any], ...] = (
    {"offload": "average"},
    {"optimizer": "adamw8bit"},
    {"offload": "average", "optimizer": "adamw8bit"},
    {"offload": "optimizer", "zero_stage": 0},
)
# Under ZeRO 0 and 1 micro-batches of bf16 are summed in bf16; 64 of them give a gradient about 1% short.
MAX_SUMMED_IN_BF16 = 8


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How a rank takes its part of a batch, and what its memory then holds.

    Attributes:
        parts: bytes by what they are for.
        available_bytes: of the rank; `basis` says how activations are known.
        is_kept: whether it was chosen before and is still good.
        previews: bytes by what they are for while previews are drawn between steps; none where there are none.
    """

    num_micro_batches: int
    micro_batch_size: int
    kept: KeepActivations
    parts: dict[str, int]
    available_bytes: int
    basis: str
    is_kept: bool = False
    previews: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """What the memory holds at its fullest."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.total_bytes <= self.available_bytes


def choose_shares(
    demand: Demand, *, available_bytes: int, basis: str, former: tuple[int, KeepActivations] | None = None
) -> Shares:
    """Return what the recipe says or, where it says auto, what fits.

    Kept is as much as leaves room for micro-batches of `ENOUGH_TOKENS`, or of a rank's whole share; where nothing does,
    the largest micro-batches that fit. What a stage was begun with, `former`, stays as long as it fits.

    Raises:
        UserError: nothing that the recipe leaves open fits; says what does not, and what to change.
    """
    settings = demand.settings
    candidates, modes = _open_choices(demand)
    is_open = "auto" in (settings.gradient_accumulation_steps, settings.keep_activations)

    def shares(number: int, kept: KeepActivations) -> Shares:
        return _shares(demand, number, kept, available_bytes=available_bytes, basis=basis)

    if former is not None and former[0] in candidates and former[1] in modes:
        kept = shares(*former)
        if kept.fits or not is_open:
            return replace(kept, is_kept=is_open)
    if not is_open:
        return shares(candidates[0], modes[0])
    found = _largest_shares(demand, available_bytes=available_bytes, basis=basis)
    if found is None:
        raise UserError(_describe_lack(demand, available_bytes=available_bytes, basis=basis))
    return found


def _open_choices(demand: Demand) -> tuple[list[int], tuple[KeepActivations, ...]]:
    """Return the numbers of micro-batches, from few to many, and what may be kept, from much to little."""
    settings = demand.settings
    candidates = [settings.num_micro_batches]
    if settings.gradient_accumulation_steps == "auto":
        candidates = _divisors(demand.share)
    return candidates, KEPT if settings.keep_activations == "auto" else (settings.kept_activations,)


def _shares(demand: Demand, number: int, kept: KeepActivations, *, available_bytes: int, basis: str) -> Shares:
    return Shares(
        num_micro_batches=number,
        micro_batch_size=demand.share // number,
        kept=kept,
        parts=demand.parts(number, kept),
        available_bytes=available_bytes,
        basis=basis,
    )


def _largest_shares(demand: Demand, *, available_bytes: int, basis: str) -> Shares | None:
    """Return what fits of all that the recipe leaves open, None if nothing does."""
    candidates, modes = _open_choices(demand)
    best: list[Shares] = []
    enough = min(ENOUGH_TOKENS, demand.share * demand.sample_tokens)
    for kept in modes:
        tried = (_shares(demand, number, kept, available_bytes=available_bytes, basis=basis) for number in candidates)
        found = next((shares for shares in tried if shares.fits), None)
        if found is not None and found.micro_batch_size * demand.sample_tokens >= enough:
            return found
        best += [] if found is None else [found]
    return max(best, key=lambda found: found.micro_batch_size, default=None)


def find_saving(demand: Demand, *, available_bytes: int, basis: str) -> tuple[Mapping[str, Any], Shares] | None:
    """Return the settings of `SAVING` that cost least among those that make a stage fit, and what fits then."""
    settings = demand.settings
    is_alone = demand.num_ranks == 1 and settings.dtype == "bf16"
    for update in SAVING:
        changed = {name: value for name, value in update.items() if getattr(settings, name) != value}
        if not changed or ("zero_stage" in update and not is_alone):
            continue
        tried = replace(demand, settings=settings.model_copy(update=changed))
        found = _largest_shares(tried, available_bytes=available_bytes, basis=basis)
        if found is not None:
            return changed, found
    return None


def _divisors(number: int) -> list[int]:
    """Return the divisors of a number from 1 on, found up to its root: a batch may have any size that can be typed."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _describe_lack(demand: Demand, *, available_bytes: int, basis: str) -> str:
    settings, num_ranks = demand.settings, demand.num_ranks
    candidates, modes = _open_choices(demand)
    least = _shares(demand, candidates[-1], modes[-1], available_bytes=available_bytes, basis=basis)
    ways = [*_sharing_ways(settings, num_ranks=num_ranks), *ways_to_leave_open(settings)]
    saving = find_saving(demand, available_bytes=available_bytes, basis=basis)
    ways += saving_ways(settings, num_ranks=num_ranks) if saving is None else [_describe_saving(*saving)]
    ways.append("take more GPUs or a smaller resolution, or lower training.num_processes where ranks share a memory")
    return (
        f"even micro-batches of {least.micro_batch_size} with training.keep_activations = {least.kept!r} need "
        f"{describe_parts(least)}; {', or '.join(ways)}. "
        f"What is typed is tried all the same: training.gradient_accumulation_steps={least.num_micro_batches} "
        f"training.keep_activations={least.kept}"
    )


def _describe_saving(switches: Mapping[str, Any], found: Shares) -> str:
    """Return the switches as they are typed, and what fits with them."""
    typed = typed_settings({f"training.{name}": value for name, value in switches.items()})
    begins = " (in a stage that begins)" if switches.keys() & {"optimizer", "zero_stage"} else ""
    of = f"micro-batches of {found.micro_batch_size}, keeping {found.kept!r}"
    return f"add {typed}{begins}: {describe_bytes(found.total_bytes)} in {of}, which fits"


def ways_to_leave_open(settings: StageTraining) -> list[str]:
    """Return the typed keys that may be left out to have something chosen that takes less memory."""
    ways = []
    if settings.keep_activations not in ("auto", "inputs"):
        ways.append(f"leave training.keep_activations = {settings.keep_activations!r} out")
    if settings.gradient_accumulation_steps != "auto":
        ways.append(f"leave training.gradient_accumulation_steps = {settings.gradient_accumulation_steps} out")
    return ways


def saving_ways(settings: StageTraining, *, num_ranks: int) -> list[str]:
    """Return the switches that take less of a GPU for moments and average, the cheapest first, that are not on yet."""
    ways = []
    if settings.offload == "nothing":
        ways.append("set training.offload to 'average' (a GPU's alone)")
    if settings.optimizer == "adamw":
        ways.append("set training.optimizer to 'adamw8bit' in a stage that begins")
    is_alone = num_ranks <= 1 and settings.zero_stage == 0 and settings.dtype == "bf16"
    if settings.offload != "optimizer" and is_alone:
        ways.append("set training.offload to 'optimizer' (a GPU's alone)")
    return ways


def _sharing_ways(settings: StageTraining, *, num_ranks: int) -> list[str]:
    """Return how ranks may share more; a single one has nobody to share with."""
    can_share = settings.zero_stage < MAX_ZERO_STAGE and num_ranks > 1
    return [f"raise training.zero_stage = {settings.zero_stage}"] if can_share else []


def describe_parts(shares: Shares) -> str:
    """Return the bytes of a rank and what they are for, and what there is, in words."""
    total, room = describe_bytes(shares.total_bytes), describe_bytes(shares.available_bytes)
    return f"{total} a rank of {room} that it may take: {_list_parts(shares.parts)} ({shares.basis})"


def describe_preview_parts(shares: Shares) -> str:
    """Return the bytes of the first rank while previews are drawn, and what they are for, in words."""
    total = describe_bytes(sum(shares.previews.values()))
    return f"{total} while previews are drawn: {_list_parts(shares.previews)} (reckoned by shapes)"


def _list_parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {describe_bytes(size)}" for name, size in parts.items() if size)


def describe_bytes(num_bytes: float) -> str:
    """Return a size in decimal units, with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB" if num_bytes < 999.5 else f"{num_bytes:,.0f} TB"


def memory_advice(settings: StageTraining) -> str:
    """Return what to change where the memory is too small for a step, with the values that the keys have."""
    number = settings.gradient_accumulation_steps
    more = "set training.gradient_accumulation_steps above what it says was chosen"
    more = more if number == "auto" else f"raise training.gradient_accumulation_steps = {number}"
    parts = [f"{more} (smaller micro-batches)"]
    if settings.keep_activations != "inputs":
        parts.append(f"set training.keep_activations = {settings.keep_activations!r} to 'inputs'")
    if settings.zero_stage < MAX_ZERO_STAGE:
        parts.append(f"raise training.zero_stage = {settings.zero_stage}")
    parts += saving_ways(settings, num_ranks=settings.num_processes)
    parts.append(f"lower training.num_processes = {settings.num_processes} where ranks share a machine's memory")
    return ", or ".join(parts)


def machine_bytes() -> int:
    """Return the bytes of the machine's memory that are free: what Linux says, and what is left to this container."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    return min([free, *_container_bytes(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))])


def _container_bytes(groups: str, root: Path) -> Iterator[int]:
    """Yield what each control group around this process has left, of the second version and of the first.

    Args:
        groups: content of /proc/self/cgroup.
        root: where they are mounted. In a container its own group may be the root.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            folder = root / "memory"
        else:
            continue
        group = folder / path.strip("/")
        for place in (group, *group.parents):
            if place.is_relative_to(folder) and (place / names[0]).is_file():
                limit = (place / names[0]).read_text().strip()
                if limit.isdecimal():
                    yield max(0, int(limit) - _used_bytes(place, names[1], names[2]))


def _used_bytes(group: Path, usage: str, inactive: str) -> int:
    """Return what a control group has in use; pages of files that nobody has asked for lately are given up at need."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int((group / usage).read_text()) - int(stat.get(inactive, 0))

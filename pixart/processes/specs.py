"""Processes as they stand in `trainer.json`: their specs.

Nothing here needs torch; `make.py` makes a process of its spec, `scheduler_configs.py` reads those of diffusers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from errors import UserError

# The noise schedule of DiT and PixArt, in the words of diffusers' schedulers.
DDPM_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
# Where a folder of diffusers says how to draw, beside the folder of weights.
SCHEDULER_FOLDER = "scheduler"
SCHEDULER_FILE = "scheduler_config.json"
# Folders of weights, of a pipeline and of our checkpoints, beside which stands what belongs to the weights.
WEIGHT_FOLDERS = ("transformer", "model")
# What a network of flow is told at pure noise, as diffusers' schedulers have it.
FLOW_NUM_TIMES = 1000
# Solvers of each process; the first goes with all of them.
SOLVERS = {"ddpm": ("dpm-solver++", "iddpm", "sa-solver", "lcm"), "flow": ("dpm-solver++", "euler", "heun", "lcm")}
# Of flow whose network predicts the noise: the first two take flow's steps, the others ddpm's.
NOISE_FLOW_SOLVERS = ("dpm-solver++", "euler", "iddpm", "sa-solver")
# Of LCM, as published: steps of the teacher that a student is trained at, and what multiplies a timestep in the
# scalings by which a student's estimate at timestep 0 is what it sees (Luo et al. 2023).
LCM = "lcm"
LCM_TEACHER_STEPS = 50
LCM_TIMESTEP_SCALING = 10.0
# Of these scalings, too, and in diffusers' scheduler no setting.
LCM_SIGMA_DATA = 0.5
# Of flow, as settings of diffusers' DPM-Solver++: a step estimates the clean latents and adds noise to the next sigma.
FLOW_LCM_SAMPLER: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}
# Steps that a student is drawn with where nobody says it, and the most that it is made for.
STUDENT_STEPS, MOST_STUDENT_STEPS = 4, 8
# Guidance where nobody says it, the paper's.
USUAL_GUIDANCE = 4.5


def ddpm_spec(
    schedule: Mapping[str, Any] = DDPM_SCHEDULE,
    *,
    min_snr_gamma: float | None = None,
    times_density: Mapping[str, Any] | None = None,
    sampler: Mapping[str, Any] | None = None,
    student: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the spec of PixArt's own process: the network predicts the noise and, beside it, a variance.

    `times_density` holds `logit_mean` and `logit_std` of timesteps that are not all as likely in training, and
    `is_weighted`, whether losses make up for that.
    `sampler` holds settings of diffusers' DPM-Solver++, where they are not its defaults; `student` says of a network
    that was distilled what it was made for, as `lcm_student` gives it.
    """
    spec = {"name": "ddpm", "prediction": "noise", "schedule": dict(schedule)}
    spec = spec if times_density is None else spec | {"times_density": dict(times_density)}
    return _with_settings(spec, min_snr_gamma=min_snr_gamma, sampler=sampler, student=student)


def lcm_student(
    *,
    guidance: tuple[float, float] | float | None,
    num_teacher_steps: int = LCM_TEACHER_STEPS,
    timestep_scaling: float | None = LCM_TIMESTEP_SCALING,
    times: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Return what a spec says of a network distilled to few steps: a latent consistency model (Luo et al. 2023).

    Args:
        guidance: that is inside the weights, as a scale (1 = none): a number; the ends of a range where the network is
            told which; None where nobody says it.
        num_teacher_steps: equal steps of the schedule that it was trained at.
        timestep_scaling: see `LCM_TIMESTEP_SCALING`; None of process flow, whose estimates at sigma 0 are what is seen
            without any scalings.
        times: timesteps that it was trained to be drawn at, a falling list for each number of steps; None where they
            are those of the schedule.
    """
    scaling = {} if timestep_scaling is None else {"timestep_scaling": timestep_scaling}
    inside = list(guidance) if isinstance(guidance, tuple) else guidance
    student = {"method": LCM, "num_teacher_steps": num_teacher_steps, **scaling, "guidance": inside}
    return student if times is None else student | {"times": [list(steps) for steps in times]}


def flow_student(
    *, guidance: tuple[float, float] | float | None, num_teacher_steps: int = LCM_TEACHER_STEPS
) -> dict[str, Any]:
    """Return what a spec of flow says of a network distilled to few steps, as `lcm_student`."""
    return lcm_student(guidance=guidance, num_teacher_steps=num_teacher_steps, timestep_scaling=None)


def own_times(student: Mapping[str, Any], num_steps: int) -> list[int] | None:
    """Return the timesteps that a student was trained to be drawn at in so many steps; None where it has none."""
    return next((times for times in student.get("times", []) if len(times) == num_steps), None)


def described_steps(student: Mapping[str, Any]) -> str:
    """Return the steps that a student was trained to be drawn in, in words."""
    if "times" not in student:
        return f"1 to {min(MOST_STUDENT_STEPS, student['num_teacher_steps'])} steps"
    schedules = sorted(student["times"], key=len)
    return " or ".join(
        f"{len(times)} step{'s' * (len(times) > 1)} at {', '.join(map(str, times))}" for times in schedules
    )


def has_trained_steps(student: Mapping[str, Any], num_steps: int, times: Sequence[int] | None) -> bool:
    """Whether a student was trained to be drawn in so many steps, at `times` where it has its own."""
    if "times" in student:
        return times is not None and list(times) in student["times"]
    return num_steps <= min(MOST_STUDENT_STEPS, student["num_teacher_steps"])


def student_of(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a process says of a network that was distilled to few steps, None of any other."""
    return spec.get("student")


def with_student_of(process: Mapping[str, Any], belongs_to: Mapping[str, Any]) -> dict[str, Any]:
    """Return a process as an adapter makes it by what its file says of itself: a student's, where it was distilled."""
    trained = belongs_to.get("process", {})
    if student_of(process) is not None or not is_spec(trained) or (student := student_of(trained)) is None:
        return dict(process)
    if "network_schedule" in process:  # a student of ddpm, which is drawn as one
        return ddpm_spec(process["network_schedule"], student=student)
    return {**process, "student": student}


def guidance_range(student: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the guidance that a student is told one of; None where it is told none."""
    guidance = student["guidance"]
    return (guidance[0], guidance[1]) if isinstance(guidance, list | tuple) else None


def flow_spec(
    *,
    shift: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    sampler: Mapping[str, Any] | None = None,
    student: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the spec of rectified flow, of which the network predicts the velocity.

    `sampler` is as in `ddpm_spec`, and so is `student`, as `flow_student` gives it.
    """
    schedule = {"shift": shift, "logit_mean": logit_mean, "logit_std": logit_std}
    spec = {"name": "flow", "prediction": "velocity", "schedule": schedule}
    return _with_settings(spec, sampler=sampler, student=student)


def noise_flow_spec(
    *,
    shift: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    network_schedule: Mapping[str, Any] = DDPM_SCHEDULE,
) -> dict[str, Any]:
    """Return the spec of rectified flow whose network predicts the noise, at the timesteps of a schedule of ddpm."""
    spec = flow_spec(shift=shift, logit_mean=logit_mean, logit_std=logit_std)
    return {**spec, "prediction": "noise", "network_schedule": dict(network_schedule)}


def network_schedule_of(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the noise schedule whose timesteps a network is told; None of one that predicts the velocity."""
    return spec["schedule"] if spec["name"] == "ddpm" else spec.get("network_schedule")


def predicts_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether networks of both processes say the same of what they see, so that either can go on as the other."""
    return _prediction(one) == _prediction(other)


def process_title(spec: Mapping[str, Any]) -> str:
    """Return what people call a process: its name, and what its network predicts where that is not the usual."""
    is_usual = spec["name"] == "ddpm" or _prediction(spec) == "velocity"
    return spec["name"] if is_usual else f"{spec['name']} of networks that predict the noise"


def _prediction(spec: Mapping[str, Any]) -> str:
    """Return what the network predicts, also by a spec that has nothing but a name."""
    return spec.get("prediction", "velocity" if spec["name"] == "flow" else "noise")


def solvers_of(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the solvers that go with a process, the usual one first."""
    return NOISE_FLOW_SOLVERS if "network_schedule" in spec else SOLVERS[spec["name"]]


def usual_steps(student: Mapping[str, Any]) -> int:
    """Return the steps that a student is drawn with where nobody says it."""
    if "times" in student:
        return max(map(len, student["times"]))
    return min(STUDENT_STEPS, student["num_teacher_steps"])


def clamped_guidance(student: Mapping[str, Any], wanted: float = USUAL_GUIDANCE) -> float | None:
    """Return the guidance that a student is drawn with: of its range what is nearest to the one wanted, else its own.

    None where nobody says what is inside.
    """
    if (ends := guidance_range(student)) is None:
        return student["guidance"]
    return min(max(wanted, ends[0]), ends[1])


def _with_settings(
    spec: dict[str, Any],
    *,
    min_snr_gamma: float | None = None,
    sampler: Mapping[str, Any] | None,
    student: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Add what most processes do without; their specs stay those of before these settings came."""
    spec = spec if min_snr_gamma is None else spec | {"min_snr_gamma": min_snr_gamma}
    spec = spec | {"sampler": dict(sampler)} if sampler else spec
    return spec if student is None else spec | {"student": dict(student)}


def is_spec(value: Any) -> bool:
    """Whether something that was read describes a process that is known here."""
    known = {(spec["name"], spec["prediction"]): spec for spec in (ddpm_spec(), flow_spec(), noise_flow_spec())}
    if not isinstance(value, Mapping) or (kind := (value.get("name"), value.get("prediction"))) not in known:
        return False
    wanted = known[kind]
    schedules = {name: value.get(name) for name in ("schedule", "network_schedule") if name in wanted}
    are_whole = all(
        isinstance(schedule, Mapping) and schedule.keys() >= wanted[name].keys() for name, schedule in schedules.items()
    )
    has_student = "student" not in value or _is_student(value["student"], process=value["name"])
    return are_whole and has_student


def student_of_process(name: str, *, guidance: tuple[float, float] | float | None = None) -> dict[str, Any]:
    """Return what a spec of the process says of a student with the usual settings."""
    return flow_student(guidance=guidance) if name == "flow" else lcm_student(guidance=guidance)


def _is_student(value: Any, *, process: str) -> bool:
    known = student_of_process(process)
    if not isinstance(value, Mapping) or value.get("method") != LCM:
        return False
    if value.keys() - {"times"} != known.keys() or not _are_times(value.get("times", [])):
        return False
    steps, guidance = value["num_teacher_steps"], value["guidance"]
    scales = guidance if isinstance(guidance, list) and len(guidance) == 2 else [] if guidance is None else [guidance]
    numbers = [value.get("timestep_scaling", LCM_TIMESTEP_SCALING), *scales]
    are_numbers = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
    return isinstance(steps, int) and steps > 0 and are_numbers and min(numbers) > 0 and scales == sorted(scales)


def _are_times(value: Any) -> bool:
    """Whether something that was read is lists of whole numbers, none of them empty."""
    if not isinstance(value, list) or not all(isinstance(steps, list) and steps for steps in value):
        return False
    return all(isinstance(time, int) and not isinstance(time, bool) for steps in value for time in steps)


def spec_of_trainer(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the process of a `trainer.json`; those written when there was but one name its schedule alone."""
    return trainer["process"] if "process" in trainer else ddpm_spec(trainer.get("schedule", DDPM_SCHEDULE))


def num_passes(solver: str, num_steps: int) -> int:
    """Return how often a solver asks the network for an image, guidance not counted."""
    return 2 * num_steps - 1 if solver == "heun" else num_steps


def describe_unused_settings(spec: Mapping[str, Any], solver: str) -> str | None:
    """Return which settings of DPM-Solver++ a process brings that `solver` does not take, None if there are none."""
    settings = spec.get("sampler")
    if not settings or solver == solvers_of(spec)[0]:
        return None
    said = ", ".join(f"{key} {value}" for key, value in settings.items())
    return f"its scheduler sets {solvers_of(spec)[0]} to {said}: sampling.solver {solver} takes none of that"


def require_solver(
    spec: Mapping[str, Any],
    solver: str,
    *,
    num_steps: int,
    times: Sequence[int] | None = None,
    checkpoint: str = "the network",
) -> None:
    """Refuse a solver of another process than the checkpoint's, and steps or their times that it cannot take.

    Raises:
        UserError: the process has other solvers; iddpm is asked for a single step, which would begin and end at
            timestep 0; lcm for more than its students are trained at; another one for all timesteps, of which diffusers
            would then take one twice and divide by nothing. Or times are given to another solver than lcm, or are not
            those of the schedule with noise, as many as there are steps.
    """
    solvers = solvers_of(spec)
    if solver not in solvers:
        raise UserError(
            f"sampling.solver = {solver!r} does not go with {checkpoint}, which is of process {process_title(spec)}: "
            f"{', '.join(solvers)} do"
        )
    if times is not None and solver != LCM:
        raise UserError(f"sampling.times {list(times)} are those of lcm's steps, but sampling.solver is {solver!r}")
    if solver == "iddpm" and num_steps == 1:
        raise UserError("sampling.num_steps 1: iddpm needs at least 2 steps")
    if times is not None:
        _require_times(times, spec, num_steps=num_steps)
    schedule = network_schedule_of(spec)
    if schedule is None:
        return
    most = (student_of(spec) or lcm_student(guidance=None))["num_teacher_steps"]
    if solver == LCM and num_steps > most:
        raise UserError(f"sampling.num_steps {num_steps}: lcm draws in 1 to {most} steps, those of a student's teacher")
    num_timesteps = schedule["num_train_timesteps"]
    if solver != "iddpm" and num_steps >= num_timesteps:
        raise UserError(f"sampling.num_steps {num_steps}: {solver} takes fewer than the schedule's {num_timesteps}")


def _require_times(times: Sequence[int], spec: Mapping[str, Any], *, num_steps: int) -> None:
    is_flow = spec["name"] == "flow"
    num_timesteps = FLOW_NUM_TIMES if is_flow else spec["schedule"]["num_train_timesteps"]
    if len(times) != num_steps:
        raise UserError(f"sampling.times {list(times)} are {len(times)} steps, but sampling.num_steps is {num_steps}")
    if max(times) >= num_timesteps:
        raise UserError(f"sampling.times {list(times)} are not all below the schedule's {num_timesteps}")
    if is_flow and min(times) == 0:
        raise UserError(f"sampling.times {list(times)} end at 0, where images of process flow have no noise")

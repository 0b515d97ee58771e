"""Distribution matching: its loss by the published formulas, its critic, resume and ranks, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training_consistency import SHAPE, Linear, consistency
from test_training_lora import open_job
from test_training_objective import make_batch
from test_training_parts import Case, losses, random_network, train_three
from torch import Tensor
from training_run import make_run, metrics

from errors import UserError
from pixart.convert import load_diffusers
from pixart.model import PixArt
from pixart.processes.ddpm import DDPM
from pixart.processes.specs import own_times, usual_steps
from sampling.trained_model import open_run_model
from training.objectives.matching import DistributionMatching
from training.objectives.noises import more_noise
from training.objectives.objective import Frozen, Trained
from training.stages.critics import critic_of
from training.stages.networks import blank_copy, count_parameters, count_weights
from training.stages.starts import objective_networks

MATCHING = {"objective": "distribution_matching", "adam_betas": [0.0, 0.99], "learning_rate": 1e-3}
# ZeRO stage, precision.
KINDS = ((0, "fp32"), (1, "bf16"), (2, "fp32"))


class WithCritic(Linear):
    """Keeps what it has seen, and at which times."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.critic = Linear(seed + 10)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, noisy: Tensor, times: Tensor, *told: Any, **others: Any) -> Tensor:
        self.seen.append((noisy.detach(), times))
        return super().forward(noisy, times, *told, **others)


def scalings(time: int) -> tuple[float, float]:
    """How much of an estimate is what is seen, and what the network says (LCM eq. 9)."""
    scaled = time / 0.1
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5


def matching(*schedules: list[int]) -> DistributionMatching:
    return DistributionMatching(student=consistency(3.0, 3.0), schedules=schedules, compared=(20, 980))


def test_the_move_and_the_critics_loss_are_the_published_ones() -> None:
    """DMD: the gradient of an image is (fake - real) / mean |image - real|; the critic learns noise of images."""
    batch = make_batch(has_text=True)
    student, teacher = WithCritic(1), Linear(3)
    objective = matching([599])
    losses = objective.loss({"network": student, "teacher": teacher}, batch)
    process = DDPM()
    at = torch.full((4,), 599)

    def clean(network: Linear, x: Tensor, times: Tensor, text: Any) -> Tensor:
        output = network(x, times, text, size=None)[:, :4]
        signal = process.alphas_cumprod[times][:, None, None, None]
        return (x - (1 - signal).sqrt() * output) / signal.sqrt()

    null = objective.student.without_text(batch).text
    with torch.no_grad():
        image = scalings(599)[0] * batch.noise + scalings(599)[1] * clean(student, batch.noise, at, batch.text)
        times = (20 + batch.timestep_draws * 960).long()
        noisy = process.noisy(image, more_noise(batch, "compared"), times)
        led, alone = (clean(teacher, noisy, times, text) for text in (batch.text, null))
        real = alone + 3.0 * (led - alone)
        gradient = (clean(student.critic, noisy, times, batch.text) - real) / (image - real).abs().mean(
            (1, 2, 3), keepdim=True
        )
        noise = more_noise(batch, "critic")
        later = ((batch.timestep_draws * 960 % 1) * 1000).long()
        found = student.critic(process.noisy(image, noise, later), later, batch.text, size=None)[:, :4]
    torch.testing.assert_close(losses.total, 0.5 * gradient.square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    (moved,) = torch.autograd.grad(losses.total.sum(), [student.weight], retain_graph=True)
    again = scalings(599)[0] * batch.noise + scalings(599)[1] * clean(student, batch.noise, at, batch.text)
    (expected,) = torch.autograd.grad((gradient * again).mean((1, 2, 3)).sum(), [student.weight])
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6, msg="from what the critic sees to the teacher's")
    assert losses.critic is not None
    torch.testing.assert_close(losses.critic, (found - noise).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    assert objective.networks == {"network": Trained(critic="teacher"), "teacher": Frozen()}


def test_each_of_both_has_a_gradient_of_its_own_loss_alone() -> None:
    batch = make_batch(has_text=True)

    def gradients(part: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        student, teacher = WithCritic(1), Linear(3)
        losses = matching([899, 499]).loss({"network": student, "teacher": teacher}, batch)
        getattr(losses, part).sum().backward()
        return student.weight.grad, student.critic.weight.grad, teacher.weight.grad

    own, critic, teacher = gradients("total")
    assert own is not None and own.any() and critic is None and teacher is None
    own, critic, teacher = gradients("critic")
    assert own is None and critic is not None and critic.any() and teacher is None


def test_later_steps_begin_with_the_students_own_image_and_new_noise() -> None:
    batch, process = replace(make_batch(has_text=True), step=0), DDPM()
    drawn = set()
    for step in range(12):
        student, drawing = WithCritic(1), replace(batch, step=step)
        matching([599], [899, 499]).loss({"network": student, "teacher": Linear(3)}, drawing)
        at = tuple(int(times[0]) for _, times in student.seen)
        drawn.add((at, tuple(call["has_gradient"] for call in student.calls)))
        assert torch.equal(student.seen[0][0], batch.noise)
        if at == (899, 499):
            with torch.no_grad():
                said = Linear.forward(student, batch.noise, torch.full((4,), 899), batch.text, size=None)
            clean = process.clean(said, batch.noise, torch.full((4,), 899))
            image = scalings(899)[0] * batch.noise + scalings(899)[1] * clean
            later = process.noisy(image, more_noise(drawing, "step 0"), torch.full((4,), 499))
            torch.testing.assert_close(student.seen[1][0], later, rtol=1e-4, atol=1e-5)
    expected = {((599,), (True,)), ((899,), (True,)), ((899, 499), (False, True))}
    assert drawn == expected, "only the last step has a gradient"
    one, other = more_noise(batch, "step 0"), more_noise(batch, "critic")
    assert not torch.equal(one, other) and not torch.equal(one, batch.noise)
    assert torch.equal(one, more_noise(batch, "step 0"))
    alone = replace(batch, keys=batch.keys[1:2], shards=batch.shards[1:2], noise=batch.noise[1:2])
    assert torch.equal(more_noise(alone, "critic")[0], other[1]), "whatever batch a sample is in"
    assert not torch.equal(more_noise(replace(batch, step=1), "critic"), other)


class MatchingCase(Case):
    def weights(self, step: int) -> dict[str, Tensor]:
        folder = self.run / "training" / "stage2" / f"step-{step}"
        return load_file(folder / "model" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Any, MatchingCase]]:
    folder = tmp_path_factory.mktemp("matching")
    features = make_run(folder) / "features"
    start = random_network(folder / "start", 1)
    shared = MATCHING | {"starts_from": str(start), "log_every": 1, "checkpoint_every": 100, "keep_checkpoints": 3}
    shared |= {"networks.teacher": str(start)}

    def case(name: str, kind: tuple[int, str]) -> MatchingCase:
        run = folder / f"{name}-{kind[0]}-{kind[1]}"
        run.mkdir()
        (run / "features").symlink_to(features)
        return MatchingCase(run, "matching", shared | {"zero_stage": kind[0], "dtype": kind[1]})

    names = ("straight", "resumed", "moved")
    return dict(zip(names, train_three(case, KINDS, folder), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_student_and_critic_resume_exactly_and_on_another_number_of_ranks(runs: Any, kind: tuple[int, str]) -> None:
    straight, resumed, moved = (runs[name][kind] for name in ("straight", "resumed", "moved"))
    assert losses(resumed) == losses(straight) and len(set(losses(straight))) == 4
    ours, theirs = resumed.weights(4), straight.weights(4)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    # The critic's error after the resume tells that it went on, too.
    errors = [[line["mse"] for line in metrics(case.run, 2)] for case in (straight, resumed)]
    assert errors[0] == errors[1]
    assert losses(moved) == pytest.approx(losses(straight), rel=2e-2 if kind[1] == "bf16" else 1e-3)


@pytest.mark.slow
def test_a_checkpoint_exports_the_student_alone_and_says_how_it_is_drawn(runs: Any) -> None:
    case = runs["straight"][(0, "fp32")]
    assert load_diffusers(case.run / "training" / "stage2" / "step-4" / "model").state_dict().keys() == (
        PixArt(SHAPE).state_dict().keys()
    )
    process = open_run_model(case.run, "stage2").process
    assert process["student"]["times"] == [[599], [899, 499]] and process["student"]["guidance"] == 1.5
    assert own_times(process["student"], 1) == [599] and own_times(process["student"], 4) is None
    assert usual_steps(process["student"]) == 2
    trainer = json.loads((case.run / "training" / "stage2" / "step-4" / "trainer.json").read_text())
    assert trainer["objective"] == "distribution_matching"


def test_the_critic_begins_as_the_teacher_and_counts_as_what_trains(tmp_path: Path) -> None:
    run, start = make_run(tmp_path), str(random_network(tmp_path / "start", 1))
    job = open_job(run, starts_from=start, **MATCHING, **{"networks.teacher": start})
    roles = {"network": Trained(critic="teacher"), "teacher": Frozen()}
    networks = objective_networks(job, roles, PixArt(SHAPE))
    critic = critic_of(networks["network"])
    assert critic is not None and critic is not networks["teacher"]
    teacher = networks["teacher"].state_dict()
    assert all(torch.equal(weight, teacher[name]) for name, weight in critic.state_dict().items())
    number = count_parameters(PixArt(SHAPE))
    counts = count_weights(roles, networks)
    assert (counts.trained, counts.frozen, counts.beside) == (2 * number, 0, number)
    assert len(list(blank_copy(networks["network"]).parameters())) == 2 * len(teacher)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trains": "lora"}, r"needs trains = 'all', but .*trains is 'lora'"),
        ({"trains": "control"}, r"needs trains = 'all', but .*trains is 'control'"),
        ({"process": "flow"}, r"needs process = 'ddpm', but .*process is 'flow'"),
        ({"optimizer": "muon"}, r"needs optimizer = 'adamw', but .*optimizer is 'muon'"),
        ({"matching.times": [[499, 899]]}, r"times fall from step to step"),
        ({"matching.times": [[499], [599]]}, r"one list for each number of steps"),
        ({"matching.compared_from": 980}, r"compared_from 980 is not below compared_to 980"),
    ],
)
def test_what_cannot_be_matched_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    run, start = make_run(tmp_path), str(random_network(tmp_path / "start", 1))
    with pytest.raises(UserError, match=said):
        job = open_job(run, **{"starts_from": start, "networks.teacher": start, **MATCHING, **settings})
        objective_networks(job, {"network": Trained(critic="teacher"), "teacher": Frozen()}, PixArt(SHAPE))

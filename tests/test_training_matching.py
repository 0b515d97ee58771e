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
from training_run import arguments, finish, make_run, metrics
from warm_python import WarmProcess

from errors import UserError
from pixart.convert import load_diffusers
from pixart.model import PixArt
from pixart.processes.ddpm import DDPM
from pixart.processes.specs import own_times, usual_steps
from sampling.trained_model import open_run_model
from training.launch.disk_needs import checkpoint_bytes
from training.loop.optimizers.choice import choose_rule
from training.loop.optimizers.rule import RATE_FACTOR
from training.objectives.matching import DistributionMatching
from training.objectives.noises import more_noise
from training.objectives.objective import Average, Frozen, Losses, Trained
from training.stages.critics import critic_of
from training.stages.networks import blank_copy, count_parameters, count_weights
from training.stages.starts import objective_networks
from training.stages.weights import WeightCounts

MATCHING = {"objective": "distribution_matching", "adam_betas": [0.0, 0.99], "learning_rate": 1e-3}
# ZeRO stage, precision, and what is otherwise.
KINDS = (
    (0, "fp32", "plain"),
    (1, "bf16", "plain"),
    (2, "fp32", "consistency"),
    (0, "fp32", "8bit"),
    (2, "bf16", "lora"),
)
OTHERS = {
    "plain": {},
    "consistency": {"matching.consistency_weight": 1.0},
    "lora": {"trains": "lora", "lora.rank": 2},
    "8bit": {"trains": "lora", "lora.rank": 2, "optimizer": "adamw8bit"},
}


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


def matching(*schedules: list[int], consistency_weight: float = 0.0) -> DistributionMatching:
    return DistributionMatching(
        student=consistency(3.0, 3.0),
        schedules=schedules,
        compared=(20, 980),
        consistency_weight=consistency_weight,
    )


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
        noisy = process.noisy(image, more_noise(batch, "compared", seed=0), times)
        led, alone = (clean(teacher, noisy, times, text) for text in (batch.text, null))
        real = alone + 3.0 * (led - alone)
        gradient = (clean(student.critic, noisy, times, batch.text) - real) / (image - real).abs().mean(
            (1, 2, 3), keepdim=True
        )
        noise = more_noise(batch, "critic", seed=0)
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


def test_consistency_is_added_by_its_weight_and_its_target_is_the_average() -> None:
    batch = make_batch(has_text=True)

    def losses_of(weight: float) -> tuple[Losses, dict[str, Linear]]:
        networks = {"network": WithCritic(1), "target": Linear(2), "teacher": Linear(3)}
        return matching([599], consistency_weight=weight).loss(networks, batch), networks

    alone, _ = losses_of(0.0)
    beside, networks = losses_of(0.7)
    distilled = {"network": WithCritic(1), "target": Linear(2), "teacher": Linear(3)}
    distance = consistency(3.0, 3.0).loss(distilled, batch).total
    torch.testing.assert_close(beside.total, alone.total + 0.7 * distance)
    assert torch.equal(beside.parts["consistency"], distance) and alone.parts.keys() == {"matching", "mse"}
    assert torch.equal(beside.parts["matching"], alone.total)
    assert beside.critic is not None and alone.critic is not None and torch.equal(beside.critic, alone.critic)
    assert matching([599], consistency_weight=0.7).networks == {
        "network": Trained(critic="teacher"),
        "teacher": Frozen(),
        "target": Average(),
    }
    gradients = []
    for total, student in ((beside.total, networks["network"]), (0.7 * distance, distilled["network"])):
        total.sum().backward()
        assert student.weight.grad is not None
        gradients.append(student.weight.grad)
    student = WithCritic(1)
    matching([599]).loss({"network": student, "teacher": Linear(3)}, batch).total.sum().backward()
    assert student.weight.grad is not None
    torch.testing.assert_close(gradients[0], gradients[1] + student.weight.grad)
    assert networks["target"].weight.grad is None and networks["network"].critic.weight.grad is None


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_critic_has_a_rate_of_its_own(tmp_path: Path, optimizer: str) -> None:
    run, start = make_run(tmp_path), str(random_network(tmp_path / "start", 1))
    rates = {"learning_rate": 2e-3, "matching.critic_learning_rate": 1e-2, "networks.teacher": start}
    job = open_job(run, starts_from=start, optimizer=optimizer, **MATCHING | rates)
    weights = dict(WithCritic(1).named_parameters())
    own, critic = choose_rule(job.settings).make(weights, job.settings).param_groups
    assert own["params"] == [weights["weight"]] and RATE_FACTOR not in own
    assert critic["params"] == [weights["critic.weight"]] and critic[RATE_FACTOR] == pytest.approx(5.0)


def test_later_steps_begin_with_the_students_own_image_and_new_noise() -> None:
    batch, process = replace(make_batch(has_text=True), step=0), DDPM()
    drawn = set()
    for step in range(24):
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
            later = process.noisy(image, more_noise(drawing, "step 0", seed=0), torch.full((4,), 499))
            torch.testing.assert_close(student.seen[1][0], later, rtol=1e-4, atol=1e-5)
    expected = {((599,), (True,)), ((899,), (True,)), ((899, 499), (False, True))}
    assert drawn == expected, "only the last step has a gradient"
    one, other = more_noise(batch, "step 0", seed=0), more_noise(batch, "critic", seed=0)
    assert not torch.equal(one, other) and not torch.equal(one, batch.noise)
    assert torch.equal(one, more_noise(batch, "step 0", seed=0))
    alone = replace(batch, keys=batch.keys[1:2], shards=batch.shards[1:2], noise=batch.noise[1:2])
    assert torch.equal(more_noise(alone, "critic", seed=0)[0], other[1]), "whatever batch a sample is in"
    assert not torch.equal(more_noise(replace(batch, step=1), "critic", seed=0), other)
    assert not torch.equal(more_noise(batch, "critic", seed=1), other)


def test_another_seed_draws_others_of_the_students_steps() -> None:
    batch = make_batch(has_text=True)

    def drawn(seed: int) -> list[int]:
        numbers = []
        for step in range(12):
            student = WithCritic(1)
            objective = replace(matching([599], [899, 499]), seed=seed)
            objective.loss({"network": student, "teacher": Linear(3)}, replace(batch, step=step))
            numbers.append(int(student.seen[0][1][0]))
        return numbers

    assert drawn(0) == drawn(0) != drawn(1)


class MatchingCase(Case):
    def weights(self, step: int) -> dict[str, Tensor]:
        folder = self.run / "training" / "stage2" / f"step-{step}"
        adapter = folder / "adapter" / "adapter_model.safetensors"
        return load_file(adapter if adapter.exists() else folder / "model" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Any, MatchingCase]]:
    folder = tmp_path_factory.mktemp("matching")
    features = make_run(folder) / "features"
    start = random_network(folder / "start", 1)
    shared = MATCHING | {"starts_from": str(start), "log_every": 1, "checkpoint_every": 100, "keep_checkpoints": 3}
    shared |= {"networks.teacher": str(start)}

    def case(name: str, kind: tuple[int, str, str]) -> MatchingCase:
        run = folder / "-".join(map(str, (name, *kind)))
        run.mkdir()
        (run / "features").symlink_to(features)
        return MatchingCase(run, "matching", shared | {"zero_stage": kind[0], "dtype": kind[1]} | OTHERS[kind[2]])

    names = ("straight", "resumed", "moved")
    return dict(zip(names, train_three(case, KINDS, folder), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_student_and_critic_resume_exactly_and_on_another_number_of_ranks(
    runs: Any, kind: tuple[int, str, str]
) -> None:
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
    case = runs["straight"][KINDS[0]]
    assert load_diffusers(case.run / "training" / "stage2" / "step-4" / "model").state_dict().keys() == (
        PixArt(SHAPE).state_dict().keys()
    )
    process = open_run_model(case.run, "stage2").process
    assert process["student"]["times"] == [[599], [899, 499]] and process["student"]["guidance"] == 1.5
    assert own_times(process["student"], 1) == [599] and own_times(process["student"], 4) is None
    assert usual_steps(process["student"]) == 2
    trainer = json.loads((case.run / "training" / "stage2" / "step-4" / "trainer.json").read_text())
    assert trainer["objective"] == "distribution_matching"


@pytest.mark.slow
def test_adapters_become_a_student_of_their_base_and_their_file_holds_no_critic(runs: Any) -> None:
    case = runs["straight"][KINDS[3]]
    folder = case.run / "training" / "stage2" / "step-4"
    assert not (folder / "model").exists() and not any("critic" in name for name in case.weights(4))
    drawn = open_run_model(case.run, "stage2")
    assert drawn.process["student"]["times"] == [[599], [899, 499]]
    base = load_diffusers(Path(case.settings["starts_from"])).state_dict()
    weights = drawn.load().state_dict()
    assert weights.keys() == base.keys() and any(not torch.equal(weights[name], base[name]) for name in base)


def test_a_plan_says_what_of_adapters_is_the_critics(tmp_path: Path) -> None:
    run, start = make_run(tmp_path), str(random_network(tmp_path / "start", 1))
    settings = {**MATCHING, **OTHERS["lora"], "networks.teacher": start, "starts_from": start, "num_processes": 1}
    process = WarmProcess("training", [*arguments(run, 2, **settings), "--plan"])
    said = finish(process)
    number = count_parameters(PixArt(SHAPE)) / 1e6
    assert f"critic {number:,.2f}M parameters that train beside it, from the teacher's" in said
    assert f"{number:,.2f}M more are held already" in said, "the teacher is the base"
    assert f"{number:,.2f}M stay as they are" in said and "0.00M weights train" in said


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
    assert counts == WeightCounts(trained=2 * number, beside=number, critic=number)
    assert checkpoint_bytes(job.settings, counts) == 2 * number * (4 + 4 + 8) + number * 4, (
        "and not the critic's average"
    )
    assert len(list(blank_copy(networks["network"]).parameters())) == 2 * len(teacher)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trains": ["blocks.*"]}, r"needs trains = 'all' or 'lora', but .*trains is \['blocks\.\*'\]"),
        ({"trains": "control"}, r"needs trains = 'all' or 'lora', but .*trains is 'control'"),
        ({"process": "flow"}, r"needs process = 'ddpm', but .*process is 'flow'"),
        ({"optimizer": "muon"}, r"needs optimizer = 'adamw' or 'adamw8bit', but .*optimizer is 'muon'"),
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

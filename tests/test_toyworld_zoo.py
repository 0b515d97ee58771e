"""The embedded models meet their bars on held-out scenes, opened by the code that opens a hub id."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file
from training_run import finish
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, T5EncoderModel
from warm_python import WarmProcess

from encoders.clip_heads import load_head
from encoders.vision import ClipTowers
from encoders.weights import resolve_model
from errors import MissingFileError
from pixart.convert import load_diffusers
from pixart.dit import DiT
from toyworld.judge import WEIGHTS as JUDGE_WEIGHTS
from toyworld.judge import Judge
from toyworld.scenes import POSITIONS, Scene, class_name, random_scene
from toyworld.spoiling import CAPTION_KINDS, PICTURE_KINDS, spoil_caption
from toyworld.wording import alt_text, caption_hits, dense_caption, describe, parse_caption
from toyworld.zoo import captioner as captioner_training
from toyworld.zoo import class_conditional, heads, judge_training, questions, text_encoder, vision_tower
from toyworld.zoo import clip as clip_training
from toyworld.zoo import vae as zoo_vae
from toyworld.zoo.__main__ import NAMES, RELEASED_FOLDER, train
from toyworld.zoo.captioner import greedy_captions
from toyworld.zoo.released import release
from toyworld.zoo.vision_tower import picture_of

WEIGHTS = JUDGE_WEIGHTS.parent
SAM_PROMPT = "Describe this image and its style in a very detailed manner"
LAION_PROMPT = SAM_PROMPT + '. The image is known to have the following alt text: "{}"'


def test_all_weights_together_are_at_most_17_megabytes():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}
    assert sum(path.stat().st_size for path in files) <= 17_000_000


# VAE


VAES = {"vae": 4, "vae-8": 8}  # channels of the latents


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 96), (128, 128), (128, 64), (80, 112)])
def test_vae_reaches_28_decibels(name: str, width: int, height: int):
    vae = zoo_vae.load(WEIGHTS / name)
    images = zoo_vae.image_batch(np.random.default_rng(21), 64, width=width, height=height)
    assert zoo_vae.mean_psnr(vae, images) >= 28


@pytest.mark.parametrize("name", VAES)
def test_scaling_factor_gives_latents_unit_deviation(name: str):
    vae = zoo_vae.load(WEIGHTS / name)
    images = zoo_vae.image_batch(np.random.default_rng(22), 200, width=64, height=64)
    with torch.no_grad():
        latents = zoo_vae.encode(vae, images).sample() * vae.config["scaling_factor"]
    assert latents.shape == (200, VAES[name], 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=0.05)


# Text encoder


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS / "t5")


@pytest.fixture(scope="module")
def encoder():
    return T5EncoderModel.from_pretrained(WEIGHTS / "t5").eval()


def test_every_text_round_trips_and_captions_fit_120_tokens(tokenizer):
    rng = np.random.default_rng(23)
    for _ in range(500):
        scene = random_scene(rng)
        for text in (dense_caption(scene, rng), describe(scene), alt_text(scene, rng), "いろは ★ naïve\n"):
            tokens = tokenizer(text).input_ids
            assert tokenizer.decode(tokens, skip_special_tokens=True) == text
            assert len(tokens) <= 120
    assert tokenizer.model_max_length == 120


def test_the_empty_text_encodes(tokenizer, encoder):
    tokens = tokenizer("", return_tensors="pt")
    assert tokens.input_ids.tolist() == [[tokenizer.eos_token_id]]
    with torch.no_grad():
        states = encoder(**tokens).last_hidden_state
    assert states.shape == (1, 1, encoder.config.d_model)
    assert states.dtype == torch.float32
    assert states.isfinite().all()


def object_states(tokenizer, encoder, scenes: list[Scene], attribute: str) -> tuple[torch.Tensor, torch.Tensor]:
    """State of each object's shape or colour word in a canonical description, and the object's position."""
    states, places = [], []
    for scene in scenes:
        tokens = tokenizer(describe(scene), return_tensors="pt", return_offsets_mapping=True)
        offsets = tokens.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            hidden = encoder(**tokens).last_hidden_state[0]
        end = 0
        for item in scene.objects:
            start = describe(scene).index(getattr(item, attribute), end)
            end = describe(scene).index(item.position, start)
            states.append(hidden[next(i for i, (begin, stop) in enumerate(offsets) if begin <= start < stop)])
            places.append(POSITIONS.index(item.position))
    return torch.stack(states), torch.tensor(places)


@pytest.mark.parametrize("attribute", ["shape", "colour"])
def test_the_words_for_an_object_know_its_place(tokenizer, encoder, attribute: str):
    """Without this a text of several objects is a bag of words."""
    rng = np.random.default_rng(24)
    states, places = object_states(
        tokenizer, encoder, [random_scene(rng, num_objects=3) for _ in range(250)], attribute
    )
    states = torch.cat([states, torch.ones(len(states), 1)], dim=1)
    wanted = torch.nn.functional.one_hot(places, len(POSITIONS)).float()
    probe = torch.linalg.lstsq(states[:500], wanted[:500]).solution
    guessed = (states[500:] @ probe).argmax(dim=1)
    assert (guessed == places[500:]).float().mean().item() >= 0.95


# Captioner


@pytest.fixture(scope="module")
def captioner():
    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS / "llava").eval()
    return model, AutoProcessor.from_pretrained(WEIGHTS / "llava")


def asked_pictures(count: int, seed: int) -> tuple[list[Scene], list[Image.Image], list[str]]:
    """Held-out scenes at many sizes and aspect ratios; every other prompt carries an alt text."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    images = [picture_of(scene, rng) for scene in scenes]
    requests = [SAM_PROMPT if i % 2 else LAION_PROMPT.format(alt_text(s, rng)) for i, s in enumerate(scenes)]
    return scenes, images, requests


def test_captions_name_90_percent_of_objects(captioner):
    scenes, images, requests = asked_pictures(200, seed=25)
    captions = []
    for start in range(0, len(scenes), 50):
        captions += greedy_captions(*captioner, images[start : start + 50], requests[start : start + 50])
    hits = [caption_hits(scene, text) for scene, text in zip(scenes, captions, strict=True)]
    assert np.mean([hit for of_scene in hits for hit in of_scene]) >= 0.9
    assert np.mean([hit for of_scene in hits[::2] for hit in of_scene]) >= 0.9  # with alt texts, often wrong
    num_named = [len(parse_caption(text)) for text in captions]
    assert np.mean([n == len(scene.objects) for n, scene in zip(num_named, scenes, strict=True)]) >= 0.95
    num_words = [len(text.split()) for text in captions]
    assert np.std(num_words) > 5
    assert 0 < sum(text.startswith("The image features") for text in captions) < 150


def test_captions_do_not_depend_on_the_batch(captioner):
    _, images, requests = asked_pictures(4, seed=26)
    together = greedy_captions(*captioner, images, requests)
    alone = [greedy_captions(*captioner, [i], [r])[0] for i, r in zip(images, requests, strict=True)]
    assert together == alone


def test_a_black_picture_gets_another_caption(captioner):
    _, images, _ = asked_pictures(1, seed=27)
    black = Image.new("RGB", images[0].size)
    seen, unseen = greedy_captions(*captioner, [images[0], black], [SAM_PROMPT] * 2)
    assert seen != unseen


# CLIP and the head over it


@pytest.fixture(scope="module")
def towers() -> ClipTowers:
    source = resolve_model(str(WEIGHTS / "clip"))
    return ClipTowers(source, device=torch.device("cpu"), dtype=torch.float32, key="columns.clip_model")


def auroc(better: np.ndarray, worse: np.ndarray) -> float:
    """How often one of `better` is higher than one of `worse`, ties as half."""
    return float(((better[:, None] > worse).mean() + (better[:, None] >= worse).mean()) / 2)


@torch.inference_mode()
def test_clip_tells_captions_that_are_true_from_those_that_are_nearly_true(towers):
    rng = np.random.default_rng(28)
    scenes = [random_scene(rng) for _ in range(300)]
    seen = heads.embeddings(towers, [picture_of(scene, rng).convert("RGB") for scene in scenes])
    captions = [dense_caption(scene, rng) for scene in scenes]

    def scores(texts: list[str]) -> np.ndarray:
        return (seen * towers.text_features(texts)).sum(dim=1).numpy()

    found = {
        kind: auroc(
            scores(captions),
            scores([spoil_caption(text, kind, scene=s, rng=rng) for text, s in zip(captions, scenes, strict=True)]),
        )
        for kind in CAPTION_KINDS
        if kind != "loop"  # what it says is true
    }
    assert min(found[kind] for kind in ("swapped", "refusal", "boilerplate", "false_object", "wrong_place")) > 0.98
    assert found["wrong_colour"] > 0.95 and found["wrong_shape"] > 0.95, found


def test_the_head_tells_sound_pictures_from_broken_ones(towers):
    rng = np.random.default_rng(29)
    pictures, kinds = heads.random_pictures(600, rng)
    head = load_head(WEIGHTS / "heads" / "sound.safetensors", key="columns.heads.sound.file")
    assert head.layout == "NSFW head" and head.is_probability
    scores = head.scores(heads.embeddings(towers, pictures).numpy())
    is_sound = np.array([kind is None for kind in kinds])
    assert (scores[is_sound] > 0.5).mean() > 0.97
    for kind in PICTURE_KINDS:
        assert auroc(scores[is_sound], scores[np.array(kinds) == kind]) > 0.98, kind


# Class-conditional DiT


def sample_classes(dit: DiT, labels: torch.Tensor, *, guidance: float) -> list[Image.Image]:
    vae = zoo_vae.load(WEIGHTS / "vae")
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    scheduler.set_timesteps(15)
    latents = torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        moments = timestep.expand(2 * len(labels))
        both = torch.cat([labels, torch.full_like(labels, dit.null_label)])
        noise = dit(latents.repeat(2, 1, 1, 1), moments, both)[:, :4]
        with_class, without = noise.chunk(2)
        latents = scheduler.step(without + guidance * (with_class - without), timestep, latents).prev_sample
    decoded = zoo_vae.decode(vae, latents / vae.config["scaling_factor"]).clamp(-1, 1)
    return [Image.fromarray(p) for p in ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]


@torch.no_grad()
def test_class_samples_show_their_class():
    dit = load_diffusers(WEIGHTS / "dit").float().eval()
    assert isinstance(dit, DiT)
    labels = torch.arange(24).repeat(4)
    seen = Judge.load().look(sample_classes(dit, labels, guidance=3.0))
    shown = [{f"{colour} {shape}" for shape, colour in of_image.values()} for of_image in seen]
    accuracy = np.mean([class_name(label) in of_image for label, of_image in zip(labels.tolist(), shown, strict=True)])
    assert accuracy >= 0.8


# Training


def run_warm(room: str, run: Path, stage: str, *typed: str) -> None:
    """What `zoo_vae` starts as a process, without the seconds of its imports."""
    few = (
        "--set",
        "training.num_validation_samples=16",
        "--set",
        "training.vae.reconstruction.num_statistics_samples=16",
        *(("--set", f"training.{stage}.num_steps=1") if room == "training" else ()),
    )
    finish(WarmProcess(room, ["--recipe", str(zoo_vae.RECIPE), "--run", str(run), "--stage", stage, *typed, *few]))


def test_every_model_can_be_trained_anew(tmp_path, monkeypatch):
    """One step each: what `make zoo` writes has the files, shapes and dtypes that are shipped."""
    for module in (
        text_encoder,
        vision_tower,
        captioner_training,
        questions,
        judge_training,
        class_conditional,
        clip_training,
        heads,
    ):
        monkeypatch.setattr(module, "NUM_STEPS", 1)
    monkeypatch.setattr(zoo_vae, "SHARDS", [(name, 16, sizes) for name, _, sizes in zoo_vae.SHARDS[-6:]])
    monkeypatch.setattr(zoo_vae, "_run", run_warm)
    monkeypatch.setattr(class_conditional, "NUM_SCENES", 100)
    monkeypatch.setattr(heads, "NUM_PICTURES", 100)
    for name in NAMES:
        train(name, tmp_path)
        written = {path.name: path for path in (tmp_path / name).iterdir()}
        shipped = {path.name: path for path in (WEIGHTS / name).iterdir()}
        assert written.keys() == shipped.keys(), name
        for file in written:
            if file.endswith(".safetensors"):
                new, old = load_file(written[file]), load_file(shipped[file])
                assert {k: (v.shape, v.dtype) for k, v in new.items()} == {
                    k: (v.shape, v.dtype) for k, v in old.items()
                }
            elif file.startswith("tokenizer"):
                assert written[file].read_bytes() == shipped[file].read_bytes()  # seeded


def test_the_released_pixart_is_a_demos_stage_2(tmp_path) -> None:
    with pytest.raises(MissingFileError, match=r"training/stage2 has no checkpoint yet: type `make demo-paper` first"):
        release(tmp_path, tmp_path / "pixart")
    model = load_diffusers(RELEASED_FOLDER)
    assert model.kind == "pixart" and model.config.caption_channels == 96
    assert sum(weight.numel() for weight in model.parameters()) == 1_506_848

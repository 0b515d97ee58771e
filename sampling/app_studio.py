"""What the app does behind its page: a checkpoint kept in memory, one image after another, a history on disk."""

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from errors import UserError
from pipelines.engine.preflight import require_packages
from pipelines.engine.progress import get_logger
from pipelines.engine.run import EngineConfig
from pipelines.store.files import own_files
from pipelines.store.png_files import DAMAGE
from pipelines.wrong_keys import plain_message
from pixart.compilation import require_compiler
from pixart.processes.specs import LCM, require_solver, solvers_of
from sampling.adapters import adapter_identity, add_adapters, find_file, name_adapters
from sampling.branches import add_branch
from sampling.config import SamplingConfig
from sampling.control_images import open_control_image
from sampling.control_kind import maps_of, with_maps
from sampling.generate import check_inputs, make_job
from sampling.images import ADAPTERS, CONTROL, is_own, is_whole, is_written, write_image, write_map
from sampling.kept_controls import find_control, keep_control
from sampling.prompt_list import control_path
from sampling.requests import MAP_FOLDER, ImageRequest
from sampling.students import follow_weights
from sampling.trained_model import TrainedModel, open_checkpoint_model

if TYPE_CHECKING:
    from torch import Tensor

    from sampling.renderer import Renderer

MAX_HISTORY = 60
# Embeddings of the latest prompts: another seed or scale must not load the text encoder again.
MAX_TEXTS = 32

log = get_logger("sampling")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the page's fields say; `size` is width x height in pixels, such as 1024x768.

    `lora` are adapters as the recipe's key has them, and `lora_weights` how much of each is added. `control` is the
    file of an image that leads what is drawn.
    """

    prompt: str
    negative_prompt: str
    size: str
    solver: str
    num_steps: int
    guidance_scale: float
    seed: int
    weight_dtype: Literal["int8"] | None = None
    control: str | None = None
    control_is: Literal["map", "photo"] = "map"
    control_strength: float = 1.0
    lora: tuple[str, ...] = ()
    lora_weights: tuple[float, ...] = ()


class DrawingStopped(Exception):
    """Somebody asked the studio to stop."""


class Studio:
    """Draws wishes from a checkpoint; models are loaded with the first one, and stay until another is chosen.

    An image is the one that `make sample` draws for the same prompt, seed, settings and adapters.

    Args:
        config: the recipe's settings; its adapters are those of the first wish.
        trained: the checkpoint, without them.
        run: the run's folder.
        name: folder of the images, below the run's `samples`.
        engine: the recipe's.

    Raises:
        MissingFileError: the recipe's control image is not there.
        UserError: the checkpoint knows classes, not text, or the recipe's solver, adapters or control image are not for
            it.
    """

    def __init__(
        self, config: SamplingConfig, trained: TrainedModel, *, run: Path, name: str, engine: EngineConfig
    ) -> None:
        _require_text(trained)
        checkpoint = f"{trained.name} ({trained.model_path})"
        drawn, _ = follow_weights(config, trained)
        require_solver(trained.process, drawn.solver, num_steps=drawn.num_steps, checkpoint=checkpoint)
        is_precomputed = config.text_encoder == "precomputed"
        self.trained = trained
        # By folder, as `choose` names them; one that is no checkpoint of training has its weights' folder or file.
        self.checkpoint = str(trained.checkpoint or trained.model_path)
        self._opened = {self.checkpoint: (trained, name)}
        # What is typed into a page is in no file of embeddings.
        self.config = config.model_copy(update={"text_encoder": "device"}) if is_precomputed else config
        named = name_adapters(trained, config.lora, config.lora_weights, run=run)
        self.config = self.config.model_copy(update={"lora": list(named)})
        self.folder = run / "samples" / name
        # Images are drawn here, on this machine's device, wherever workers would be.
        self.run, self._name, self._engine = run, name, engine.model_copy(update={"in_process": True})
        self._renderer: Renderer | None = None
        # Which transformer the renderer has, in which weights and with which guidance inside.
        self._loaded: tuple[str, str | None, float | None] | None = None
        self._texts: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()
        add_adapters(trained, named, config.lora_weights, run=run)
        if config.control is not None:
            open_control_image(control_path(config.control, trained, run=run))
            if config.control_is == "photo":
                maps_of(trained)

    def look_at(self, checkpoint: str) -> TrainedModel:
        """Open a checkpoint's folder, without its weights and without choosing it.

        Raises:
            UserError: it is damaged, or knows classes, not text, or the recipe's control branch is not for it.
        """
        if checkpoint not in self._opened:
            trained = open_checkpoint_model(Path(checkpoint))
            _require_text(trained)
            if trained.branch is None:
                trained = add_branch(trained, self.config.control_branch, run=self.run)
            trained = with_maps(trained, self.config)
            self._opened[checkpoint] = trained, f"{Path(checkpoint).parent.name}-app"
        return self._opened[checkpoint][0]

    def choose(self, checkpoint: str) -> None:
        """Draw from another checkpoint from now on; raises as `look_at` does."""
        trained = self.look_at(checkpoint)
        if checkpoint == self.checkpoint:
            return
        with self._lock:
            # What the one before has loaded goes before the next one loads, as both may not fit.
            self._renderer, self._texts = None, {}
            self.trained, self.checkpoint = trained, checkpoint
            self._name = self._opened[checkpoint][1]
            self.folder = self.run / "samples" / self._name

    def sizes(self, trained: TrainedModel | None = None) -> list[str]:
        """Return the sizes that a checkpoint, or the chosen one, was trained at: square ones first, then the widest."""
        buckets = (trained or self.trained).buckets
        by_shape = sorted(buckets, key=lambda size: (size[0] != size[1], size[0] / size[1]))
        return [f"{width}x{height}" for height, width in by_shape]

    def solvers(self, trained: TrainedModel | None = None) -> list[str]:
        """Return the solvers of the process of a checkpoint, or of the chosen one."""
        return list(solvers_of((trained or self.trained).process))

    def settings_of(self, trained: TrainedModel) -> SamplingConfig:
        """Return the recipe's settings, as a checkpoint that was distilled to few steps is drawn with them."""
        return follow_weights(self.config, trained)[0]

    def first_wish(self) -> Wish:
        """Return what the fields show at first: the recipe's settings."""
        config = self.settings_of(self.trained)
        return Wish(
            prompt=config.prompt or "",
            negative_prompt=config.negative_prompt,
            size=config.size or self.sizes()[0],
            solver=config.solver,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            seed=config.seed,
            weight_dtype=config.weight_dtype,
            **self._first_control(),
            lora=tuple(config.lora),
            lora_weights=tuple(config.lora_weights or [1.0] * len(config.lora)),
        )

    def _first_control(self) -> dict[str, Any]:
        """Return what the recipe says of what leads images, if anything does."""
        config = self.config
        if config.control is None or self.trained.branch is None:  # of a checkpoint that was chosen since
            return {}
        path = control_path(config.control, self.trained, run=self.run)
        told = {"control_is": config.control_is, "control_strength": config.control_strength}
        return {"control": str(path.absolute()), **told}

    def draw(self, wish: Wish, *, on_step: Callable[[int], None]) -> Path:
        """Draw one image; as `draw_all` else."""
        return next(self.draw_all([wish], on_step=lambda _, num_done: on_step(num_done)))

    def draw_all(self, wishes: Sequence[Wish], *, on_step: Callable[[int, int], None]) -> Iterator[Path]:
        """Draw images one after the other and keep them in the history; yields the file of each.

        `on_step` is told the number of the image, from 0 on, and how many of the solver's `num_passes` of the model are
        done, 0 while prompts are encoded and models loaded.

        Raises:
            UserError: a field's value is out of its bounds, an adapter is gone or another model's, or the model gives
                nothing finite; names the key or file.
            DrawingStopped: `stop` was called; images that were yielded are kept.
        """
        self._is_stopped.clear()
        prompts = [self.config_of(wish).prompt or "" for wish in wishes]  # all are checked before the first is drawn
        # Files are looked at with each drawing: an adapter may be trained on while the page is open.
        models = {
            adapters: add_adapters(self.trained, *adapters, run=self.run)
            for adapters in dict.fromkeys((wish.lora, wish.lora_weights) for wish in wishes)
        }
        for number, wish in enumerate(wishes):
            trained = models[wish.lora, wish.lora_weights]
            yield self._draw(wish, trained, prompts, on_step=partial(on_step, number))

    def _draw(
        self, wish: Wish, trained: TrainedModel, prompts: Sequence[str], *, on_step: Callable[[int], None]
    ) -> Path:
        """Draw an image; of `prompts` all that are not yet encoded are, so that the encoder is loaded once."""

        def step(num_done: int) -> None:
            if self._is_stopped.is_set():
                raise DrawingStopped
            on_step(num_done)

        if wish.control is not None:
            wish = replace(wish, control=str(keep_control(Path(wish.control), self.folder)))
        config = self.config_of(wish)
        job = make_job(config, trained, run=self.run, name=self._name, engine=self._engine)
        (request,) = job.requests
        # One prompt has many images here, and each is kept.
        request = _kept_apart(request, job.fingerprint.digest[:8])
        path = self.folder / request.file
        with self._lock:
            if is_written(self.folder, request, fingerprint=job.fingerprint):
                path.touch()
                return path
            step(0)
            require_packages(*config.packages)
            wanted = [config.negative_prompt, request.prompt, *prompts]
            texts = self._embeddings(config, wanted, check=lambda: check_inputs(job))
            renderer = self._load(job.config, job.trained)
            (image,) = renderer.draw([request], texts, on_step=step).images()
        self.folder.mkdir(parents=True, exist_ok=True)
        if request.control is not None:
            write_map(self.folder, renderer.control_picture(request), request, fingerprint=job.fingerprint)
        write_image(
            self.folder,
            image,
            request,
            fingerprint=job.fingerprint,
            computed_in=renderer.computed_in,
            adapters=trained.adapters,
        )
        return path

    def stop(self) -> None:
        """Stop the drawing that is under way, before its next step."""
        self._is_stopped.set()

    def config_of(self, wish: Wish) -> SamplingConfig:
        """Return the recipe's settings with those of the page; UserError where a field is out of its bounds."""
        import pydantic

        adapters = {"lora": list(wish.lora), "lora_weights": list(wish.lora_weights)}
        fields = {**wish.__dict__, **adapters, "prompts": None, "images_per_prompt": 1}
        # The recipe's times are those of as many steps of its solver.
        if self.config.times is not None and (wish.solver, wish.num_steps) != (LCM, len(self.config.times)):
            fields["times"] = None
        try:
            return SamplingConfig.model_validate(self.config.model_dump() | fields)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{'.'.join(str(part) for part in first['loc'])}: {plain_message(first)}") from None

    def _embeddings(
        self, config: SamplingConfig, prompts: list[str], *, check: Callable[[], object]
    ) -> Mapping[str, "Tensor"]:
        from sampling.text_encoding import encode_prompts

        assert self.trained.text is not None
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if missing:
            check()
            self._texts |= encode_prompts(missing, config, self.trained.text)
            for old in [prompt for prompt in self._texts if prompt not in prompts][: -MAX_TEXTS or None]:
                del self._texts[old]
        return self._texts

    def _load(self, config: SamplingConfig, trained: TrainedModel) -> "Renderer":
        """Return the models of a drawing; adapters and weights of another dtype change the transformer alone."""
        # Until it is done there is none: what fails half way is read anew.
        wanted = trained.identity, config.weight_dtype, trained.inner_guidance
        renderer, self._renderer = self._renderer, None
        if renderer is None:
            renderer = self._open(config, trained)
        elif self._loaded != wanted:
            renderer.change_transformer(config, trained)
        renderer.config, renderer.trained = config, trained
        self._renderer, self._loaded = renderer, wanted
        return renderer

    def _open(self, config: SamplingConfig, trained: TrainedModel) -> "Renderer":
        from sampling.renderer import Renderer

        shapes: set[tuple[int, int, int]] = set()
        if config.compile is True:  # by itself an image at a time is never worth it
            require_compiler(key="sampling.compile")
            shapes = {(1, *size) for size in trained.buckets}
        return Renderer(config, trained, compiled_shapes=shapes, compiles_decoder=config.compile is True)

    def is_of_chosen(self, path: Path) -> bool:
        """Whether an image was drawn from the checkpoint that is chosen, with whatever adapters."""
        with Image.open(path) as image:
            identity = str(image.info.get("checkpoint"))
            return (identity.rpartition("+")[0] if ADAPTERS in image.info else identity) == self.trained.identity

    def changed_adapters(self, path: Path) -> list[str]:
        """Return the names of those adapters of an image that are gone, or are others now than it was drawn with."""

        def identity(location: str) -> str | None:
            try:
                return adapter_identity(find_file(location, run=self.run))
            except UserError:
                return None

        return [item["name"] for item in _adapters(path) if identity(item["location"]) != item["identity"]]

    def history(self) -> list[Path]:
        """Return the images drawn here, the latest first, also those of earlier days; none that are cut or not ours."""
        found = own_files(self.folder, re.compile(r"[^.].*\.png", re.DOTALL))
        found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return list(itertools.islice((path for path in found if is_whole(path) and is_own(path)), MAX_HISTORY))


def _kept_apart(request: ImageRequest, digest: str) -> ImageRequest:
    """Return a request whose file and map no image has that is drawn otherwise."""
    led = "" if request.control is None else f"-{request.control.identity.removeprefix('sha256:')[:8]}"
    file = f"{request.key}-{request.seed}-{digest}{led}.png"
    return replace(request, file=file, control_map=request.control_map and f"{MAP_FOLDER}/{file}")


def _require_text(trained: TrainedModel) -> None:
    if trained.text is None:
        raise UserError(f"{trained.name} knows classes, not text: the app draws what a PixArt reads")


def adapter_titles(path: Path) -> list[str]:
    """Return the name and weight of each adapter that an image was drawn with."""
    return [f"{item['name']} {item['weight']:g}" for item in _adapters(path)]


def has_lost_control(path: Path) -> bool:
    """Whether the copy of the image that led an image is gone, so that it cannot be drawn again."""
    with Image.open(path) as image:
        identity = image.info.get(CONTROL)
    return identity is not None and find_control(path.parent, identity) is None


def _adapters(path: Path) -> list[dict[str, Any]]:
    with Image.open(path) as image:
        return json.loads(str(image.info.get(ADAPTERS, "[]")))


def wish_of(path: Path) -> Wish:
    """Read back from an image's text chunks how it was drawn.

    Raises:
        UserError: the file is no image of this app.
    """
    try:
        with Image.open(path) as image:
            info: Any = image.info
            settings, adapters = json.loads(info["settings"]), json.loads(info.get(ADAPTERS, "[]"))
            return Wish(
                prompt=info["prompt"],
                negative_prompt=settings["negative_prompt"],
                size=f"{image.width}x{image.height}",
                solver=settings["solver"],
                num_steps=settings["num_steps"],
                guidance_scale=settings["guidance_scale"],
                seed=int(info["seed"]),
                weight_dtype=settings.get("weight_dtype"),
                control=find_control(path.parent, info.get(CONTROL)),
                control_is=settings.get("control_is", "map"),
                control_strength=settings.get("control_strength", 1.0),
                lora=tuple(item["location"] for item in adapters),
                lora_weights=tuple(item["weight"] for item in adapters),
            )
    except (KeyError, TypeError, *DAMAGE) as error:
        raise UserError(f"{path.name} does not say how it was drawn: {error}") from None

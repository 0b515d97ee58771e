"""What the app does behind its page: one checkpoint kept in memory, one image at a time, a history on disk."""

import itertools
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.engine.run import EngineConfig
from pipelines.recipe import plain_message
from pipelines.store.files import own_files
from pipelines.store.png_files import DAMAGE
from pixart.compilation import require_compiler
from pixart.processes.specs import SOLVERS, require_solver
from sampling.config import SamplingConfig
from sampling.generate import check_inputs, make_job
from sampling.images import is_own, is_whole, is_written, write_image
from sampling.trained_model import TrainedModel

if TYPE_CHECKING:
    from torch import Tensor

    from sampling.renderer import Renderer

MAX_HISTORY = 60
# Embeddings of the latest prompts: another seed or scale must not load the text encoder again.
MAX_TEXTS = 32

log = get_logger("sampling")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the page's fields say; `size` is width x height in pixels, such as 1024x768."""

    prompt: str
    negative_prompt: str
    size: str
    solver: str
    num_steps: int
    guidance_scale: float
    seed: int


class DrawingStopped(Exception):
    """Somebody asked the studio to stop."""


class Studio:
    """Draws wishes from a checkpoint; models are loaded with the first one, and stay.

    An image is the one that `make sample` draws for the same prompt, seed and settings.

    Raises:
        UserError: the checkpoint knows classes, not text, or the recipe's solver is of another process than it.
    """

    def __init__(
        self, config: SamplingConfig, trained: TrainedModel, *, run: Path, name: str, engine: EngineConfig
    ) -> None:
        if trained.text is None:
            raise UserError(f"{trained.name} knows classes, not text: the app draws what a PixArt reads")
        checkpoint = f"{trained.name} ({trained.model_path})"
        require_solver(trained.process, config.solver, num_steps=config.num_steps, checkpoint=checkpoint)
        is_precomputed = config.text_encoder == "precomputed"
        self.trained = trained
        # What is typed into a page is in no file of embeddings.
        self.config = config.model_copy(update={"text_encoder": "device"}) if is_precomputed else config
        self.folder = run / "samples" / name
        # Images are drawn here, on this machine's device, wherever workers would be.
        self._run, self._name, self._engine = run, name, engine.model_copy(update={"in_process": True})
        self._renderer: Renderer | None = None
        self._texts: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()

    def sizes(self) -> list[str]:
        """Return the sizes that the checkpoint was trained at, widest first, the square ones in front."""
        by_shape = sorted(self.trained.buckets, key=lambda size: (size[0] != size[1], size[0] / size[1]))
        return [f"{width}x{height}" for height, width in by_shape]

    def solvers(self) -> list[str]:
        """Return the solvers of the checkpoint's process."""
        return list(SOLVERS[self.trained.process["name"]])

    def first_wish(self) -> Wish:
        """Return what the fields show at first: the recipe's settings."""
        config = self.config
        return Wish(
            prompt=config.prompt or "",
            negative_prompt=config.negative_prompt,
            size=config.size or self.sizes()[0],
            solver=config.solver,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            seed=config.seed,
        )

    def draw(self, wish: Wish, *, on_step: Callable[[int], None]) -> Path:
        """Draw an image and keep it in the history; returns its file.

        `on_step` is told how many of the solver's `num_passes` of the model are done, 0 while prompts are encoded and
        models loaded.

        Raises:
            UserError: a field's value is out of its bounds, or the model gives nothing finite; names the key.
            DrawingStopped: `stop` was called.
        """

        def step(num_done: int) -> None:
            if self._is_stopped.is_set():
                raise DrawingStopped
            on_step(num_done)

        config = self.config_of(wish)
        job = make_job(config, self.trained, run=self._run, name=self._name, engine=self._engine)
        (request,) = job.requests
        # One prompt has many images here, and each is kept.
        request = replace(request, file=f"{request.key}-{request.seed}-{job.fingerprint.digest[:8]}.png")
        path = self.folder / request.file
        with self._lock:
            if is_written(self.folder, request, fingerprint=job.fingerprint):
                path.touch()
                return path
            self._is_stopped.clear()
            step(0)
            texts = self._embeddings(config, [config.negative_prompt, request.prompt], check=lambda: check_inputs(job))
            renderer = self._load(job.config)
            (image,) = renderer.draw([request], texts, on_step=step).images()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_image(self.folder, image, request, fingerprint=job.fingerprint, computed_in=renderer.computed_in)
        return path

    def stop(self) -> None:
        """Stop the drawing that is under way, before its next step."""
        self._is_stopped.set()

    def config_of(self, wish: Wish) -> SamplingConfig:
        """Return the recipe's settings with those of the page; UserError where a field is out of its bounds."""
        import pydantic

        fields = {**wish.__dict__, "prompts": None, "images_per_prompt": 1}
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

    def _load(self, config: SamplingConfig) -> "Renderer":
        from sampling.renderer import Renderer

        if self._renderer is None:
            shapes: set[tuple[int, int, int]] = set()
            if config.compile is True:  # by itself an image at a time is never worth it
                require_compiler(key="sampling.compile")
                shapes = {(1, *size) for size in self.trained.buckets}
            self._renderer = Renderer(
                config, self.trained, compiled_shapes=shapes, compiles_decoder=config.compile is True
            )
        self._renderer.config = config
        return self._renderer

    def history(self) -> list[Path]:
        """Return the images drawn here, the latest first, also those of earlier days; none that are cut or not ours."""
        found = own_files(self.folder, re.compile(r"[^.].*\.png", re.DOTALL))
        found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return list(itertools.islice((path for path in found if is_whole(path) and is_own(path)), MAX_HISTORY))


def wish_of(path: Path) -> Wish:
    """Read back from an image's text chunks how it was drawn.

    Raises:
        UserError: the file is no image of this app.
    """
    try:
        with Image.open(path) as image:
            info: Any = image.info
            settings = json.loads(info["settings"])
            return Wish(
                prompt=info["prompt"],
                negative_prompt=settings["negative_prompt"],
                size=f"{image.width}x{image.height}",
                solver=settings["solver"],
                num_steps=settings["num_steps"],
                guidance_scale=settings["guidance_scale"],
                seed=int(info["seed"]),
            )
    except (KeyError, TypeError, *DAMAGE) as error:
        raise UserError(f"{path.name} does not say how it was drawn: {error}") from None

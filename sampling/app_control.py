"""The app's part about what leads images: its fields, and the map that an image gives before anything is drawn."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sampling.app_studio import Studio, Wish
from sampling.control_kind import photo_kind
from sampling.prompts import Prompt
from sampling.requests import ImageRequest, make_requests
from sampling.trained_model import TrainedModel

if TYPE_CHECKING:
    from sampling.control_latents import ControlPictures

MOST_STRENGTH = 2.0


class MapPreviews:
    """The maps that images would give; what draws those of photos is loaded with the first."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._pictures: tuple[str, ControlPictures] | None = None  # of the weights of a checkpoint

    def of(self, checkpoint: str, wish: Wish) -> tuple[Image.Image, str]:
        """Return the map that would lead a wish's image, and its size; where that of the wish is empty the nearest one.

        Raises:
            UserError: the image cannot lead what the checkpoint draws; names it.
        """
        trained = self._studio.look_at(checkpoint)
        config = self._studio.config_of(replace(wish, prompt="a map", size=wish.size or self._studio.sizes(trained)[0]))
        assert wish.control is not None
        prompt = Prompt(key="map", text="a map", seed=0, control=Path(wish.control))
        (request,) = make_requests([prompt], config if wish.size else config.model_copy(update={"size": None}), trained)
        assert request.control is not None
        if wish.control_is == "photo":
            picture = self._drawn(request, trained, config.device)
        else:
            picture = request.control.cut(request.width, request.height)  # for which nothing is to be loaded
        return picture, f"{request.width}x{request.height}"

    def _drawn(self, request: ImageRequest, trained: TrainedModel, device: str) -> Image.Image:
        from encoders.devices import choose_device
        from sampling.control_latents import ControlPictures

        if self._pictures is None or self._pictures[0] != trained.identity:
            pictures = ControlPictures(trained, device=choose_device(device, key="sampling.device"))
            self._pictures = trained.identity, pictures
        return self._pictures[1].of(request, is_photo=True)


@dataclass(frozen=True)
class ControlFields:
    """Components of the page: what holds the others, the image's file, what it is, how strongly it leads, its map."""

    group: Any
    file: Any
    kind: Any
    strength: Any
    preview: Any

    @property
    def fields(self) -> list[Any]:
        """Those that say something of a wish."""
        return [self.file, self.kind, self.strength]

    @property
    def shown(self) -> list[Any]:
        """Those that depend on the checkpoint."""
        return [self.group, self.kind]

    def shown_for(self, trained: TrainedModel) -> list[Any]:
        """Return how those are shown for a checkpoint."""
        import gradio as gr

        return [gr.Accordion(visible=trained.branch is not None), gr.Radio(_kinds(trained), value="map")]


def add_control(studio: Studio) -> ControlFields:
    """Lay out what leads images; it is shown where the checkpoint has a control branch."""
    import gradio as gr

    first, trained = studio.first_wish(), studio.trained
    with gr.Accordion("Led by an image", visible=trained.branch is not None, elem_id="control") as group:
        file = gr.File(first.control, label="Image", file_types=["image"], height=112, elem_id="control-file")
        with gr.Row():
            with gr.Column(min_width=150):
                kind = gr.Radio(_kinds(trained), value=first.control_is, label="It is", elem_id="control-kind")
                strength = gr.Slider(
                    0,
                    MOST_STRENGTH,
                    first.control_strength,
                    step=0.05,
                    label="Strength",
                    info="0: not at all, 1: as trained",
                    buttons=[],
                    elem_id="strength",
                )
            preview = gr.Image(
                label="Leads what is drawn",
                interactive=False,
                visible=False,
                height=250,
                min_width=150,
                buttons=[],
                elem_id="control-map",
            )
    return ControlFields(group, file, kind, strength, preview)


def _kinds(trained: TrainedModel) -> list[tuple[str, str]]:
    """Return what an image may be said to be: a photo where a map of it can be drawn."""
    kind = photo_kind(trained)
    return [("a map", "map")] if kind is None else [(f"a map ({kind})", "map"), ("a photo", "photo")]

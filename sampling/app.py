"""`python -m sampling.app --recipe R --run RUN --stage S`: a local page to draw from a checkpoint.

It listens on this machine alone, loads nothing from elsewhere and reports to nobody.
"""

import os
import random
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from errors import UserError, is_out_of_memory, users_message
from pipelines.command import parse_command, run_command
from pipelines.engine.progress import get_logger
from pipelines.engine.run import EngineConfig
from pipelines.recipe import TableConfig
from pixart.processes.specs import num_passes
from sampling.app_studio import DrawingStopped, Studio, Wish, wish_of
from sampling.config import SamplingConfig
from sampling.opening import find_trained_model
from sampling.prompts import NUM_SEEDS

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"
CSS = """
.gradio-container { max-width: 1240px !important; margin: auto; }
footer { display: none !important; }
#image img { width: 100%; height: 100%; object-fit: contain; }
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)) !important; }
"""
IMAGE_PIXELS = 600
MOST_STEPS, MOST_GUIDANCE = 250, 15
DAY_SECONDS = 86_400

log = get_logger("sampling")


class AppConfig(TableConfig):
    """Recipe table `[app]`."""

    port: int = pydantic.Field(default=7860, ge=1, le=65535, description="Port of 127.0.0.1 that the page is served at")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until interrupted."""
    command = parse_command("sampling.app", "A local page to draw from a checkpoint", argv=argv, has_stages=True)
    config = command.recipe.table("sampling", SamplingConfig)
    port = command.recipe.table("app", AppConfig).port
    studio = Studio(
        config,
        find_trained_model(config, command),
        run=command.run,
        name=f"{command.stage_name}-app",
        engine=command.recipe.table("engine", EngineConfig),
    )
    log.info(f"{studio.trained.name}: http://{HOST}:{port} · images go to {studio.folder} · Ctrl-C ends it")
    if command.is_plan:
        return
    require_free(port)
    page = build_page(studio)
    serve(page, port=port, folder=studio.folder)
    page.block_thread()


def require_free(port: int) -> None:
    """Check that nobody listens at the port of this machine.

    Raises:
        UserError: somebody does; names the key.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"app.port {port} of {HOST} cannot be used ({error.strerror}): choose another") from None


def build_page(studio: Studio) -> "gradio.Blocks":
    """Lay out the page and connect it with the studio."""
    # Read when Gradio is imported: no telemetry, no look at a server for newer versions.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    title = f"PixArt Atelier · {studio.trained.name}"
    # Gradio copies what it shows to its own cache; the copies go when the app ends.
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(DAY_SECONDS, DAY_SECONDS)) as page:
        gr.Markdown(f"## {title}")
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                fields = _add_fields(studio)
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", scale=3, elem_id="draw")
                    stop = gr.Button("Stop", scale=1, elem_id="stop")
            with gr.Column(scale=3, min_width=340):
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    format="png",
                    height=IMAGE_PIXELS,
                    interactive=False,
                    buttons=["download", "fullscreen"],  # and not Gradio's third one, which uploads
                    elem_id="image",
                )
                said = gr.Markdown("", elem_id="said")
        past = _add_history(studio)

        # Gradio finds the progress bar by this default.
        def draw(*values: Any, progress: Any = gr.Progress()) -> tuple[str, str, list[str]]:  # noqa: B008
            wish = _wish(values)

            def show(num_done: int) -> None:
                progress((num_done, num_passes(wish.solver, wish.num_steps)), desc=_progress(wish, num_done))

            path = _draw(studio, wish, on_step=show)
            return str(path), _describe(studio, wish, path), [str(item) for item in studio.history()]

        def bring_back(event: gr.SelectData) -> tuple[Any, ...]:
            path = studio.folder / Path(event.value["image"]["path"]).name
            try:
                wish = wish_of(path)
            except Exception as error:
                message = users_message(error)
                if message is None:
                    raise
                raise gr.Error(message, duration=None) from None
            return (str(path), _describe(studio, wish, path), *_values(wish))

        for event in (start.click, fields[0].submit):
            event(draw, fields, [image, said, past], concurrency_limit=1, concurrency_id="draw", show_progress_on=image)
        stop.click(studio.stop, queue=False)
        past.select(bring_back, None, [image, said, *fields])
    return page


def _add_fields(studio: Studio) -> list[Any]:
    """Lay out the settings; returns their components in the order of a `Wish`."""
    import gradio as gr

    first = studio.first_wish()
    prompt = gr.Textbox(first.prompt, label="Prompt", lines=3, elem_id="prompt", autofocus=True)
    negative = gr.Textbox(
        first.negative_prompt, label="Negative prompt", info="Empty: the null caption", elem_id="negative"
    )
    with gr.Row():
        size = gr.Dropdown(
            studio.sizes(),
            value=first.size,
            label="Size",
            info=f"Width x height, multiples of {studio.trained.patch_pixels}",
            allow_custom_value=True,
            elem_id="size",
        )
        solvers = studio.solvers()
        info = "iddpm wants 100 steps" if "iddpm" in solvers else "heun asks the model twice a step"
        solver = gr.Dropdown(solvers, value=first.solver, label="Sampler", info=info, elem_id="solver")
    with gr.Row():
        most_steps, most_guidance = max(MOST_STEPS, first.num_steps), max(MOST_GUIDANCE, first.guidance_scale)
        steps = gr.Slider(1, most_steps, first.num_steps, step=1, label="Steps", elem_id="steps")
        guidance = gr.Slider(1, most_guidance, first.guidance_scale, step=0.1, label="Guidance", elem_id="guidance")
    with gr.Row():
        seed = gr.Number(first.seed, label="Seed", precision=0, elem_id="seed")
        another = gr.Button("Another seed", elem_id="another")
    another.click(lambda: random.randrange(NUM_SEEDS), None, seed)
    return [prompt, negative, size, solver, steps, guidance, seed]


def _add_history(studio: Studio) -> "gradio.Gallery":
    import gradio as gr

    return gr.Gallery(
        [str(path) for path in studio.history()],
        label="History: a click brings image and settings back",
        height=220,
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="history",
    )


def serve(page: "gradio.Blocks", *, port: int, folder: Path) -> None:
    """Serve the page on this machine alone; returns when it answers."""
    from gradio.themes import Default

    folder.mkdir(parents=True, exist_ok=True)
    theme = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.queue(default_concurrency_limit=1).launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        footer_links=[],
        enable_monitoring=False,
        allowed_paths=[str(folder.absolute())],
        theme=theme,
        css=CSS,
    )


def _draw(studio: Studio, wish: Wish, *, on_step: Any) -> Path:
    """Draw, and show a mistake on the page until it is clicked away."""
    import gradio

    try:
        return studio.draw(wish, on_step=on_step)
    except DrawingStopped:
        raise gradio.Error("Nothing was kept.", title="Stopped", duration=5, print_exception=False) from None
    except Exception as error:
        message = users_message(error)
        if message is None:
            raise
        if is_out_of_memory(error):
            message = f"{wish.size} does not fit the memory of the device: choose a smaller size"
        raise gradio.Error(message, duration=None, print_exception=False) from None


def _wish(values: Sequence[Any]) -> Wish:
    prompt, negative, size, solver, steps, guidance, seed = values
    return Wish(
        prompt=prompt or "",
        negative_prompt=negative or "",
        size=str(size or "").strip(),
        solver=solver,
        num_steps=int(steps),
        guidance_scale=float(guidance),
        seed=int(seed or 0),
    )


def _values(wish: Wish) -> tuple[Any, ...]:
    return (
        wish.prompt,
        wish.negative_prompt,
        wish.size,
        wish.solver,
        wish.num_steps,
        wish.guidance_scale,
        wish.seed,
    )


def _progress(wish: Wish, num_done: int) -> str:
    """Say how many passes of the model are done: a step each, but for solvers that ask it more often."""
    if num_done == 0:
        return "reading the prompt"
    total = num_passes(wish.solver, wish.num_steps)
    return f"{'step' if total == wish.num_steps else 'pass'} {num_done} of {total}"


def _describe(studio: Studio, wish: Wish, path: Path) -> str:
    return f"seed {wish.seed} · {studio.config_of(wish).title} · `{path.name}`"


if __name__ == "__main__":
    sys.exit(run_command("app", main))

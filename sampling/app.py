"""`python -m sampling.app --recipe R --run RUN --stage S`: a local page to draw from a checkpoint.

It listens on this machine alone, loads nothing from elsewhere and reports to nobody.
"""

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError, is_out_of_memory, users_message
from pipelines.as_typed import typed_command
from pipelines.command import parse_command, run_command
from pipelines.engine.preflight import require_packages
from pipelines.engine.progress import get_logger
from pipelines.engine.run import EngineConfig
from pixart.processes.specs import num_passes
from sampling.app_control import ControlFields, MapPreviews, add_control
from sampling.app_fields import (
    ADAPTERS_FIELD,
    add_checkpoint,
    add_examples,
    add_fields,
    add_history,
    add_prompt,
    add_result,
    most_adapters,
    offer_what_is_there,
    values_of,
    wishes_of,
)
from sampling.app_studio import DrawingStopped, Studio, Wish, adapter_titles, has_lost_control, wish_of
from sampling.config import AppConfig, sampling_config, without_adapters
from sampling.opening import find_trained_model

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"
# On a wide screen the image stands beside what is asked and set; on a phone right below the button.
CSS = """
.gradio-container { max-width: 1240px !important; margin: auto; }
footer { display: none !important; }
#studio { display: grid !important; gap: 16px; align-items: start; }
#studio { grid-template: "ask result" auto "settings result" 1fr / 2fr 3fr; }
#ask { grid-area: ask; } #result { grid-area: result; } #settings { grid-area: settings; }
#studio > * { min-width: 0 !important; width: 100%; }
#another { align-self: end; }
#image { height: min(600px, 92vw) !important; }
#image img { width: 100%; height: 100%; object-fit: contain; }
#control-map img { width: 100%; height: 100%; object-fit: contain; }
#where code { overflow-wrap: anywhere; }
#studio input[role="combobox"] { text-overflow: ellipsis; margin-right: 26px; }
#examples button { text-align: left; }
#drawn .grid-wrap, #history .grid-wrap { padding-top: 30px; }
#drawn .grid-wrap { min-height: 0 !important; }
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)) !important; }
@media (max-width: 820px) {
  #studio { grid-template: "ask" "result" "settings" / 1fr; }
  #steps, #guidance { min-width: 100% !important; }
}
"""
# Gradio's own hints and its orange button have a contrast of 2 and 3; 4.5 is what WCAG AA asks for.
READABLE = {
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_300",
    "input_placeholder_color": "*neutral_500",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_hover_dark": "*primary_800",
}
MOST_IMAGES = 64
NO_IMAGES = "Nothing was kept."
DAY_SECONDS = 86_400

log = get_logger("sampling")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until interrupted."""
    command = parse_command("sampling.app", "A local page to draw from a checkpoint", argv=argv, has_stages=True)
    config = sampling_config(command)
    port = command.recipe.table("app", AppConfig).port
    studio = Studio(
        config,
        find_trained_model(without_adapters(config), command),
        run=command.run,
        name=f"{command.stage_name}-app",
        engine=command.recipe.table("engine", EngineConfig),
    )
    require_packages("gradio", "torch", "transformers", "diffusers")
    require_free(port)
    address = f"http://{HOST}:{port}"
    if command.is_plan:
        log.info(f"would serve {studio.trained.name} at {address} · images go to {studio.folder}")
        return
    log.info(f"{studio.trained.name} · images go to {studio.folder}")
    page = build_page(studio)
    command.remember()
    serve(page, port=port, folder=studio.folder)
    log.info(f"{address} · Ctrl-C ends it")
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

    title = "PixArt Atelier"
    # Gradio copies what it shows to its own cache; the copies go when the app ends.
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(DAY_SECONDS, DAY_SECONDS)) as page:
        gr.Markdown(f"## {title}\n`{studio.run}` · images are kept in its `samples/<stage>-app`", elem_id="where")
        with gr.Row(elem_id="studio"):
            with gr.Column(elem_id="ask"):
                prompt = add_prompt(studio)
                control = add_control(studio)
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", scale=3, min_width=120, elem_id="draw")
                    stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
            with gr.Column(elem_id="result"):
                image, said, drawn = add_result()
            with gr.Column(elem_id="settings"):
                checkpoint = add_checkpoint(studio)
                fields = [prompt, *add_fields(studio, control.fields)]
                count = gr.Slider(
                    1, 16, 1, step=1, label="Images of each prompt", info="Seeds in a row", elem_id="count"
                )
                add_examples(studio, prompt)
        past = add_history(studio)
        num_adapters = most_adapters(studio)

        # Gradio finds the progress bar by this default.
        def draw(folder: str, num_images: float, *values: Any, progress: Any = gr.Progress()) -> Iterator[list[Any]]:  # noqa: B008
            with _telling():
                is_led = studio.look_at(folder).branch is not None
            wishes = wishes_of(values, int(num_images), is_led=is_led)

            def show(number: int, num_done: int) -> None:
                total = num_passes(wishes[number].solver, wishes[number].num_steps)
                done = number * total + num_done
                progress((done, len(wishes) * total), desc=_progress(wishes, number, num_done))

            shown: list[tuple[str, str]] = []
            for path in _draw(studio, folder, wishes, on_step=show):
                wish = wishes[len(shown)]
                shown.append((str(path), f"seed {wish.seed}"))
                gallery = gr.Gallery(shown, visible=len(wishes) > 1)
                yield [str(path), _describe(studio, wish, path), gallery, [str(item) for item in studio.history()]]

        def look_at(event: gr.SelectData) -> tuple[Any, ...]:
            """Show one of the images of a drawing, and leave the fields as they are."""
            path = studio.folder / Path(event.value["image"]["path"]).name
            return str(path), _describe(studio, _read(path), path)

        def bring_back(event: gr.SelectData) -> tuple[Any, ...]:
            path = studio.folder / Path(event.value["image"]["path"]).name
            wish = _read(path)
            return (str(path), _describe(studio, wish, path), *values_of(wish, num_adapters=num_adapters))

        def change(folder: str) -> tuple[Any, ...]:
            """Offer the sizes, solvers and steps of another checkpoint; it is loaded when it draws."""
            with _telling():
                trained = studio.look_at(folder)
            sizes, solvers, config = studio.sizes(trained), studio.solvers(trained), studio.settings_of(trained)
            solver = gr.Dropdown(solvers, value=config.solver if config.solver in solvers else solvers[0])
            size = gr.Dropdown(sizes, value=sizes[0])
            return size, solver, config.num_steps, config.guidance_scale, *control.shown_for(trained)

        results = [image, said, drawn, past]
        offer_what_is_there(page, studio, checkpoint, fields[ADAPTERS_FIELD], past)
        for event in (start.click, prompt.submit):
            inputs = [checkpoint, count, *fields]
            event(draw, inputs, results, concurrency_limit=1, concurrency_id="draw", show_progress_on=image)
        stop.click(studio.stop, queue=False)
        drawn.select(look_at, None, [image, said])
        past.select(bring_back, None, [image, said, *fields])
        checkpoint.input(change, checkpoint, [*fields[2:6], *control.shown])
        _show_maps(page, studio, checkpoint, control, fields[2])
    return page


def _show_maps(page: Any, studio: Studio, checkpoint: Any, control: ControlFields, size: Any) -> None:
    """Show the map that an image gives at the size that is set, which follows a new image."""
    import gradio as gr

    maps = MapPreviews(studio)

    def preview(folder: str, file: str | None, kind: str, size: str) -> Any:
        if not file or studio.look_at(folder).branch is None:
            return gr.Image(None, visible=False)
        with _telling():
            wish = replace(studio.first_wish(), control=file, control_is=kind, size=size)
            picture, shown = maps.of(folder, wish)
        return gr.Image(picture, visible=True, label=f"Leads what is drawn, {shown}")

    def follow(folder: str, file: str, kind: str) -> str:
        with _telling():
            return maps.of(folder, replace(studio.first_wish(), control=file, control_is=kind, size=""))[1]

    what_leads = [checkpoint, control.file, control.kind, size]
    control.file.upload(follow, what_leads[:3], size, show_progress="hidden")
    for event in (control.file.change, control.kind.change, size.change, checkpoint.change, page.load):
        event(preview, what_leads, control.preview, show_progress="hidden")


def serve(page: "gradio.Blocks", *, port: int, folder: Path) -> None:
    """Serve the page on this machine alone; returns when it answers."""
    from gradio.themes import Default

    folder.mkdir(parents=True, exist_ok=True)
    theme = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(**READABLE)
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


@contextmanager
def _telling() -> Iterator[None]:
    """Show a mistake on the page until it is clicked away."""
    import gradio

    try:
        yield
    except Exception as error:
        message = users_message(error)
        if message is None:
            raise
        if is_out_of_memory(error):
            message = "the image does not fit the memory of the device: choose a smaller size"
        raise gradio.Error(message, duration=None, print_exception=False) from None


def _draw(studio: Studio, checkpoint: str, wishes: Sequence[Wish], *, on_step: Any) -> Iterator[Path]:
    """Draw, and show on the page what went wrong and what is kept."""
    import gradio

    num_kept = 0
    try:
        with _telling():
            if len(wishes) > MOST_IMAGES:
                others = f"`{typed_command('sample')}` draws any number"
                raise UserError(f"{len(wishes)} images are more than {MOST_IMAGES} at a time; {others}")
            studio.choose(checkpoint)
            for path in studio.draw_all(wishes, on_step=on_step):
                num_kept += 1
                yield path
    except DrawingStopped:
        kept = f"{num_kept} of {len(wishes)} images were drawn and are kept." if num_kept else NO_IMAGES
        raise gradio.Error(kept, title="Stopped", duration=5, print_exception=False) from None


def _read(path: Path) -> Wish:
    with _telling():
        return wish_of(path)


def _progress(wishes: Sequence[Wish], number: int, num_done: int) -> str:
    """Say how many passes of the model are done: a step each, but for solvers that ask it more often."""
    of_images = f"image {number + 1} of {len(wishes)} · " if len(wishes) > 1 else ""
    if num_done == 0:
        return f"{of_images}reading the prompt"
    total = num_passes(wishes[number].solver, wishes[number].num_steps)
    return f"{of_images}{'step' if total == wishes[number].num_steps else 'pass'} {num_done} of {total}"


def _describe(studio: Studio, wish: Wish, path: Path) -> str:
    led = [] if wish.control is None else [f"control at {wish.control_strength:g}"]
    said = [f"seed {wish.seed}", studio.config_of(wish).title, *led, *adapter_titles(path), f"`{path.name}`"]
    if not studio.is_of_chosen(path):
        said.append("drawn from another checkpoint than the one chosen")
    said += [f"adapter {name} is gone or another now" for name in studio.changed_adapters(path)]
    said += ["the image that led it is gone"] if has_lost_control(path) else []
    return " · ".join(said)


if __name__ == "__main__":
    sys.exit(run_command("app", main))

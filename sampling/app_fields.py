"""The fields of the app's page: what they offer, the wishes that they say, and how they show one."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from errors import UserError
from pipelines.store.bases import RUN
from sampling.app_choices import adapter_choices, checkpoint_choices, example_prompts
from sampling.app_studio import Studio, Wish
from sampling.prompts import NUM_SEEDS

if TYPE_CHECKING:
    import gradio

MOST_STEPS, MOST_GUIDANCE = 250, 15
# Sliders for the weights of adapters, and how far they go; a recipe may have more of both.
MOST_ADAPTERS, MOST_WEIGHT = 4, 2.0
# Where the choice of adapters stands among the fields.
ADAPTERS_FIELD = 11


def add_prompt(studio: Studio) -> Any:
    """Lay out the box of prompts."""
    import gradio as gr

    return gr.Textbox(
        studio.first_wish().prompt,
        label="Prompt",
        info="Several lines are several prompts",
        placeholder="What to draw",
        lines=2,
        max_lines=8,
        elem_id="prompt",
        autofocus=True,
    )


def add_result() -> tuple[Any, Any, Any]:
    """Lay out the large image, what is said of it, and the images of a drawing of several."""
    import gradio as gr

    image = gr.Image(
        label="Image",
        type="filepath",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],  # and not Gradio's third one, which uploads
        elem_id="image",
    )
    said = gr.Markdown("", elem_id="said")
    drawn = gr.Gallery(
        label="Drawn: a click shows it large",
        columns=4,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        visible=False,
        elem_id="drawn",
    )
    return image, said, drawn


def add_checkpoint(studio: Studio) -> Any:
    """Lay out the choice of checkpoints: those of the run, and the one that the command names, if that is another."""
    import gradio as gr

    choices = checkpoint_choices(studio.run, (studio.trained.name, studio.checkpoint))
    info = "Those that draw prompts; weights are loaded when an image is drawn"
    return gr.Dropdown(choices, value=studio.checkpoint, label="Checkpoint", info=info, elem_id="checkpoint")


def add_examples(studio: Studio, prompt: Any) -> None:
    """Lay out prompts to try, where the run knows any: a click puts one into the box."""
    import gradio as gr

    if prompts := example_prompts(studio.config, studio.run):
        gr.Examples([[text] for text in prompts], [prompt], label="Examples", elem_id="examples", cache_examples=False)


def add_fields(studio: Studio, control: Sequence[Any]) -> list[Any]:
    """Lay out the settings; returns their components in the order of `values_of`, less the prompt.

    `control` are those of what leads images, which stand elsewhere.
    """
    import gradio as gr

    first = studio.first_wish()
    negative = gr.Textbox(
        first.negative_prompt, label="Negative prompt", info="Empty: the null caption", elem_id="negative"
    )
    with gr.Row():
        size = gr.Dropdown(
            studio.sizes(),
            value=first.size,
            label="Size",
            info=f"Multiples of {studio.trained.patch_pixels}",
            allow_custom_value=True,
            elem_id="size",
        )
        solvers = studio.solvers()
        info = "iddpm wants 100 steps" if "iddpm" in solvers else "heun asks the model twice a step"
        solver = gr.Dropdown(solvers, value=first.solver, label="Sampler", info=info, elem_id="solver")
    with gr.Row():
        most_steps, most_guidance = max(MOST_STEPS, first.num_steps), max(MOST_GUIDANCE, first.guidance_scale)
        steps = gr.Slider(1, most_steps, first.num_steps, step=1, label="Steps", buttons=[], elem_id="steps")
        guidance = gr.Slider(
            1, most_guidance, first.guidance_scale, step=0.1, label="Guidance", buttons=[], elem_id="guidance"
        )
    with gr.Row():
        seed = gr.Number(first.seed, label="Seed", precision=0, elem_id="seed")
        another = gr.Button("Another seed", elem_id="another")
    another.click(lambda: random.randrange(NUM_SEEDS), None, seed)
    eight_bits = gr.Checkbox(
        first.weight_dtype == "int8",
        label="Weights in 8 bits",
        info="Half of the transformer's memory, and all but the same image",
        elem_id="eight-bits",
    )
    return [negative, size, solver, steps, guidance, seed, eight_bits, *control, *_add_adapters(studio)]


def most_adapters(studio: Studio) -> int:
    """Return how many adapters the page has room for."""
    return max(MOST_ADAPTERS, len(studio.first_wish().lora))


def _add_adapters(studio: Studio) -> list[Any]:
    """Lay out the choice of adapters, and a weight for each that is chosen.

    Returns the components of the choice, of the weights, and of what the weights are of.
    """
    import gradio as gr

    first, num_most = studio.first_wish(), most_adapters(studio)
    chosen = gr.Dropdown(
        adapter_choices(studio.run, first.lora),
        value=list(first.lora),
        multiselect=True,
        allow_custom_value=True,
        max_choices=num_most,
        label="Adapters (LoRA)",
        info="A checkpoint's own has weight 1 unless chosen here",
        elem_id="adapters",
    )
    path = gr.Textbox(
        label="Another adapter", placeholder="Path of a file or folder, and Enter", max_lines=1, elem_id="adapter-path"
    )
    shown = gr.State(list(first.lora))
    weights = [
        gr.Slider(**settings, step=0.05, elem_id=f"weight-{number}", elem_classes="weight")
        for number, settings in enumerate(_slider_settings(first.lora, first.lora_weights, num_adapters=num_most))
    ]

    def follow(locations: list[str], former: list[str], *values: float) -> list[Any]:
        """Give each adapter that is chosen a slider; one that was there before keeps its weight."""
        known = dict(zip(former, values, strict=False))
        wanted = [known.get(location, 1.0) for location in locations]
        sliders = _slider_settings(locations, wanted, num_adapters=num_most)
        return [*(gr.Slider(**settings) for settings in sliders), locations]

    def add(location: str, locations: list[str], former: list[str], *values: float) -> list[Any]:
        """Choose the adapter of a path, too; whether it is one is seen when it draws."""
        typed = [location.strip()] if location.strip() else []
        wanted: list[str] = list(dict.fromkeys([*locations, *typed]))[:num_most]
        return [gr.Dropdown(value=wanted), "", *follow(wanted, former, *values)]

    path.submit(
        add, [path, chosen, shown, *weights], [chosen, path, *weights, shown], queue=False, show_progress="hidden"
    )
    chosen.input(follow, [chosen, shown, *weights], [*weights, shown], queue=False, show_progress="hidden")
    return [chosen, *weights, shown]


def _slider_settings(locations: Sequence[str], weights: Sequence[float], *, num_adapters: int) -> list[dict[str, Any]]:
    """Return what each slider shows: the weight of its adapter, or nothing."""
    given = list(zip(locations, weights, strict=True))
    settings = []
    for location, weight in given + [("", 1.0)] * (num_adapters - len(given)):
        most = max(MOST_WEIGHT, abs(weight))
        label = f"Weight of {location.removeprefix(f'{RUN}/training/')}"
        settings.append({"minimum": -most, "maximum": most, "value": weight, "label": label, "visible": bool(location)})
    return settings


def add_history(studio: Studio) -> "gradio.Gallery":
    """Lay out the images that were drawn before."""
    import gradio as gr

    return gr.Gallery(
        label="History: a click brings image and settings back",
        height=220,
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="history",
    )


def offer_what_is_there(page: Any, studio: Studio, checkpoint: Any, adapters: Any, past: Any) -> None:
    """Look at checkpoints, adapters and images each time that the page is opened: beside it, others are made."""
    import gradio as gr

    named = studio.trained.name, studio.checkpoint

    def look() -> list[Any]:
        choices = checkpoint_choices(studio.run, named), adapter_choices(studio.run, studio.config.lora)
        return [*map(gr.Dropdown, choices), [str(path) for path in studio.history()]]

    page.load(look, None, [checkpoint, adapters, past], queue=False, show_progress="hidden")


def wishes_of(values: Sequence[Any], num_images: int, *, is_led: bool = False) -> list[Wish]:
    """A wish for each image: every line that is not blank is a prompt, and its images take seeds in a row.

    What leads images counts where the checkpoint has a branch for it (`is_led`).
    """
    prompt, negative, size, solver, steps, guidance, seed, has_eight_bits, control, kind, strength, *others = values
    locations, *weights, _ = others
    locations = [location.strip() for location in locations or []]
    first = Wish(
        prompt="",
        negative_prompt=negative or "",
        size=str(size or "").strip(),
        solver=solver,
        num_steps=int(steps),
        guidance_scale=float(guidance),
        seed=int(seed or 0),
        weight_dtype="int8" if has_eight_bits else None,
        **({"control": control, "control_is": kind, "control_strength": float(strength)} if is_led and control else {}),
        lora=tuple(locations),
        lora_weights=tuple(float(weight) for weight in weights[: len(locations)]),
    )
    lines = [line.strip() for line in (prompt or "").splitlines() if line.strip()] or [""]
    seeds = [(first.seed + number) % NUM_SEEDS if number else first.seed for number in range(num_images)]
    return [replace(first, prompt=line, seed=seed) for line in lines for seed in seeds]


def values_of(wish: Wish, *, num_adapters: int) -> tuple[Any, ...]:
    """Return what the fields show of a wish, on a page with room for so many adapters.

    Raises:
        UserError: it has more of them.
    """
    import gradio as gr

    if len(wish.lora) > num_adapters:
        raise UserError(f"the image was drawn with {len(wish.lora)} adapters, and the page has room for {num_adapters}")
    return (
        wish.prompt,
        wish.negative_prompt,
        wish.size,
        wish.solver,
        wish.num_steps,
        wish.guidance_scale,
        wish.seed,
        wish.weight_dtype == "int8",
        wish.control,
        wish.control_is,
        wish.control_strength,
        list(wish.lora),
        *(gr.Slider(**item) for item in _slider_settings(wish.lora, wish.lora_weights, num_adapters=num_adapters)),
        list(wish.lora),
    )

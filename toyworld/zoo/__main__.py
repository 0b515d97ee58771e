"""`python -m toyworld.zoo [vae] [t5] [llava] [clip] …`: make models anew, over their weights; all if none is named."""

import argparse
import sys
import time
from pathlib import Path

from errors import UserError
from pipelines.command import run_command
from pipelines.engine.progress import get_logger

log = get_logger("toyworld.zoo")

# In the order of training: judge and dit need the VAE, clip begins with llava's vision tower, heads need the CLIP.
NAMES = ("vae", "vae-8", "t5", "llava", "judge", "dit", "clip", "heads")
RELEASED = "pixart"  # trained by `make demo-paper`, which needs all of these
RELEASED_FOLDER = Path(__file__).parent.parent / "released" / RELEASED
WEIGHTS = Path(__file__).parent.parent / "weights"


def train(name: str, weights: Path) -> None:
    """Train one model and save it in its folder below `weights`."""
    import torch

    torch.set_num_threads(1)  # the networks are too small for more
    folder, vae_folder = weights / name, weights / "vae"
    if name in ("vae", "vae-8"):
        from toyworld.zoo import vae

        vae.train(name, folder)
    elif name == "t5":
        from toyworld.zoo import text_encoder

        text_encoder.train(folder)
    elif name == "llava":
        from toyworld.zoo import captioner, questions

        captioner.train(folder)
        questions.teach(folder)
    elif name == "judge":
        from toyworld.zoo import judge_training

        judge_training.train(folder, vae_folder=vae_folder)
    elif name == "clip":
        from toyworld.zoo import clip

        clip.train(folder, captioner_folder=weights / "llava")
    elif name == "heads":
        from toyworld.zoo import heads

        heads.train(folder, clip_folder=weights / "clip")
    else:
        from toyworld.zoo import class_conditional

        class_conditional.train(folder, vae_folder=vae_folder)


def main() -> None:
    """Train the models that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m toyworld.zoo", description="Train the embedded models anew.")
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"any of {', '.join(NAMES)}; all when none is given; or {RELEASED}"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder that holds one folder per model")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo-paper"), help=f"finished demo-paper that gives {RELEASED}"
    )
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in (*NAMES, RELEASED):
            raise UserError(f"{name!r} is not one of {', '.join((*NAMES, RELEASED))}")
    for name in NAMES:
        if name in arguments.names or not arguments.names:
            start = time.monotonic()
            train(name, arguments.weights)
            log.info("%s trained in %.0f minutes", name, (time.monotonic() - start) / 60)
    if RELEASED in arguments.names:
        from toyworld.zoo import released

        released.release(arguments.run, RELEASED_FOLDER)


if __name__ == "__main__":
    sys.exit(run_command("zoo", main))

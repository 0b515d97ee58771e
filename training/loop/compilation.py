"""Whether blocks are compiled with torch.compile."""

from errors import UserError
from pixart.compilation import pays_to_compile, require_compiler
from training.config import StageTraining


def is_compiled(settings: StageTraining) -> bool:
    """Whether this rank compiles its blocks; "auto" does where there are CUDA and a C++ compiler, and not ZeRO 3."""
    if settings.compile != "auto":
        return settings.compile
    return settings.zero_stage < 3 and pays_to_compile()


def is_step_compiled(settings: StageTraining) -> bool:
    """Whether what an optimizer computes is compiled: with the blocks, and not on a CPU that steps for a GPU."""
    return is_compiled(settings) and settings.offload != "optimizer"


def require_compilable(settings: StageTraining) -> None:
    """Refuse to compile what ZeRO 3 takes apart, and where there is no compiler, if the recipe insists on it."""
    if settings.compile is not True:
        return
    require_compiler(key="training.compile")
    if settings.zero_stage == 3:
        raise UserError(
            "training.compile = true does not go with training.zero_stage = 3, which gathers weights inside a block; "
            "choose ZeRO 0, 1 or 2, or training.compile = false"
        )

"""What an optimizer of matrices does not go with; nothing here needs torch."""

from errors import UserError
from training.config import StageTraining


def require_whole_matrices(settings: StageTraining) -> None:
    """Refuse to orthogonalise what ranks have only shares of.

    Raises:
        UserError: the stage shares out what the optimizer steps.
    """
    if settings.optimizer == "muon" and settings.zero_stage > 0:
        raise UserError(
            f"training.optimizer = 'muon' wants whole matrices, and training.zero_stage = {settings.zero_stage} leaves "
            "a rank shares of them: set training.zero_stage = 0, or training.optimizer = 'adamw'"
        )

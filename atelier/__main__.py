"""`atelier <sub-command> --flags`, also `python -m atelier`."""

import sys

from atelier.safe_path import keep_safe_path


def main() -> int:
    """Run what is typed and return the exit status: 2 with one line for what a user can mend, a missing package too."""
    keep_safe_path()
    try:
        from atelier.door import main as open_door
    except ModuleNotFoundError as error:
        from errors import users_message

        message = users_message(error)
        if message is None:
            raise
        sys.stderr.write(f"atelier: {message}\n")
        return 2
    return open_door(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

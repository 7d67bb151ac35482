"""The one kind of error that the command line turns into one line."""

from __future__ import annotations


class CommandError(Exception):
    """Something the user can put right; the text names it, what was expected, and the remedy.

    Args:
        message: one line.
        code: exit status of the command: 2 for what was asked, 1 for what failed on the way.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code

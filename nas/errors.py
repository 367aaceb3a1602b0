"""The exception a user's mistake raises, a training that fails, and errors in one line."""


class UserError(Exception):
    """Bad input or environment: one line that says what is wrong and what would be right."""


class TrainingError(UserError):
    """A training whose loss is no longer finite. epoch: the one it was in, from 1."""

    def __init__(self, message: str, epoch: int) -> None:
        super().__init__(message)
        self.epoch = epoch


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters of it."""
    return str(error).strip().splitlines()[0][:200]

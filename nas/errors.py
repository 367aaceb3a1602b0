"""The one exception a user's mistake raises, and errors in one line."""


class UserError(Exception):
    """Bad input or environment: one line that says what is wrong and what would be right."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters of it."""
    return str(error).strip().splitlines()[0][:200]

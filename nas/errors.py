"""The one exception a user's mistake raises."""


class UserError(Exception):
    """Bad input or environment: one line that says what is wrong and what would be right."""

"""The one error that a user is meant to read."""

UNFINISHED = 75  # EX_TEMPFAIL: the work is not done, and the same command goes on with it
HOPELESS = 78  # EX_CONFIG: the same command fails in the same way; a cluster must not try it again


class MoultError(Exception):
    """Something the user can fix: `what` is wrong and where, `fix` is what to do about it.

    `exit_code` is what the stage ends with: 1 for bad input, UNFINISHED, or HOPELESS.
    """

    def __init__(self, what: str, fix: str = "", exit_code: int = 1):
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.what}\n  -> {self.fix}" if self.fix else self.what


def some(items, limit: int = 5) -> str:
    """The first few of `items`, and how many more there are: 'a, b, c and 12 more'."""
    items = [str(item) for item in items]
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit:,} more"

"""The one kind of error that is the user's to mend."""


class InputError(ValueError):
    """Wrong input from outside: a path, a file, a flag, a recipe.

    The message is one line that names what is wrong and how to mend it. Command lines print it alone, without a
    traceback, and exit with status 2 (`litvit.cli.run`); library callers meet an ordinary `ValueError`.
    """

    def __str__(self) -> str:
        # A DataLoader hands on its worker's error with the worker's traceback as message; the last line is the error.
        lines = super().__str__().strip().splitlines() or [""]
        return lines[-1].removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")

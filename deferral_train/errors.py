"""One-line errors. Knows nothing about the rest of the package."""


class InputError(ValueError):
    """Something the user can mend: the message names the field, the value and the remedy, in one line.

    The command line prints the message without a traceback and exits with 2.
    """


class MissingExtraError(InputError):
    """A command was asked for whose optional dependencies are not installed.

    Args:
        module: the import that failed, for example ``"transformers"``.
        extra: the extra that brings it, for example ``"train"``.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed; run: pip install 'deferral-train[{extra}]'")
        self.module = module
        self.extra = extra

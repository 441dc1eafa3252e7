"""The one exception that users are meant to see: a sentence that names the file or field and the likely mend."""


class UserError(ValueError):
    """Bad input. The command line prints the message without a traceback and exits with status 2."""


class LeftOut(UserError):
    """Of a sample that is whole, and not what the recipe asks for: another view, a report without such sections."""

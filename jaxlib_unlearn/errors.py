"""The exception for mistakes in the user's input."""


class UserError(ValueError):
    """Bad input from the user: files, data, weights or options.

    The message is one line that says what is wrong, where, and what to do. Programs print
    ``error: <message>`` on stderr and exit with code 2; programmer errors raise ``ValueError`` or
    ``TypeError`` instead.

    Example:
        >>> str(UserError("no split 'forget02' in DIR; use one of forget01, forget05, forget10"))
        "no split 'forget02' in DIR; use one of forget01, forget05, forget10"
    """

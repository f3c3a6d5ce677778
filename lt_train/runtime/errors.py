"""Errors that are the user's to mend: shown without a traceback, exit code 2. Anything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Something the user gave (recipe, file, checkpoint, command line) cannot be used.

    The message names the setting or file, the value, the reason and the fix.
    """

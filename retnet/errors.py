"""The one exception for what a user did wrong."""


class UserError(ValueError):
    """A mistake in a configuration, a file or an argument.

    The message is one line that names the key or file, its value and the fix. The entry points
    print it as ``error: <message>`` and exit with code 2; anything else keeps its traceback.
    """

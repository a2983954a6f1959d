"""The one exception that a person is meant to read."""


class UserError(Exception):
    """Bad input from outside: one sentence that names the file or value and says what to do.

    The command line prints the sentence and exits with code 2; everything else that is raised is
    a fault of the library and keeps its traceback.
    """

"""Errors about bad input: each names the argument, its value and the remedy in one line."""


class StudyError(ValueError):
    """Bad input to a study. The command line prints it as one line and exits with code 2."""


class DataError(ValueError):
    """The data cannot be used; the message says why and what to do."""


class FactoryError(ValueError):
    """A factory cannot be found; the message says why and what to do."""

"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in what the user asked for, said in one sentence.

    The command line prints the sentence on stderr and exits with code 2, as it does for what the
    system refuses (``OSError``). Every other exception is a defect of ours and keeps its traceback.
    """

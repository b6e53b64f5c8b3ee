"""What can be wrong with a command line of the server. Messages begin with the flag and say what to do."""


class FlagError(ValueError):
    """The server would not start with these arguments."""


class UnservedFlagError(FlagError):
    """A flag of vLLM's asks for what this server does not do."""

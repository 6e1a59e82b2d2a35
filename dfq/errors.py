"""The one exception a user should ever meet.

Every mistake of the user's ends as one line that says what was got, what is allowed and what to do;
the command line prints it and exits with status 2. Anything else that reaches the terminal is a bug of ours.
"""


class UserError(ValueError):
    """A mistake in what the user asked for, in one line: what was got, what is allowed, what to do."""

    def __init__(self, got: str, allowed: str = "", do: str = ""):
        self.got, self.allowed, self.do = got, allowed, do
        super().__init__("; ".join(part for part in (got, f"allowed: {allowed}" if allowed else "", do) if part))


def did_you_mean(word: str, words) -> str:
    """``"did you mean 'zeroq'?"``, or an empty string where nothing is close."""
    import difflib

    close = difflib.get_close_matches(word, list(words), n=1)
    return f"did you mean '{close[0]}'?" if close else ""

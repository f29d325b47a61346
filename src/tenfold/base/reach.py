"""How far back a token sees: what a model says of a layer, and what the ledger of pages goes by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reach:
    """The tokens of its sequence that a token sees, besides that none comes after it.

    Attributes:
        window: the last so many, itself included; None sees all.
        chunk: those of its own chunk, where the sequence is cut into chunks of so many from its start; None sees all.
        recurrent: all that it sees of those before it is a state: what is held is not an entry for every token, but for
            every block of tokens the state after the last one of them.
    """

    window: int | None = None
    chunk: int | None = None
    recurrent: bool = False

    @property
    def limited(self) -> bool:
        """Whether there are tokens that a long sequence's last ones do not see."""
        return self.window is not None or self.chunk is not None

    @property
    def most(self) -> int | None:
        """The most tokens that one sees; None without a limit."""
        return min((size for size in (self.window, self.chunk) if size is not None), default=None)

    def first(self, position: int) -> int:
        """The first position that the token at `position` sees."""
        windowed = 0 if self.window is None else max(0, position - self.window + 1)
        return windowed if self.chunk is None else max(windowed, position // self.chunk * self.chunk)


FULL = Reach()
RECURRENT = Reach(window=2, recurrent=True)  # the state after the token before, and its own

"""Points at which all ranks agree to go on or to stop, and at which the weights are those of a whole step."""

from medvlm.errors import UserError
from medvlm.training import distributed, preemption


class Stop(UserError):
    """Raised on all ranks alike, where a checkpoint of the last whole step can be written."""


class Interrupted(Stop):
    """A rank got a signal."""


def sum_and_agree(values: list[float], trouble: str | None) -> list[float]:
    """The values summed over ranks. Raises `Interrupted` on all ranks if one got a signal, `Stop` if one has trouble.

    A rank that cannot read its batch comes here all the same, with the reason, so that no other waits for it.
    """
    flags = [float(preemption.requested()), float(trouble is not None)]
    *sums, interrupted, troubled = distributed.sum_over_ranks([*values, *flags])
    if interrupted:
        raise Interrupted("interrupted")
    if troubled:
        raise Stop(named(trouble))
    return sums


def named(reason: str | None) -> str:
    """The first reason that a rank has, with its rank, and how many others have one. All ranks call this."""
    found = [(rank, text) for rank, text in enumerate(distributed.gather(reason)) if text is not None]
    more = f" (and {len(found) - 1} other ranks)" if len(found) > 1 else ""
    return f"rank {found[0][0]}: {found[0][1]}{more}"

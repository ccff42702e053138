"""Words of messages: how many of something, and what was probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number and what it counts: "1 image", "1,200 images".

    Args:
        number: of them.
        one: what it counts, as it is said of one; may go on with a verb: "image was left out".
        many: as it is said of several. Default: `one` with an s.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def one_of_processes(title: str, processes: int) -> str:
    """The title of a progress bar that counts the work of one process alone.

    Args:
        title: of the bar.
        processes: that share the work.
    """
    return title if processes == 1 else f"{title} (one of {processes} processes)"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """What is put behind a name that is none of the known ones, with its colon and in place of a full stop.

    Args:
        given: the name.
        known: the names that there are.

    Returns:
        ": did you mean NAME?", or nothing where no name is near.
    """
    near = get_close_matches(str(given), [str(name) for name in known], n=1, cutoff=0.7)
    return f": did you mean {near[0]}?" if near else ""

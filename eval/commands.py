"""Options of a command, and how it ends over an error that is its user's: in one line."""

import argparse
import dis
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, StrictDataclassError

from reading.wording import did_you_mean


ROOT = Path(__file__).resolve().parents[1]
# of the machine, the network, the hub and its data sets, and of the fields of a configuration
OUTSIDE = (OSError, DatasetsError, HFValidationError, StrictDataclassError)
# what huggingface_hub lets through without a network; the first is its HTTP library's, httpx or httpx2 by its version
UNREACHABLE = (HfHubHTTPError.__bases__[0], OfflineModeIsEnabled)
SAID = (ValueError, RuntimeError, FloatingPointError)  # if a file of ours names them
SECONDS_FOR_THE_MAIN_PROCESS = 5.0  # launchers look for processes that have ended many times a second


class CommandParser(argparse.ArgumentParser):
    """Options of a command. A mistake in them ends it in one line, with exit code 2, that names the nearest option or
    value; what is missing is said after what is unknown, which may be meant for it.

    Args:
        description: the docstring of the command, which `--help` shows as it is written.
        options: of `argparse.ArgumentParser`.
    """

    def __init__(self, description: str, **options) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        args = sys.argv[1:] if args is None else list(args)
        self.refuse_unknown(args[: args.index("--")] if "--" in args else args)
        return super().parse_known_args(args, namespace)

    def refuse_unknown(self, words: list[str], where: str = "") -> None:
        """Ends the command over the first word that looks like an option and is none.

        Args:
            words: of a command line.
            where: what is said before, such as the name of a file that they are from.
        """
        known = self._option_string_actions
        for name in (word.partition("=")[0] for word in words):
            begun = self.allow_abbrev and any(option.startswith(name) for option in known)
            if re.fullmatch(r"--\w[\w-]*", name) and name not in known and not begun:
                shown = [option for action in self._actions for option in action.option_strings]
                self.error(f"{where}there is no option {name}{did_you_mean(name, shown) or ': see --help.'}")

    def _check_value(self, action: argparse.Action, value) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, action.choices)
            raise

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # the usage would be all options, before the one line


@contextmanager
def ends_in_one_line(*also: type[Exception], smaller: str | None = None):
    """Around a command, `with ends_in_one_line():` or `@ends_in_one_line()`: an error that is its user's to mend ends
    it with exit code 1 and the message on stderr; a defect keeps its traceback.

    The user's are the errors of `SAID` that a `raise` in a file of this repository names, and those of `OUTSIDE`,
    wherever they come from, and memory that ran out. Of several processes that end over the same
    error only the main one says it: the launcher ends the others while they wait.

    Args:
        also: classes that are the user's in this block if any `raise` names them, such as ValueError where a library
            looks at nothing but the user's options.
        smaller: the options of the command that decide how much memory it takes. `None`: memory that ran out is left
            to the block around this one.

    Raises:
        SystemExit: in place of such an error, and of Ctrl-C, with the shell's code for that.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        print(
            f"{Path(sys.argv[0]).name}: interrupted. What can be resumed goes on when the same command is given again.",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(130) from error
    except Exception as error:
        is_raised, is_ours = _origin(error)
        said_here = is_raised and is_ours and isinstance(error, SAID)
        ran_out = smaller is not None and memory_ran_out(error)
        outside = isinstance(error, OUTSIDE + UNREACHABLE)
        if not (ran_out or said_here or outside or (is_raised and isinstance(error, also))):
            raise
        # libraries spread what they say over many lines; ours are as they should be
        message = str(error) if said_here else " ".join(str(error).split())
        if ran_out:
            piece = re.search(r"allocate ([\d.]+ \w+)", message)
            asked = f" when {piece[1]} more were needed" if piece else ""
            message = f"The memory did not suffice{asked}: lower {smaller}."
        elif isinstance(error, UNREACHABLE) and not isinstance(error, HfHubHTTPError):  # that is an answer
            message = (
                f"The hub could not be reached ({message or type(error).__name__}): check the connection, HF_ENDPOINT "
                "and HF_HUB_OFFLINE, and give the same command again. What is on this disk needs no network."
            )
        if int(os.environ.get("RANK", 0)) != 0:
            time.sleep(SECONDS_FOR_THE_MAIN_PROCESS)
        sys.stdout.flush()
        print(f"{Path(sys.argv[0]).name}: error: {message or type(error).__name__}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def memory_ran_out(error: Exception) -> bool:
    """Whether an error is PyTorch's or NumPy's of a CPU or a GPU without enough memory; also out of a worker that loads
    data, which passes it on as text."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = ("can't allocate memory", "not enough memory", "out of memory", "Unable to allocate")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def _origin(error: Exception) -> tuple[bool, bool]:
    """Whether a `raise` names an error, or something that was called gave it; and whether a file of ours did."""
    innermost = error.__traceback__
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    code = innermost.tb_frame.f_code
    path = Path(code.co_filename).resolve()
    is_ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
    return code.co_code[innermost.tb_lasti] == dis.opmap["RAISE_VARARGS"], is_ours

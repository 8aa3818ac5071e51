"""UniFashion from scratch: one fashion model for retrieval, captions, try-on and design (arXiv 2408.11305)."""

import argparse
import os
import select
import sys
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """What the user asked for cannot be done as asked: the scripts print it as one line and exit with code 2."""


def module() -> str | None:
    """The name of what runs as `python -m NAME`, None of a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec and spec.name


def program() -> str:
    """What complaints begin with: "eval.retrieval", "train_phase1.py"."""
    return module() or Path(sys.argv[0]).name


def exit_if_unread() -> None:
    """Exit code 141, as of SIGPIPE, if stdout is a pipe that nobody reads any more, as after `| head`; else nothing."""
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)
    if any(event & select.POLLERR for _, event in asked.poll(0)):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # for what Python still writes when it ends
        sys.exit(141)


class Parser(argparse.ArgumentParser):
    """argparse, but flags are written out, and its complaint is one line like every other, without the usage before it."""

    def __init__(self, **kwargs) -> None:
        if name := module():  # as Python does it from 3.14 on
            kwargs.setdefault("prog", f"python -m {name}")
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += " (a value that starts with a minus is written --flag=-1)"
        raise UserError(message)

"""The command `distmuon`: which commands there are, their help, and how a command ends.

This module decides the list of commands and the meaning of exit statuses; each command decides the rest in a module of
its own. A command of the library is `distmuon.cli.<name>`, which has `main(argv) -> status` and is imported when it is
called. A command of the recipe is a program of `launch` (`recipe.py`).

[Note: exit status] 0: done, and the answer, if there is one, is yes. 1: the answer is no, or a check failed. 2: the
arguments or a file are wrong. 130: interrupted. 141: the reader of a pipe has left, as for any program under Unix.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

import distmuon
from distmuon.cli import recipe

BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # [Note: exit status]


@dataclass(frozen=True, slots=True)
class Command:
    """A line and an example for the help."""

    name: str
    line: str
    example: str


LIBRARY = (
    Command("plan", "memory, traffic and time of a training step, without a GPU", "plan llama-8b --dp 64 --hbm 80"),
    Command("route", "which parameters Muon updates, and why", "route path/to/config.json"),
    Command("advise", "whether Muon suits a model and a task", "advise llama-1b --task pretrain --tokens 1000000"),
    Command("doctor", "what this machine lacks; --report for a bug report", "doctor"),
)
RECIPE = (
    Command("pretrain", "train a causal language model", "pretrain --config quickstart"),
    Command("sweep", "one grid of learning rates for Muon and AdamW", "sweep --config quickstart --out runs/sweep"),
    Command("compare", "a table and a picture of finished runs", "compare runs/muon runs/adamw --out runs"),
    Command("report", "one page about one or several runs", "report runs/quickstart/muon"),
    Command("tail", "the newest lines of a run, while it runs", "tail runs/quickstart/muon"),
    Command("export", "a Hugging Face folder from a checkpoint", "export runs/first --out exported/first"),
    Command("generate", "text from a trained model", "generate runs/first --prompt 'def main('"),
)
COMMANDS = {command.name: command for command in (*LIBRARY, *RECIPE)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, see [Note: exit status]."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def _run(arguments: list[str]) -> int:
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(help_text())
        return 0
    if first in ("-V", "--version"):
        print(f"distmuon {distmuon.__version__}")
        return 0
    if first not in COMMANDS:
        print(_unknown(first), file=sys.stderr)
        return BAD_INPUT
    if any(command.name == first for command in RECIPE):
        return recipe.run(first, arguments[1:])
    status: int = import_module(f"distmuon.cli.{first}").main(arguments[1:])
    return status


def help_text() -> str:
    """The text of `distmuon --help`."""
    lines = [
        "usage: distmuon COMMAND [ARGUMENTS]",
        "",
        "Muon under ZeRO-1 and FSDP2. `distmuon COMMAND --help` says more.",
    ]
    titles = {
        "before training (plan needs the extra `recipes`):": LIBRARY,
        "the training recipe (needs the extra `recipes`):": RECIPE,
    }
    for title, commands in titles.items():
        lines += ["", title]
        for command in commands:
            lines += [f"  {command.name:<10}{command.line}", f"{'':12}distmuon {command.example}"]
    lines += [
        "",
        f"shipped configs: {', '.join(recipe.shipped_configs())}",
        "several processes: torchrun --nproc_per_node=8 -m distmuon pretrain --config quickstart",
        "",
        "options: --version, --help",
        "exit status: 0 done, 1 the answer is no or a check failed, 2 wrong arguments or files",
    ]
    return "\n".join(lines)


def _unknown(name: str) -> str:
    """One line for a command that does not exist."""
    if not name:
        return f"usage: distmuon COMMAND; one of {', '.join(COMMANDS)} is needed; distmuon --help explains them"
    close = get_close_matches(name, COMMANDS, n=1)
    cure = f"did you mean {close[0]}?" if close else "distmuon --help lists the commands"
    return f"distmuon: found no command {name!r}; one of {', '.join(COMMANDS)} is needed; {cure}"

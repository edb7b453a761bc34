"""`distmuon`: the list of commands, how each ends, and how the recipe's programs are found and run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import distmuon
from distmuon.cli import main as program
from distmuon.cli import recipe
from distmuon.cli.main import COMMANDS, LIBRARY, main

ROOT = Path(__file__).parents[2]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(status, stdout, stderr)"""
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    return (status, *capsys.readouterr())


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"distmuon {distmuon.__version__}\n", "")
    status, out, err = run(capsys, "--help")
    assert (status, err) == (0, "") and "exit status: 0 " in out
    for command in COMMANDS.values():
        assert f"  {command.name} " in out and f"distmuon {command.example}" in out


def test_no_command_and_an_unknown_command_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, word in (((), "usage: distmuon COMMAND"), (("paln",), "did you mean plan?"), (("xyz",), "--help")):
        status, out, err = run(capsys, *arguments)
        assert status == 2 and out == "" and err.count("\n") == 1 and word in err


@pytest.mark.parametrize("command", LIBRARY, ids=lambda command: command.name)
def test_help_of_the_librarys_commands_teaches(capsys: pytest.CaptureFixture[str], command: program.Command) -> None:
    """It has an example and the exit statuses, and its prog is `distmuon`, however the program was started."""
    status, out, err = run(capsys, command.name, "--help")
    assert (status, err) == (0, "") and out.startswith(f"usage: distmuon {command.name}")
    text = " ".join(out.split())
    assert f"distmuon {command.name} " in text.partition("options:")[0] + text[-600:] and "Exit status: 0; 1 if" in text


@pytest.mark.parametrize("command", program.RECIPE, ids=lambda command: command.name)
def test_help_of_the_recipes_commands(capsys: pytest.CaptureFixture[str], command: program.Command) -> None:
    """Each is the program of launch with that name; a program that is absent is one line with its cure."""
    pytest.importorskip("transformers")
    status, out, err = run(capsys, command.name, "--help")
    if list((ROOT / "launch").glob(f"{command.name}*")):
        assert (status, err) == (0, "") and out.startswith(f"usage: distmuon {command.name}"), err
    else:
        assert status == 1 and f"found no launch.{command.name}" in err and err.count("\n") == 1


def test_the_console_script_and_the_module_are_one_program() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].split() == ["distmuon", "=", "distmuon.cli.main:main"]
    ran = subprocess.run([sys.executable, "-m", "distmuon", "-V"], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"distmuon {distmuon.__version__}\n", "")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    """`distmuon plan ... --json | head` ended in a BrokenPipeError."""
    command = [sys.executable, "-m", "distmuon", "plan", "gpt2", "--dp=256", "--json", "--ranks", "--compare=false"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ran:
        assert ran.stdout is not None and ran.stderr is not None
        assert ran.stdout.readline() == "[\n"
        ran.stdout.close()
        assert ran.wait(timeout=120) == program.PIPE_CLOSED and ran.stderr.read() == ""


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(name: str, arguments: Sequence[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "run", interrupted)
    assert run(capsys, "pretrain") == (130, "", "")


# -------------------------------------------------------------------------------------------------------- the recipe


def _fake(monkeypatch: pytest.MonkeyPatch, end: int | str | None) -> list[list[str]]:
    """Programs of launch that record sys.argv and end with `end`."""
    seen: list[list[str]] = []

    def program_main() -> None:
        seen.append(sys.argv)
        if end is not None:
            raise SystemExit(end)

    modules: dict[str, Any] = {"failures": SimpleNamespace(run_program=lambda function: function())}
    monkeypatch.setattr(recipe, "module", lambda name: modules.get(name, SimpleNamespace(main=program_main)))
    monkeypatch.setattr(sys, "argv", ["before"])
    return seen


def test_arguments_reach_the_program_and_shipped_configs_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From any folder; a file of one's own wins over a shipped name, and other words stay as they are."""
    seen = _fake(monkeypatch, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("{}")
    arguments = [
        "--config",
        "quickstart",
        "--config=gpt2",
        "--config",
        "mine.yaml",
        "--log.dir",
        "quickstart",
        "--config",
    ]
    assert run(capsys, "pretrain", *arguments)[0] == 0
    shipped = [str(ROOT / "configs" / f"{name}.yaml") for name in ("quickstart", "gpt2")]
    wanted = ["--config", shipped[0], f"--config={shipped[1]}", "--config", "mine.yaml", "--log.dir", "quickstart"]
    assert seen == [["distmuon pretrain", *wanted, "--config"]]
    assert recipe.find_config("nothing") is None and set(recipe.shipped_configs()) >= {"quickstart", "llama_1b_gpu"}


@pytest.mark.parametrize(("end", "status"), [(None, 0), (0, 0), (2, 2), (130, 130), ("why", 1)])
def test_the_programs_status_is_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: int | str | None, status: int
) -> None:
    _fake(monkeypatch, end)
    assert run(capsys, "sweep") == (status, "", "why\n" if end == "why" else "")


def test_what_the_recipe_lacks_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A package, the program, or the whole recipe."""
    monkeypatch.setitem(sys.modules, "launch.compare", None)
    status, _, err = run(capsys, "compare")
    assert status == 1 and err.startswith("distmuon compare: found no launch.compare in ") and err.count("\n") == 1
    monkeypatch.setattr(recipe, "import_module", lambda name: __import__("no_such_package_here"))
    status, _, err = run(capsys, "compare")
    assert status == 1 and "found no package no_such_package_here; the training recipe needs it; pip install" in err
    monkeypatch.setattr(recipe, "_PACKAGE", tmp_path / "site-packages" / "distmuon")
    status, _, err = run(capsys, "compare")
    assert status == 1 and "recipe: found no launch/pretrain.py in " in err and err.count("\n") == 1
    assert recipe.shipped_configs() == {}


def test_commands_of_the_pages_exist() -> None:
    """Whatever a page shows as `distmuon COMMAND` or `python -m distmuon COMMAND` is a command."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    called = re.compile(r"(?:`|\$ |-m |\n)distmuon ([a-z]+)\b")
    code = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
    shown = {page.name: "\n".join(code.findall(page.read_text())) for page in pages}
    found = {(page, name) for page, text in shown.items() for name in called.findall(text)}
    assert {name for _, name in found} <= COMMANDS.keys(), sorted(pair for pair in found if pair[1] not in COMMANDS)
    assert len(found) > 4

"""Any value of any key, on the command line or in YAML: it comes out as given, or one error names the key."""

from __future__ import annotations

import contextlib
import io
from dataclasses import fields, is_dataclass
from math import inf, isnan, nan
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distmuon.options import as_dtype
from launch import config as vocabulary
from launch.config import Config, RouteConfig, as_dict, parse

FIXED = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _leaves(section: Any, prefix: str = "") -> dict[str, Any]:
    """The type of each key, with the fields of policies in place of the policies."""
    types = get_type_hints(type(section))
    found: dict[str, Any] = {}
    for leaf in fields(section):
        name, value = f"{prefix}{leaf.name}", getattr(section, leaf.name)
        found |= _leaves(value, f"{name}.") if is_dataclass(value) else {name: types[leaf.name]}
    return found


TYPES = _leaves(Config())
# What YAML and the shell can say; the text is what a user types.
TEXTS = [
    "null",
    "true",
    "-1",
    "0",
    "3",
    "0x10",
    "1e3",
    "2.5",
    ".nan",
    ".inf",
    "nan",
    "",
    "float32",
    "forward",
    "adamw",
]
TEXTS += ["bin", "constant", "[1, 2]", "[0.5, 0.75]", "{a: 1}", "a: b", "{a: 1", "é", "#", "'", "99999999999999999999"]


def _parsed(arguments: list[str]) -> Config | str:
    """The run, or what was printed before leaving with status 2."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return parse(arguments)
    except SystemExit as left:
        assert left.code == 2
        return printed.getvalue()


def _at(config: Config, key: str) -> Any:
    return attrgetter(key)(config)


def _alike(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, (list, tuple)) and isinstance(value, (list, tuple)):
        return list(value) == list(wanted)
    return value == wanted or (
        isinstance(value, float) and isinstance(wanted, float) and isnan(value) and isnan(wanted)
    )


def _others(config: Config, key: str) -> dict[str, Any]:
    return {other: _at(config, other) for other in TYPES if other != key}


@pytest.mark.promise(
    "Untrusted checkpoints and bad input",
    "A value of any key of the recipe comes out as given, or the key is named",
)
@settings(FIXED, max_examples=30)
@given(key=st.sampled_from(sorted(TYPES)), text=st.sampled_from(TEXTS), in_file=st.booleans())
def test_any_value_comes_out_as_given_or_is_refused_by_its_key(
    tmp_path: Path, key: str, text: str, in_file: bool
) -> None:
    *sections, name = key.split(".")
    if in_file:
        path = tmp_path / "run.yaml"
        lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
        path.write_text("\n".join([*lines, f"{'  ' * len(sections)}{name}: {text}\n"]))
        arguments = ["--config", str(path)]
    else:
        arguments = [f"--{key}={text}"]
    found = _parsed(arguments)
    if isinstance(found, str):
        named = key.removeprefix("optimizer.") if len(sections) > 1 else key  # policies know their own name only
        assert named in found or (in_file and ("run.yaml" in found or "yaml" in found.lower())), found
        return
    assert _others(found, key) == _others(Config(), key)
    try:
        said = yaml.safe_load(text)
    except yaml.YAMLError:
        said = text
    value = _at(found, key)
    meant = [text, said, str(said), {"1e3": 1000.0}.get(text), {".nan": nan, ".inf": inf}.get(text), as_dtype(text)]
    assert any(_alike(value, wanted) for wanted in meant), (key, text, value)


def _values(key: str) -> st.SearchStrategy[Any]:
    """Values of the key's own type."""
    default = _at(Config(), key)
    if key.startswith("optimizer.precision.") and key != "optimizer.precision.master":
        return st.sampled_from([torch.float32, torch.bfloat16])
    if key == "model.config":
        return st.dictionaries(st.text("ab_", min_size=1, max_size=3), st.integers() | st.booleans(), max_size=2)
    if key == "optimizer.routes":
        split = st.none() | st.lists(st.integers(1, 9), min_size=1, max_size=3)
        return st.lists(
            st.builds(
                RouteConfig, pattern=st.text("ab*?[]{}1:# ", min_size=1, max_size=5), rule=st.just("muon"), split=split
            )
        )
    literals = getattr(TYPES[key], "__args__", ())
    if literals and all(isinstance(literal, str) for literal in literals):
        return st.sampled_from(literals)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(1, 10**12)
    if isinstance(default, float):
        return st.floats(0, 1e6)
    if isinstance(default, str) and not literals:
        return st.text("ab10 .:#'\"{}[]*&!%@-_,\\é😀", min_size=1, max_size=8)
    return st.just(default)


def _with(section: Any, chosen: dict[str, Any], prefix: str = "") -> Any:
    """`section` with the chosen values, all of them at once: some go together only."""
    given: dict[str, Any] = {}
    for leaf in fields(section):
        name, value = f"{prefix}{leaf.name}", getattr(section, leaf.name)
        given[leaf.name] = _with(value, chosen, f"{name}.") if is_dataclass(value) else chosen.get(name, value)
    return type(section)(**given)


@settings(FIXED, max_examples=15)
@given(st.data())
def test_a_run_written_down_and_read_again_is_itself(tmp_path: Path, data: st.DataObject) -> None:
    """`as_dict`, as YAML, is a config file of the same run."""
    keys = data.draw(st.lists(st.sampled_from(sorted(TYPES)), max_size=8, unique=True))
    chosen = {key: data.draw(_values(key), label=key) for key in keys}
    try:
        run = _with(Config(), chosen)
    except ValueError as error:
        assert any(key.removeprefix("optimizer.") in str(error) for key in TYPES), error
        return
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(as_dict(run), allow_unicode=True), encoding="utf-8")
    assert _parsed(["--config", str(path)]) == run


def _kinds(section: Any) -> list[type]:
    parts = [getattr(section, leaf.name) for leaf in fields(section)]
    return [type(section), *(kind for part in parts if is_dataclass(part) for kind in _kinds(part))]


def test_every_section_is_asked() -> None:
    """`TYPES` lists the leaves of all dataclasses but those of lists."""
    known = {name for name, kind in vars(vocabulary).items() if is_dataclass(kind)}
    assert known == {kind.__name__ for kind in _kinds(Config())} | {"RouteConfig"}
    with pytest.raises(ValueError, match=r"train\.steps"):
        Config(train=vocabulary.TrainConfig(steps=0))

"""The page: which sections there are, and the file that holds them with all that it needs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from launch.logs import Record
from launch.report.about import Facts, config_difference, config_text, environment, results
from launch.report.chart import Chart
from launch.report.history import History, State, labels, read_history
from launch.report.table import Table
from launch.report.telemetry import outside_the_band, telemetry_charts
from launch.report.timing import median_step, stage_table, timing_charts, timing_sentence
from launch.report.traffic import bytes_table, memory_table, plan_of
from launch.report.training import color_of, training_charts

if TYPE_CHECKING:
    from jinja2 import Template

REPORT_FILE = "report.html"
TEMPLATE = "page.html.jinja"
FOLDER = Path(__file__).parent
RELOAD_S = 30
"""How often the page of a running run looks for its successor."""


@dataclass(kw_only=True)
class Section:
    """A heading with whatever there is to say under it; one without content is left out of the page."""

    anchor: str
    title: str
    text: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Record] = ()
    facts: Facts = field(default_factory=list)
    folded: Sequence[tuple[str, str]] = ()
    """(title, preformatted text) to unfold."""

    def __bool__(self) -> bool:
        return bool(self.text or self.charts or self.tables or self.samples or self.facts or self.folded)


def write_report(folders: Sequence[Path], out: Path, *, known_state: State | None = None) -> None:
    """Write the page of the runs in `folders`. It replaces an older one at once, so a browser never reads half of it.

    `known_state`: what the caller knows of the run; otherwise it is told from the records.
    """
    runs = [
        read_history(folder, label=label, known_state=known_state) for folder, label in zip(folders, labels(folders))
    ]
    html = render(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = out.with_name(f".{out.name}.{os.getpid()}")
    whole.write_text(html, encoding="utf-8")
    whole.replace(out)


def render(runs: Sequence[History]) -> str:
    """The page as a text."""
    found = [section for section in sections(runs) if section]
    charts = {chart.name: chart for section in found for chart in section.charts}
    template, plotly = packages()
    return str(
        template.render(
            title=" and ".join(run.label for run in runs),
            runs=[
                {
                    "label": run.label,
                    "tone": run.tone,
                    "verdict": run.verdict,
                    "color": color_of(number),
                    "results": results(run),
                    "warnings": run.warnings,
                }
                for number, run in enumerate(runs)
            ],
            sections=found,
            written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            written_s=int(time.time()),
            reload_s=RELOAD_S if any(run.state == "running" for run in runs) else 0,
            data=_in_a_script({name: chart.plotly() for name, chart in charts.items()}),
            style=(FOLDER / "page.css").read_text(encoding="utf-8"),
            script=(FOLDER / "page.js").read_text(encoding="utf-8"),
            plotly=plotly,
        )
    )


def sections(runs: Sequence[History]) -> Iterable[Section]:
    """All sections, empty ones too."""
    yield Section(anchor="training", title="Training", charts=training_charts(runs))
    difference = config_difference(runs)
    yield Section(anchor="difference", title="How the configs differ", tables=[difference] if difference else [])
    for number, run in enumerate(runs):
        yield from _sections_of(run, number, several=len(runs) > 1)


def _sections_of(run: History, number: int, *, several: bool) -> Iterable[Section]:
    """The sections that each run has for itself."""
    of, key = (f": {run.label}", f"-{number}") if several else ("", "")

    def own(charts: Sequence[Chart]) -> list[Chart]:
        for chart in charts:
            chart.name += key
        return list(charts)

    outside = outside_the_band(run)
    typical = median_step(run)
    stages = stage_table(typical)
    planned = plan_of(run)
    counted = [table for table in (bytes_table(run, planned), memory_table(run, planned)) if table]
    yield Section(
        anchor=f"inside{key}",
        title=f"Inside the optimizer{of}",
        charts=own(telemetry_charts(run)),
        tables=[outside] if outside else [],
    )
    yield Section(
        anchor=f"time{key}",
        title=f"Time of a step{of}",
        text=timing_sentence(run, typical),
        charts=own(timing_charts(run, typical)),
        tables=[stages] if stages else [],
    )
    yield Section(anchor=f"bytes{key}", title=f"Bytes and memory{of}", tables=counted)
    yield Section(anchor=f"samples{key}", title=f"Samples of text{of}", samples=run.samples[::-1])
    report = run.starts[-1].get("report")
    folded = [("routing and layout", report)] if report else []
    routing = run.folder / "routing.txt"
    if routing.is_file():
        folded.append(("the rule of each parameter", routing.read_text(encoding="utf-8")))
    if run.config:
        folded.append(("config", config_text(run)))
    yield Section(anchor=f"about{key}", title=f"Environment and config{of}", facts=environment(run), folded=folded)


def _in_a_script(value: object) -> str:
    """JSON that nothing inside can end the script element of."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


@lru_cache(maxsize=1)
def packages() -> tuple[Template, str]:
    """(template, source of plotly.js). Raises ImportError, with what to install, where the page cannot be written."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(
            f"report: found no `{error.name}`; jinja2 and plotly write the page; pip install jinja2 plotly"
        ) from error
    loader = FileSystemLoader(FOLDER)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return made.get_template(TEMPLATE), get_plotlyjs()

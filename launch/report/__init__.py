"""The report of a run: one page that opens offline, written from the records alone.

    python -m launch.report runs/first                        # writes runs/first/report.html
    python -m launch.report runs/muon runs/adamw --out both.html

`history` reads the records; `training`, `telemetry`, `timing` and `traffic` turn them into charts and tables, `about`
says where a run comes from; `page` puts them together, and `sink` does so while a run goes on.
"""

from launch.report.command import main
from launch.report.page import write_report
from launch.report.sink import ReportSink

__all__ = ["ReportSink", "main", "write_report"]

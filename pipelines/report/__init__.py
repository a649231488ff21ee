"""`ldm report`: one page over one run or several side by side."""

from pipelines.report.report import write_report

__all__ = ["write_report"]

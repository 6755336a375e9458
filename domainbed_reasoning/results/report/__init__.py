"""A sweep's report: one self-contained HTML page, and the same in Markdown.

from domainbed_reasoning.results.report import read_report, write_page

write_page(Path("report.html"), read_report("sweep"))
"""

from domainbed_reasoning.results.report.content import read_report
from domainbed_reasoning.results.report.page import write_page

__all__ = ["read_report", "write_page"]

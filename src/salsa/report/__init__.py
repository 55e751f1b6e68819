"""The report: one page, self-contained."""

"""The report of a run: sections that stages log, put together as Markdown, HTML and JSON."""

"""The report of a run: stages log sections, which become one document."""

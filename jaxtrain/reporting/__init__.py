"""A report of one or several runs: one HTML file that fetches nothing, Markdown, JSON."""

"""One HTML page about a converted checkpoint; `clla_report.json` itself is read by `clla.evaluate.report_file`."""

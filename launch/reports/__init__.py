"""report.html: a page about one run, or one that compares several."""

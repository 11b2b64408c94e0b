"""Pytest runs the examples in the pages; the scripts beside them are run when the site is built."""

collect_ignore_glob = ["*.py", "_build", "auto_gallery", "gallery", "migrating", "api"]

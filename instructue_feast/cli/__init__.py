"""The `instructue` command line: one file per noun."""

"""One file per verb: its options, and the call of the function that does the work.

Only these files and `cli.arguments` see argparse. Heavy modules are imported when a verb runs, so
that `--help` and shell completion respond at once.
"""

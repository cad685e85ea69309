"""One file for each verb: its options, and how it calls what does the work.

Nothing else sees argparse. Whatever is heavy is imported when a verb runs, so that `--help` and the
completion of a shell start at once.
"""

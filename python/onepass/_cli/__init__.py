"""The command line, `python -m onepass`: one file per command, and what the commands share.

Nothing else imports this package. Files are written by output.py only, whole or not at all.
"""

"""The ``attnres`` command, one file per subcommand.

A subcommand's file has ``add_parser(subparsers)`` and ``run(args) -> int``. Nothing heavier than
argparse is imported at the top of these files: ``attnres --help`` answers at once, and a broken
dependency of one subcommand leaves the others alone.
"""

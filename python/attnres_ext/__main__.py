"""``python -m attnres_ext`` is the ``attnres`` command."""

import sys

from attnres_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

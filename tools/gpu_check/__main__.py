"""``python -m tools.gpu_check``."""

import sys

from tools.gpu_check.command import main

sys.exit(main())

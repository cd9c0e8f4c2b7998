"""``python -m hvdkit``."""

import sys

from hvdkit.cli import main

sys.exit(main())

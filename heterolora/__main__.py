"""``python -m heterolora``."""

import sys

from heterolora.cli import main

sys.exit(main())

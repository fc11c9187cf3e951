"""`python -m dcdd_core.cli`."""

import sys

from .app import main

sys.exit(main())

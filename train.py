#!/usr/bin/env python
"""The same as `dcdd train`, for `accelerate launch train.py ...` and a checkout that is not installed."""

import sys

from dcdd_core.cli.train import main

if __name__ == "__main__":
    sys.exit(main())

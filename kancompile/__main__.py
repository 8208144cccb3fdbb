"""Run the command line as ``python -m kancompile``."""

import sys

from kancompile.cli import main

sys.exit(main())

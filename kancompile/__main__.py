"""Run the command line as ``python -m kancompile``."""

import sys

from kancompile.cli.main import main

sys.exit(main())

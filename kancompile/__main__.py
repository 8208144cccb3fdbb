"""Run the command line as ``python -m kancompile``."""

import sys

from kancompile.command_line import main

sys.exit(main())

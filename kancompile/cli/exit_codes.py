"""What the command ``kancompile`` returns to the shell; these numbers never change."""

OK = 0
THRESHOLD_MISSED = 1
USAGE = 2
INTERNAL = 3
INTERRUPTED = 130

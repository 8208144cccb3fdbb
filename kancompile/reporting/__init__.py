"""Reports: everything about a compiled model on one page, as plain data and for people."""

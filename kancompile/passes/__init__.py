"""Rewrites of programs, one in a file, and the methods that round weights."""

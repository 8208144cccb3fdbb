"""Measure what a report says, as plain data."""

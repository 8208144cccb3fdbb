"""A compiled model as firmware of a microcontroller."""

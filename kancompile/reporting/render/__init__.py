"""Draw what a report says; nothing is measured here."""

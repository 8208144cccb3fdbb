"""What users bring: models, weights and samples, read without running code from files, and checked."""

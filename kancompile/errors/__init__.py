"""What users catch, and how whatever breaks on foreign content becomes one of these errors."""

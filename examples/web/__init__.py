"""A page that recognises drawn digits with an integer KAN in the browser."""

"""What comes in: bodies, fields, uploaded images."""

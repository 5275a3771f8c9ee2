"""Reading and validating requests: bodies, fields, uploaded images, prompts."""

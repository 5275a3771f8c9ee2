"""Reading and validating requests: bodies, fields, prompts."""

"""Prompts for scoring only: a second grammar, and sentences by hand. Training and they share no templates."""

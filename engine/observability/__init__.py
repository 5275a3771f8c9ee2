"""No torch."""

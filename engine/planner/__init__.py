"""The first stage: writes plans."""

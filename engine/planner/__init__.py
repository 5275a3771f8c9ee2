"""The first stage: writes a plan, token by token, for many images at once."""

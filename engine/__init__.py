"""The engine. No torch here: the API imports the package."""

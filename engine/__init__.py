"""The engine. This file imports no torch: the API imports from the package."""

"""The `glimmer` command."""

"""GLM-Image: a planner that writes image tokens, a renderer that turns them into pixels, and their helpers."""

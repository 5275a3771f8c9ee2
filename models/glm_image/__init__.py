"""GLM-Image: a planner generates image codes, a renderer turns them into pixels."""

"""GLM-Image: a planner that generates image codes and a renderer that turns them into pixels."""

"""GLM-Image: a planner writes image codes, a renderer makes pixels of them."""

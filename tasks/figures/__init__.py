"""Do: the four figures. What is measured, what is computed from it, and the pictures."""

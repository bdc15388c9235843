"""What other tools wrote, read as facts: their trials, their parameter lists, their configs."""

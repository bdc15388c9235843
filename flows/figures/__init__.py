"""Arrange: the four figures. Each has a file of its own; `figure` says what a figure is."""

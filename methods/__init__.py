"""One file for each paper: how its method of 2:4 training differs from FST. README.md says how to add a method."""

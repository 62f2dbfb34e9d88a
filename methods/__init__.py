"""One paper, one file: what a method of 2:4 training does differently from FST. README.md here says how to add one."""

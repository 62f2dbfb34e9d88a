"""An interpreter of PTX, which runs what Triton compiles for an NVIDIA GPU on the CPU."""

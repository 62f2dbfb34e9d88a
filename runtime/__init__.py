"""A run from its set-up to its plots: ranks, checkpoints, data loading, metrics, health."""

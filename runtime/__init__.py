"""What keeps a run alive and shows it: set-up, ranks, checkpoints, data loading, metrics, health, plots."""

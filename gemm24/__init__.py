"""2:4 matrix products: packed layouts, the backends that multiply them, the measured choice, the feed-forward layer."""

"""Which method is better: grids of runs, their cost, statistics and figures, and the search for the decay factor."""

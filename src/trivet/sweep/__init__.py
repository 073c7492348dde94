"""A grid of settings, each trained with several seeds: one run a folder, one table at the end."""

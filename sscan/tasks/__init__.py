"""Things to train: data, measures and baselines."""

"""What models and merges are, in figures: looked at before a merge and after it."""

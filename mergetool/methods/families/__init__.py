"""What several methods share: the shapes of those that are more than arithmetic on a tensor, and common fields."""

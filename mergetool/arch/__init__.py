"""What the names of a checkpoint mean: which axis of which tensor lives in which space, as data."""

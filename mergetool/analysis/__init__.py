"""What the models of a recipe are to each other, before they are merged: one pass over their weights, and advice."""

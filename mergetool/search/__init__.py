"""Mathematics of searching: genes, optimisers, item response theory, estimates of a score from few items.

Numbers in, numbers out: nothing here knows of models, tasks or files.
"""

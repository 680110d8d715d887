"""The zoo: tiny models of real transformers classes, saved as people save them, and an oracle of logits.

families    one small config for every architecture, the class that is saved, inputs to compute logits of
build       `build(folder, family, seed)` makes a base, `tuned(folder, base, seed)` a fine-tune of every tensor of it
files       the same model written another way: old names, other layouts, redundant copies, shards, dtypes
oracle      what a merge should compute: loaded modules, merged naively in float64
text        a tokenizer, and a sentence-transformers folder
"""

"""The demonstration behind `scripts/quickstart`: real text, a small BERT, its fine-tunes, their merges, one table."""

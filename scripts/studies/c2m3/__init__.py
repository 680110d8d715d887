"""Networks of one architecture from different seeds, aligned and merged."""

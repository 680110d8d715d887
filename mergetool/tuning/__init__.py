"""The search for a merge: candidates in memory, scores from lm-eval, a journal, a report."""

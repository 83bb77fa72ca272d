"""Scripts of experiments that RESULTS.md reports."""

"""From rows to claims: means over patients, intervals, paired comparisons, robustness."""

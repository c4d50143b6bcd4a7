"""From maps to labels: resizing, thresholds, and the segmenters that order the two."""

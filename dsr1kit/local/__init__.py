"""Run R1, its distills and tiny-r1 in this process."""

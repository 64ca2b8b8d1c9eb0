"""Files that appear when they are complete: one that is replaced, and a folder that is filled beside its target."""

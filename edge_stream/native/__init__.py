"""The native libraries: where they are, their declarations, and how Python's callbacks go with them."""

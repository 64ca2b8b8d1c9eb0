"""What a stream costs and what it is worth, against the methods that one would use otherwise."""

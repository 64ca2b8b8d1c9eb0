"""A model's file: where its name leads, the defaults it carries, the proof it gave, what it is converted from."""

"""A busy provider of our own, on loopback."""

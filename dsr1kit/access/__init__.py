"""Reach R1: the catalogue of channels and the client that measures them."""

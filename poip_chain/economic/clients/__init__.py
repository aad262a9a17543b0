"""Typed clients of the contracts, one file per concern."""

"""Passes over stored weights."""

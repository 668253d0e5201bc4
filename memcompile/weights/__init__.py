"""Weights as stored: how floats become codes, and codes of a model file stay what they are."""

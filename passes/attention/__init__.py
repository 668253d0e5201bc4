"""Rewrites of attention: who may see whom."""

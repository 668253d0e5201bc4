"""Rewrites of the key/value cache: which tokens it holds, and in how many bits."""

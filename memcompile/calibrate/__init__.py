"""Calibration: run a captured graph over tokens, collect statistics of its regions, remember them."""

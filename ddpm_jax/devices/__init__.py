"""Devices: how they start, share the work and end, and what a step needs of them."""

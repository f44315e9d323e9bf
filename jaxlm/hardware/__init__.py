"""Chips, targets that need not be there, and the wires between devices."""

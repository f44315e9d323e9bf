"""Reads compiled programs: FLOPs, bytes, collectives and live buffers of HLO text."""

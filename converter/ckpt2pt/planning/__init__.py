"""Decide where every byte goes, and prove that it fits.  Pure: nothing is opened, nothing is read."""

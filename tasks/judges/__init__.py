"""Judges beyond keywords: they label stored responses, and each response once."""

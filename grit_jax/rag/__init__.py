"""Retrieval-augmented generation with one model, whose caches serve twice."""

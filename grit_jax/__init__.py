"""GRIT in JAX: one language model that embeds and generates."""

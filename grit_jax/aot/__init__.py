"""Compiles a config's train step for a TPU topology, on a machine without one.

`python -m grit_jax.aot --config=configs/gritlm_7b.py --topology=v5e:8x8` says
what the compiled step holds in memory, computes and moves. Nothing runs: the
figures are the compiler's, and what is estimated from them says so.
"""

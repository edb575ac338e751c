"""Published model sizes, and small ones for a laptop and for tests."""

import dataclasses

from grit_jax.config import ModelConfig


def mistral_7b() -> ModelConfig:
  """Mistral-7B-v0.1 (arXiv 2310.06825): 7,241,732,096 parameters.

  Without its sliding window of 4096: GRIT trains without it, and a window
  under bidirectional attention would be another model.
  """
  return ModelConfig(
    vocab_size=32000,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14336,
    rope_theta=10000.0,
    norm_epsilon=1e-5,
  )


def mixtral_8x7b() -> ModelConfig:
  """Mixtral-8x7B-v0.1 (arXiv 2401.04088): 46,702,792,704 parameters."""
  return dataclasses.replace(
    mistral_7b(), num_experts=8, experts_per_token=2, rope_theta=1e6
  )


def of_init_from() -> ModelConfig:
  """The architecture of what `init_from` names, whatever it is."""
  return ModelConfig(vocab_size=0, embed_dim=0)


def small() -> ModelConfig:
  """A Mistral that trains from scratch on two CPU cores in minutes."""
  return ModelConfig(
    vocab_size=0,
    embed_dim=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=512,
    dtype='float32',
  )


def tiny_moe() -> ModelConfig:
  """A Mixtral for tests: eight experts, for eight devices to split."""
  return dataclasses.replace(tiny(), num_experts=8, mlp_dim=16)


def tiny() -> ModelConfig:
  """A Mistral for tests: every size odd where it may be, float32."""
  return ModelConfig(
    vocab_size=101,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    mlp_dim=48,
    dtype='float32',
  )

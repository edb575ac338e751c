"""How the next token is chosen: the best one, or one drawn at random."""

import dataclasses

import jax
import jax.numpy as jnp

from grit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one text is generated.

  Attributes:
    max_new_tokens: The most tokens to generate, the end of text included.
    temperature: Divides the logits before the draw; 0: always the best token.
    top_k: Only so many of the best tokens are drawn from; 0: all.
    top_p: Only the best tokens whose probabilities make up this share are
      drawn from (nucleus sampling, arXiv 1904.09751); 1: all.
    seed: The same one draws the same text from the same prompt, whatever else
      is generated beside it.
    stop: Strings that end the text, which then ends before them.
  """

  max_new_tokens: int = 256
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  stop: tuple[str, ...] = ()

  def validate(self) -> None:
    """Raises ValueError naming the first field that cannot be."""
    for name, holds, expected in (
      ('max_new_tokens', self.max_new_tokens >= 1, '1 or more'),
      ('temperature', 0 <= self.temperature < float('inf'), '0 or more'),
      ('top_k', self.top_k >= 0, '0 (all) or more'),
      ('top_p', 0 < self.top_p <= 1, 'in (0, 1]'),
      ('seed', 0 <= self.seed < 2**32, 'in [0, 2**32)'),
      ('stop', all(self.stop), 'of strings that are not empty'),
    ):
      if not holds:
        raise UserError(f'{name}={getattr(self, name)!r} must be {expected}.')


def choose(
  logits: jax.Array,
  keys: jax.Array,
  counts: jax.Array,
  temperature: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
) -> jax.Array:
  """Chooses the next token of each row; what no row needs is not computed.

  Args:
    logits: float32 [B, V].
    keys: random keys [B], of the rows' seeds.
    counts: int32 [B], the tokens that each row has generated so far.
    temperature: float32 [B]; 0: the best token.
    top_k: int32 [B]; 0: all.
    top_p: float32 [B]; 1: all.

  Returns:
    int32 [B].
  """
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  drawn = temperature > 0

  def draw() -> jax.Array:
    scaled = logits / jnp.where(drawn, temperature, 1.0)[:, None]
    limited = (top_k > 0) | (top_p < 1)
    scaled = jax.lax.cond(
      jnp.any(drawn & limited),
      lambda: keep_likely(scaled, top_k, top_p),
      lambda: scaled,
    )
    keys_now = jax.vmap(jax.random.fold_in)(keys, counts)
    noise = jax.vmap(
      lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32)
    )(keys_now)
    return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)

  return jnp.where(
    drawn, jax.lax.cond(jnp.any(drawn), draw, lambda: best), best
  )


def keep_likely(
  logits: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
  """Sets the logits of unlikely tokens to -inf, first by `top_k`.

  A token as likely as the last one kept is kept too.

  Args:
    logits: float32 [B, V].
    top_k: int32 [B]; 0: all.
    top_p: float32 [B]; 1: all.
  """
  size = logits.shape[-1]
  best_first = -jnp.sort(-logits, axis=-1)
  k = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)[:, None]
  among = jnp.arange(size) < k
  probability = jax.nn.softmax(jnp.where(among, best_first, -jnp.inf), axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  # The best token has nothing before it, so one is always kept.
  kept = among & ((before < top_p[:, None]) | (top_p[:, None] >= 1))
  least = jnp.min(jnp.where(kept, best_first, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits >= least, logits, -jnp.inf)

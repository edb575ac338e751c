"""The other side of the benchmark: the PyTorch package, as its evaluation goes.

It embeds and caches with `gritlm`'s `GritLM.encode`, and generates with
transformers, whose `generate` goes on from a cache. Imported where both are.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gritlm
import numpy as np
import torch
import transformers

from grit_jax.data.formats import EMBED
from grit_jax.inference.gritlm import join_title
from grit_jax.rag.benchmark import NEW_TOKENS
from grit_jax.rag.prompts import BEHIND_QUERY, Mode, format_prompt


class TorchSide:
  """A model in PyTorch, on a GPU if there is one."""

  def __init__(self, folder: os.PathLike, attention: str, dtype: str):
    """Loads it.

    Args:
      folder: In Hugging Face's format.
      attention: As `bbcc`.
      dtype: Of weights and activations.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    self.model = gritlm.GritLM(
      str(folder),
      mode='unified',
      attn=attention,
      device=self.device,
      dtype=getattr(torch, dtype),
      attn_implementation='sdpa',
    )
    self.positions = self.model.model.config.max_position_embeddings

  @property
  def versions(self) -> dict[str, str]:
    """Those of the libraries."""
    return {
      'torch': torch.__version__,
      'transformers': transformers.__version__,
      'torch_threads': torch.get_num_threads(),
    }

  def prepare(
    self, question: str, document: Mapping[str, str]
  ) -> Callable[[Mode], Sequence[int]]:
    """Embeds and caches a document; returns what answers the question."""
    text = join_title(document)
    embedding, first = self._encode(text, True)
    _, behind = self._encode(text, True, BEHIND_QUERY)

    def run(mode: Mode) -> Sequence[int]:
      cache = None
      if mode is not Mode.NO_RETRIEVAL:
        query, cache = self._encode(question, mode.caches_query)
        # The search: there is one document.
        int(np.argmax(embedding @ query[0]))
      match mode:
        case Mode.DOC:
          cache = _share(first)
        case Mode.DOC_QUERY:
          cache = _join(first, cache)
        case Mode.QUERY_DOC:
          cache = _join(cache, behind)
      return self._generate(format_prompt(mode, question, [document]), cache)

    return run

  def _encode(
    self, text: str, get_cache: bool, instruction: str = EMBED
  ) -> tuple[np.ndarray, Any]:
    found = self.model.encode(
      [text],
      instruction=instruction,
      max_length=self.positions,
      get_cache=get_cache,
      add_special_tokens=instruction == EMBED,
    )
    return found if get_cache else (found, None)

  def _generate(self, prompt: str, cache: Any) -> Sequence[int]:
    inputs = self.model.tokenizer(
      prompt, add_special_tokens=cache is None, return_tensors='pt'
    ).to(self.device)
    ids = inputs['input_ids']
    cached = cache.get_seq_length() if cache else 0
    with torch.inference_mode():
      out = self.model.generate(
        input_ids=ids,
        attention_mask=torch.ones(
          (1, cached + ids.shape[1]), dtype=torch.long, device=self.device
        ),
        cache=cache,
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
      )
    return out[0, ids.shape[1] :].tolist()


def _share(cache: transformers.DynamicCache) -> transformers.DynamicCache:
  """Returns a cache of the same tensors, which grows by itself."""
  shared = copy.copy(cache)
  shared.layers = [copy.copy(layer) for layer in cache.layers]
  return shared


def _join(
  first: transformers.DynamicCache, second: transformers.DynamicCache
) -> transformers.DynamicCache:
  joined = _share(first)
  for layer, other in zip(joined.layers, second.layers, strict=True):
    layer.keys = torch.cat([layer.keys, other.keys], dim=2)
    layer.values = torch.cat([layer.values, other.values], dim=2)
  return joined

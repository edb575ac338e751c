"""PyTorch's side of the race: the step of the reference, as its authors would.

  pytorch_side.py FOLDER eager|compiled keep|recompute

transformers' Mistral with its fused attention; queries and passages each padded
to the longest of the batch, conversations to their longest; mean pooling of
what is not instruction; cross-entropy over the passages of the batch; the loss
of the next token over the answers; clipping and the fused AdamW. What layers
compute is kept for the gradient, or computed again where memory needs it. What
the reference spends on tokenizing is left out.
"""

import json
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import MistralForCausalLM
from turns import forget_peak, measure_products, memory_mib, serve

IGNORED = -100  # What cross_entropy skips.


class Texts:
  """The texts of each step, as they leave the tokenizer."""

  def __init__(self, path: pathlib.Path):
    """Reads what our side has collected."""
    with np.load(path) as arrays:
      self.arrays = dict(arrays)
    self.steps = len(self.arrays['lengths'])
    self.starts = _starts(self.arrays['lengths'])
    self.talk_starts = _starts(self.arrays['talk_lengths'])

  def embedding(self, step: int, texts: slice) -> tuple[torch.Tensor, ...]:
    """Returns ids, what is text or instruction, and what is pooled, [B, T]."""
    arrays = self.arrays
    starts = self.starts[step, :, texts].reshape(-1)
    lengths = arrays['lengths'][step, :, texts].reshape(-1)
    prefix = arrays['instruction_lengths'][step, :, texts].reshape(-1)
    ids = _pad(arrays['ids'], starts, lengths, 0)
    place = np.arange(ids.shape[1])
    there = place < lengths[:, None]
    pooled = there & (place >= prefix[:, None])
    return tuple(torch.from_numpy(x) for x in (ids, there, pooled))

  def talks(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids, and the same with `IGNORED` outside the loss, [B, T]."""
    arrays = self.arrays
    starts, lengths = self.talk_starts[step], arrays['talk_lengths'][step]
    ids = _pad(arrays['talk_ids'], starts, lengths, 0)
    in_loss = _pad(arrays['talk_in_loss'], starts, lengths, False)
    labels = np.where(in_loss, ids, IGNORED)
    return torch.from_numpy(ids), torch.from_numpy(labels)

  def useful_tokens(self, step: int) -> int:
    """Returns the tokens of all texts of a step."""
    lengths = self.arrays['lengths'][step], self.arrays['talk_lengths'][step]
    return int(sum(x.sum() for x in lengths))


def _starts(lengths: np.ndarray) -> np.ndarray:
  flat = lengths.reshape(-1)
  return (np.cumsum(flat) - flat).reshape(lengths.shape)


def _pad(
  values: np.ndarray, starts: np.ndarray, lengths: np.ndarray, padding: int
) -> np.ndarray:
  """Cuts texts out of `values` and pads them at their ends to the longest."""
  place = np.arange(lengths.max())
  there = place < lengths[:, None]
  flat = np.where(there, starts[:, None] + place, 0)
  padded = np.where(there, values[flat], padding)
  return padded.astype(np.int64 if values.dtype != bool else bool)


class Race:
  """A run of training that is gone through again and again."""

  def __init__(self, folder: pathlib.Path, compiled: bool, recompute: bool):
    """Loads the shared start; see the module for the rest."""
    self.libraries_mib = memory_mib('VmRSS')
    config = json.loads((folder / 'config.json').read_text())
    self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    self.dtype = getattr(torch, config['model']['dtype'])
    self.temperature = config['objective']['temperature']
    self.clip_norm = config['optimizer']['clip_norm']
    self.texts = Texts(folder / 'texts.npz')
    # Weights in float32, and products in the dtype by autocast.
    self.model = MistralForCausalLM.from_pretrained(
      folder / 'model', dtype=torch.float32, attn_implementation='sdpa'
    ).to(self.device)
    self.model.train()
    if recompute:
      self.model.gradient_checkpointing_enable()
    optimizer = config['optimizer']
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(),
      lr=optimizer['learning_rate'],
      betas=(optimizer['beta1'], optimizer['beta2']),
      eps=optimizer['epsilon'],
      weight_decay=optimizer['weight_decay'],
      fused=True,
    )
    self.encode, self.predict = self._encode, self._predict
    if compiled:
      # Batches differ in their lengths: without `dynamic` each is compiled.
      self.encode = torch.compile(self._encode, dynamic=True)
      self.predict = torch.compile(self._predict, dynamic=True)

  def _encode(
    self, ids: torch.Tensor, mask: torch.Tensor | None, pooled: torch.Tensor
  ) -> torch.Tensor:
    """Returns the normalised embeddings of a batch, float32 [B, D]."""
    hidden = self.model.model(
      ids, attention_mask=mask, is_causal=False, use_cache=False
    ).last_hidden_state.float()
    weights = pooled.float()
    total = torch.einsum('bt,btd->bd', weights, hidden)
    return F.normalize(total / weights.sum(1, keepdim=True), dim=-1)

  def _predict(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of the tokens that are not `IGNORED`.

    Padding follows the texts and sees them alone: causal attention needs no
    mask for it, and runs the faster kernel.
    """
    logits = self.model(ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(
      logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )

  def embed(self, step: int, texts: slice) -> torch.Tensor:
    """Pads some of a step's texts to their longest and embeds them."""
    ids, there, pooled = (
      x.to(self.device) for x in self.texts.embedding(step, texts)
    )
    mask = None
    if not there.all():
      # Seen by all positions alike: one row of the mask serves them.
      mask = there[:, None, None].expand(-1, 1, ids.shape[1], -1)
    return self.encode(ids, mask, pooled)

  def backward(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a step's gradient up; the losses of the two streams."""
    with torch.autocast(
      self.device, self.dtype, enabled=self.dtype != torch.float32
    ):
      loss_gen = self.predict(
        *(x.to(self.device) for x in self.texts.talks(step))
      )
    # One stream's activations are gone before the other's are there.
    loss_gen.backward()
    with torch.autocast(
      self.device, self.dtype, enabled=self.dtype != torch.float32
    ):
      queries = self.embed(step, np.s_[:1])
      passages = self.embed(step, np.s_[1:])
    scores = queries @ passages.T / self.temperature
    group = len(passages) // len(queries)
    positives = group * torch.arange(len(queries), device=self.device)
    loss_rep = F.cross_entropy(scores, positives)
    loss_rep.backward()
    return loss_rep.detach(), loss_gen.detach()

  def run(self, backward_only: bool = False) -> dict[str, Any]:
    """Goes through all steps.

    Args:
      backward_only: whether a step ends with its gradient.
    """
    forget_peak()
    losses = []
    start, cores = time.perf_counter(), time.process_time()
    for step in range(self.texts.steps):
      losses.append(self.backward(step))
      if not backward_only:
        torch.nn.utils.clip_grad_norm_(
          self.model.parameters(), self.clip_norm, foreach=True
        )
        self.optimizer.step()
      self.optimizer.zero_grad()
    losses = [[float(loss) for loss in step] for step in losses]
    seconds = time.perf_counter() - start
    cores, peak = time.process_time() - cores, self._peak_mib()
    return {
      'seconds': seconds,
      'core_seconds': cores,
      'tokens': sum(map(self.texts.useful_tokens, range(self.texts.steps))),
      'computed': sum(map(self.computed_tokens, range(self.texts.steps))),
      'losses': losses,
      'peak_mib': peak,
      'libraries_mib': self.libraries_mib,
    }

  def computed_tokens(self, step: int) -> int:
    """Returns the tokens that a step runs through the model."""
    parts = (
      self.texts.embedding(step, np.s_[:1])[0],
      self.texts.embedding(step, np.s_[1:])[0],
      self.texts.talks(step)[0],
    )
    return sum(part.numel() for part in parts)

  def _peak_mib(self) -> float:
    """Of the accelerator's memory, where there is one, since the start."""
    if self.device == 'cpu':
      return memory_mib('VmHWM')
    return torch.cuda.max_memory_allocated() / 2**20

  def products(self, shapes: list) -> list[dict[str, float]]:
    """Measures bare products in the dtype of the model."""

    def make(m: int, k: int, n: int) -> Any:
      kind = {'device': self.device, 'dtype': self.dtype}
      x, w, y = (torch.randn(*s, **kind) for s in ((m, k), (n, k), (m, n)))
      calls = {
        'forward': lambda: F.linear(x, w),
        'inputs': lambda: y @ w,
        'weights': lambda: y.T @ x,
      }

      def run(name: str) -> None:
        calls[name]()
        if self.device != 'cpu':
          torch.cuda.synchronize()

      return run

    with torch.no_grad():
      return measure_products(shapes, make)


def main() -> None:
  """Takes turns."""
  # Of the cores that this process may use; PyTorch counts the machine's.
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.set_float32_matmul_precision('highest')
  folder, compiled, recompute = sys.argv[1:]
  race = Race(
    pathlib.Path(folder), compiled == 'compiled', recompute == 'recompute'
  )
  serve({'run': race.run, 'products': race.products})


if __name__ == '__main__':
  main()

"""Tests of reading what a chip's memory holds."""

import pytest

from grit_jax.aot import hlo, memory

GIB = 2**30

# Two layers of two rows a chip, shortened from a compiler's dump; sizes are in
# GiB to be told apart. `part` is an argument of a computation on another core.
PROGRAM = """HloModule step

ENTRY %main (w: f32[2,64,32]) -> f32[2,64,32] {
  %w = f32[2,64,32]{2,1,0} parameter(0), metadata={op_name="state.model.w"}
  %inputs = bf16[2,2,16,32]{3,2,1,0} fusion(%w), metadata={op_name="jit(step)/jvp(layers)/while"}
  %hidden = bf16[2,16,48]{2,1,0} fusion(%inputs), metadata={op_name="jit(step)/jvp(layers)/while/body/mlp/dot"}
  %gradient = f32[2,64,32]{2,1,0} fusion(%hidden), metadata={op_name="jit(step)/transpose(jvp(layers))/while"}
  %whole = bf16[128,32]{1,0} all-gather(%w), metadata={op_name="jit(step)/jvp(layers)/while/body/reshard"}
  %late = (f32[2,256,1000]{2,1,0}, f32[]) fusion(%gradient), metadata={op_name="jit(step)/next_token_loss"}
}
"""  # noqa: E501
ASSIGNMENT = f"""BufferAssignment:
allocation 0: size {8 * GIB}, page 0, parameter 0, shape |f32[2,64,32]| at ShapeIndex {{}}, maybe-live-out:
 value: <1 w @0> (size={8 * GIB},offset=0): f32[2,64,32]{{2,1,0}}
allocation 1: size {64 * GIB}, page 0, thread-local:
 value: <2 part @0> (size={64 * GIB},offset=0): bf16[128,32]{{1,0}}
allocation 2: size {32 * GIB}, color 5, page 0, preallocated-temp:
 value: <3 away @5> (size={32 * GIB},offset=0): bf16[2,2,16,32]{{3,2,1,0}}
allocation 3: size {15 * GIB}, page 0, preallocated-temp:
 value: <4 inputs @0> (size={4 * GIB},offset=0): bf16[2,2,16,32]{{3,2,1,0}}
 value: <5 hidden @0> (size={3 * GIB},offset={4 * GIB}): bf16[2,16,48]{{2,1,0}}
 value: <6 gradient @0> (size={2 * GIB},offset={7 * GIB}): f32[2,64,32]{{2,1,0}}
 value: <7 whole @0> (size={5 * GIB},offset={9 * GIB}): bf16[128,32]{{1,0}}
 value: <8 late{{0}} @0> (size={9 * GIB},offset=0): f32[2,256,1000]{{2,1,0}}
"""  # noqa: E501
LIVE_RANGES = """HloLiveRange (max 5):
  BufferLiveRange:
    w{}:0-0
    inputs{}:1-4
    hidden{}:2-3
    gradient{}:3-5
    whole{}:3-4
    late{0}:5-5
"""
SHAPES = {
  'stored': [[2, 64, 32]],
  'gathered': [[128, 32]],
  'layer_inputs': [2, 2, 16, 32],
  'vocabulary': 1000,
}


def test_a_buffer_counts_once_whatever_it_is_called():
  totals = memory.read_totals(ASSIGNMENT)
  assert totals == {memory.HBM: 23 * GIB, memory.HOST: 32 * GIB}


def test_the_peak_is_where_most_is_live_and_says_what_it_is():
  buffers, logits = memory.read_buffers(
    ASSIGNMENT, LIVE_RANGES, hlo.parse(PROGRAM), SHAPES
  )
  held = {buffer['holds']: buffer['gib'] for buffer in buffers}
  assert held == {
    'state': pytest.approx(8),
    'gathered weights and their gradients': pytest.approx(5),
    'layer inputs': pytest.approx(4),
    'activations of a layer': pytest.approx(3),
    'gradients': pytest.approx(2),
  }
  assert [buffer['gib'] for buffer in buffers] == [8, 5, 4, 3, 2]
  # There are some at another time.
  assert logits == 9


def test_logits_are_told_by_their_vocabulary():
  larger = ASSIGNMENT.replace(f'(size={9 * GIB}', f'(size={20 * GIB}')
  buffers, logits = memory.read_buffers(
    larger, LIVE_RANGES, hlo.parse(PROGRAM), SHAPES
  )
  assert buffers[0]['array'] == 'f32[2,256,1000]'
  assert buffers[0]['holds'] == 'logits'
  assert [buffer['gib'] for buffer in buffers] == [20, 8, 2]
  assert logits == 20

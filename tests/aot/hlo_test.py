"""Tests of reading a scheduled program, and of finding what it moves."""

from grit_jax.aot import hlo
from grit_jax.aot.collectives import find_collectives

# Each form that the compilers of TPUs write, shortened from their dumps: a
# gather by itself, one whose steps are fused with a product (v5e), one on
# another core (v6e), a reduce-scatter in an all-reduce, and a kernel whose
# metadata breaks its line.
PROGRAM = """HloModule step, is_scheduled=true

%condition (state: (s32[], bf16[64,512])) -> pred[] {
  %bound = s32[]{:T(128)} constant(32)
  %state = (s32[]{:T(128)}, bf16[64,512]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%start_body (p: bf16[512,4096]) -> (bf16[512,4096], bf16[4096,4096]) {
  %p = bf16[512,4096]{1,0} parameter(0)
  %all-gather.1 = bf16[4096,4096]{1,0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=2,'b'=8] {'b'}, dimensions={0}, metadata={op_name="jit(step)/jvp(layers)/while/body/o/reshard"}
  ROOT %custom-call.1 = (bf16[512,4096]{1,0}, bf16[4096,4096]{1,0:S(1)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%step_body (p.1: bf16[512,4096]) -> bf16[64,512] {
  %p.1 = bf16[512,4096]{1,0} parameter(0)
  %all-gather.2 = bf16[4096,4096]{1,0} all-gather(%p.1), channel_id=1, replica_groups=mesh['a'=2,'b'=8] {'b'}, dimensions={0}
  ROOT %convolution.1 = bf16[64,512]{1,0} convolution(%p.1, %p.1), dim_labels=bf_io->bf
}

%done_body (p.2: bf16[512,4096]) -> bf16[4096,4096] {
  %p.2 = bf16[512,4096]{1,0} parameter(0)
  %all-gather.3 = bf16[4096,4096]{1,0} all-gather(%p.2), channel_id=1, replica_groups=mesh['a'=2,'b'=8] {'b'}, dimensions={0}
  ROOT %custom-call.2 = bf16[4096,4096]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%other_core (p.3: bf16[512,4096]) -> bf16[4096,4096] {
  %p.3 = bf16[512,4096]{1,0} parameter(0)
  ROOT %all-gather.4 = bf16[4096,4096]{1,0} all-gather(%p.3), channel_id=2, replica_groups=[2,8]<=[8,2]T(1,0), dimensions={0}
}, execution_thread="sparsecore"

%all-reduce-scatter.1 (p.4: bf16[4096,4096]) -> bf16[512,4096] {
  %p.4 = bf16[4096,4096]{1,0} parameter(0)
  %all-reduce.1 = bf16[4096,4096]{1,0} all-reduce(%p.4), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, to_apply=%sum, metadata={op_name="jit(step)/transpose(jvp(layers))/while/body/o/reshard"}
  ROOT %slice = bf16[512,4096]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={512,4096}
}

%body (state.1: (s32[], bf16[64,512])) -> (s32[], bf16[64,512]) {
  %state.1 = (s32[]{:T(128)}, bf16[64,512]{1,0}) parameter(0)
  %shard = bf16[512,4096]{1,0} get-tuple-element(%state.1), index=1
  %start = (bf16[512,4096]{1,0}, /*index=1*/bf16[4096,4096]{1,0:S(1)}) fusion(%shard), kind=kCustom, calls=%start_body
  %step = bf16[64,512]{1,0} fusion(%shard), kind=kOutput, calls=%step_body
  %done = bf16[4096,4096]{1,0} fusion(%shard), kind=kCustom, calls=%done_body
  %away-start = ((bf16[512,4096]{1,0}), bf16[4096,4096]{1,0}, u32[]{:S(8)}) async-start(%shard), async_execution_thread="sparsecore", calls=%other_core
  %splash.1 = f32[8,512,128]{2,1,0} custom-call(%shard), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/jvp(layers)/attend"}
  %away-done = bf16[4096,4096]{1,0} async-done(%away-start)
  %alone = bf16[4096,4096]{1,0} all-gather(%shard), channel_id=4, replica_groups={{0,8},{1,9}}, dimensions={0}
  %scatter = bf16[512,4096]{1,0} fusion(%alone), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %tuple = (s32[], bf16[64,512]{1,0}) tuple(%shard, %step)
}

ENTRY %main (argument: (s32[], bf16[64,512])) -> (s32[], bf16[64,512]) {
  %argument = (s32[]{:T(128)}, bf16[64,512]{1,0}) parameter(0)
  ROOT %while = (s32[], bf16[64,512]{1,0}) while(%argument), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_program_is_read_whole():
  module = hlo.parse(PROGRAM)
  assert module.entry == 'main'
  body = module.computations['body']
  assert [each.name for each in body][-3:] == ['alone', 'scatter', 'tuple']
  assert len(body) == 11
  [loop] = [each for each in module.computations['main'] if each.calls]
  assert hlo.trip_count(module, loop) == 32
  start = body[2]
  assert start.opcode == 'fusion'
  assert start.operands == ['shard']
  assert [str(x) for x in start.result] == [
    'bf16[512,4096]', 'bf16[4096,4096]'
  ]  # fmt: skip
  assert [x.space for x in start.result] == ['', 'S(1)']
  assert start.result[1].bytes == 4096 * 4096 * 2
  assert body[6].path == 'jit(step)/jvp(layers)/attend'


def test_collectives_are_found_in_each_form():
  found = find_collectives(hlo.parse(PROGRAM), [], chips_per_slice=8)
  assert {each.times for each in found} == {32}
  assert {each.bytes for each in found} == {4096 * 4096 * 2}
  said = {
    (each.kind, each.phase): (
      each.group, each.between_slices, each.asynchronous, each.hidden
    )
    for each in found
    if each.group == 8
  }  # fmt: skip
  assert len(found) == 4
  assert said['all-gather', 'forward'][0] == 8
  assert said['reduce-scatter', 'backward'] == (8, False, False, False)
  by_result = sorted(
    (each.asynchronous, each.hidden, each.group, each.between_slices)
    for each in found
    if each.kind == 'all-gather'
  )
  assert by_result == [
    (False, False, 2, True),  # alone, of chips 0 and 8
    (True, True, 8, False),  # beside the product
    (True, True, 8, True),  # beside the kernel: chips 0, 2, ... of 16
  ]

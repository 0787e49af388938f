"""Test counts of FLOPs, collectives and memory traffic on small programs with known costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax.devices import costs

P = PartitionSpec
KB = 1024


def flops(f, *shapes):
  return costs.matmul_flops(jax.make_jaxpr(f)(*(jnp.zeros(shape) for shape in shapes)))


def test_matrix_products_take_two_flops_for_each_scalar_product():
  assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7
  assert flops(lambda a: jnp.tanh(a) + 1, (3, 5)) == 0


def convolution(x, kernel, padding="VALID", **options):
  options = {"window_strides": (1, 1), **options}
  return jax.lax.conv_general_dilated(x, kernel, padding=padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def test_convolutions_take_two_flops_for_each_scalar_product():
  # There are 2 images, 6x6 positions of a 3x3 kernel, and 5 input and 7 output channels.
  assert flops(convolution, (2, 8, 8, 5), (3, 3, 5, 7)) == 2 * 2 * 36 * 9 * 5 * 7


@pytest.mark.parametrize(
  "options",
  [
    {"padding": "SAME"},
    {"padding": "SAME", "window_strides": (2, 2)},
    {"padding": ((1, 2), (0, 1)), "lhs_dilation": (2, 2)},
    {"padding": "SAME", "rhs_dilation": (2, 1)},
    {"padding": "SAME", "feature_group_count": 2},
    {"batch_group_count": 2},
  ],
)
def test_convolution_flops_match_xla(options):
  channels = 6 // options.get("feature_group_count", 1)

  def f(x, kernel):
    return convolution(x, kernel, **options)

  shapes = (2, 8, 9, 6), (3, 3, channels, 4)
  lowered = jax.jit(f).lower(*(jnp.zeros(shape) for shape in shapes))
  assert flops(f, *shapes) == lowered.cost_analysis()["flops"]


def test_a_gradient_takes_about_three_times_the_flops_of_the_forward_pass():
  shapes = (2, 8, 8, 16), (3, 3, 16, 16), (3, 3, 16, 16)

  def loss(x, a, b):
    return jnp.sum(convolution(convolution(x, a, "SAME"), b, "SAME") ** 2)

  forward = flops(loss, *shapes)
  assert flops(jax.grad(loss, argnums=(0, 1, 2)), *shapes) == pytest.approx(3 * forward, rel=0.01)
  # Without a gradient with respect to the data, the first layer needs one product less.
  assert flops(jax.grad(loss, argnums=(1, 2)), *shapes) == pytest.approx(2.5 * forward, rel=0.01)
  # Recomputed products count too.
  checkpointed = jax.checkpoint(lambda x, a, b: convolution(jnp.sin(convolution(x, a, "SAME")), b, "SAME"))
  recomputing = flops(jax.grad(lambda *args: jnp.sum(checkpointed(*args) ** 2), argnums=(0, 1, 2)), *shapes)
  assert recomputing >= 3.4 * forward


def test_flops_of_loops_branches_and_shards_are_counted():
  product = 2 * 4 * 4 * 4

  def scanned(a):
    return jax.lax.scan(lambda x, _: (x @ x, None), a, length=5)[0]

  def branched(a):
    return jax.lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a, a)

  assert flops(jax.jit(scanned), (4, 4)) == 5 * product
  assert flops(branched, (4, 4)) == 2 * product
  mesh = Mesh(np.array(jax.devices()), ("d",))
  sharded = jax.shard_map(lambda a: a @ a.T, mesh=mesh, in_specs=P("d"), out_specs=P("d", None))
  assert flops(sharded, (8 * 4, 4)) == 8 * product


@pytest.fixture(scope="module")
def mesh():
  return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))


def compiled(mesh, body, shape, out_specs=None):
  both = P(("data", "fsdp"))
  f = jax.shard_map(body, mesh=mesh, in_specs=both, out_specs=out_specs or both, check_vma=False)
  return costs.collectives(jax.jit(f).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text())


@pytest.mark.parametrize(
  ("kind", "body", "expected"),
  [
    # Each device has 1 KiB. For an all-reduce, each device in a ring of g devices sends 2(g-1)/g KiB.
    ("all-reduce", lambda x: jax.lax.psum(x, ("data", "fsdp")), (1, KB, 2 * 7 / 8 * KB)),
    ("all-reduce", lambda x: jax.lax.psum(x, "fsdp"), (1, KB, 2 * 3 / 4 * KB)),
    ("all-gather", lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)[:256], (1, 4 * KB, 3 / 4 * 4 * KB)),
    ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), (1, KB, 3 / 4 * KB)),
    ("all-to-all", lambda x: jax.lax.all_to_all(x.reshape(2, -1), "data", 0, 0), (1, KB, KB / 2)),
    ("collective-permute", lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), (1, KB, KB)),
  ],
)
def test_each_collective_is_counted_with_its_bytes(mesh, kind, body, expected):
  assert compiled(mesh, body, (8 * 256,)) == {kind: expected}


def test_a_combined_all_reduce_counts_all_its_arrays(mesh):
  def body(x):
    return jax.lax.psum(x, ("data", "fsdp")) + jnp.sum(jax.lax.psum((x[:128] ** 2, x[:64] ** 3), ("data", "fsdp"))[0])

  collectives = compiled(mesh, body, (8 * 256,))
  assert collectives["all-reduce"].bytes == KB + 512


def test_a_collective_in_a_loop_counts_for_each_iteration(mesh):
  def body(x):
    return jax.lax.scan(lambda x, _: (jax.lax.psum(x, "fsdp") / 4, None), x, length=7)[0]

  assert compiled(mesh, body, (8 * 256,))["all-reduce"][:2] == (7, 7 * KB)


def test_gradients_of_a_sharded_batch_are_reduced_once(mesh):
  def step(w, x):
    return w - jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)

  replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(("data", "fsdp")))
  lowered = jax.jit(step, in_shardings=(replicated, sharded), out_shardings=replicated).lower(
    jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((16, 64), jnp.float32)
  )
  assert costs.collectives(lowered.compile().as_text()) == {"all-reduce": (1, 64 * 32 * 4, 7 / 8 * 2 * 64 * 32 * 4)}


# A shortened program in the form that XLA writes for TPUs and GPUs.
ASYNCHRONOUS = """HloModule step, replica_count=1, num_partitions=8

%fused.1 (p: bf16[32,128]) -> bf16[128,128] {
  %p = bf16[32,128]{1,0} parameter(0)
  ROOT %ag.1 = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=4, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%fused.2 (p: bf16[32,128]) -> bf16[128,128] {
  %p = bf16[32,128]{1,0} parameter(0)
  ROOT %ag.2 = bf16[128,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=4, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %all-reduce.7 = f32[64]{0:T(128)} all-reduce(%p), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[16]{0} dynamic-slice(%all-reduce.7, %i)
}

%wrapped (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  ROOT %rs = f32[16]{0} reduce-scatter(%p), channel_id=8, replica_groups=mesh['x'=2,'y'=4], device_ids=([2,4]T(1,0)) {'y'}, to_apply=%add
}

%condition (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %cps = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %cpd = f32[8]{0} collective-permute-done(%cps)
}

%sparse_core (p: f32[32]) -> f32[32] {
  %p = f32[32]{0} parameter(0)
  ROOT %all-reduce.9 = f32[32]{0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %f1 = bf16[128,128]{1,0} fusion(%a), kind=kCustom, calls=%fused.1
  %f2 = bf16[128,128]{1,0} fusion(%f1), kind=kCustom, calls=%fused.2
  %f3 = f32[16]{0} fusion(%f2), kind=kCustom, calls=%all-reduce-scatter.1
  %as = ((f32[64]{0}), f32[16]{0}, s32[]) async-start(%f3), calls=%wrapped
  %ad = f32[16]{0} async-done(%as), calls=%wrapped
  %cs = ((f32[32]{0}, token[]), f32[32]{0}) call-start(%g, %ready), async_execution_thread="sparsecore", to_apply=%sparse_core
  %cd = f32[32]{0} call-done(%cs)
  %w = (s32[]) while(%t), condition=%condition, body=%body
  %ars = (f32[10]{0}, f32[5]{0}) all-reduce-start(%b, %c), channel_id=2, replica_groups={}, to_apply=%add
  %ard = (f32[10]{0}, f32[5]{0}) all-reduce-done(%ars)
  %ags = (f32[2]{0}, f32[16]{0}) all-gather-start(%d), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %agd = f32[16]{0} all-gather-done(%ags)
}
"""


def test_asynchronous_collectives_count_once():
  assert costs.collectives(ASYNCHRONOUS) == {
    "all-reduce": (2, 60 + 128, 2 * 7 / 8 * (60 + 128)),
    "all-gather": (2, 128 * 128 * 2 + 64, 3 / 4 * 128 * 128 * 2 + 7 / 8 * 64),
    "reduce-scatter": (2, 2 * 256, 2 * 3 / 4 * 256),
    "collective-permute": (3, 3 * 32, 3 * 32),
  }
  assert costs.loops(ASYNCHRONOUS) == 1
  assert costs.collectives("") == {}


def test_operations_of_a_compiled_program_have_their_bytes_and_counts():
  """The program computes one matrix product outside a loop, and five matrix products in the loop."""

  def run(a, b):
    return jax.lax.fori_loop(0, 5, lambda i, x: jnp.sin(x) @ b, a @ b)

  shape = jnp.zeros((64, 64))
  operations = costs.operations(jax.jit(run).lower(shape, shape).compile().as_text())
  products = [
    operation for operation in operations if operation.kind in ("dot", "custom-call") or "dot" in operation.source
  ]
  assert sum(operation.times for operation in products) == 6
  for operation in products:
    assert (operation.read_bytes, operation.written_bytes) == (2 * 64 * 64 * 4, 64 * 64 * 4)
    assert operation.bytes == operation.times * 3 * 64 * 64 * 4


HLO = """HloModule jit_step, num_partitions=1

%sliced (param_0.1: f32[16,1024], param_1.1: s32[]) -> f32[1024] {
  %param_0.1 = f32[16,1024]{1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,1024]{1,0} dynamic-slice(%param_0.1, %param_1.1, %zero), dynamic_slice_sizes={1,1024}
  ROOT %flat = f32[1024]{0} bitcast(%row)
}

%updated (param_0.2: f32[16,1024], param_1.2: f32[16,1024], param_2.2: s32[]) -> f32[16,1024] {
  %param_0.2 = f32[16,1024]{1,0} parameter(0)
  %param_1.2 = f32[16,1024]{1,0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  %inner = f32[1024]{0} fusion(%param_1.2, %param_2.2), kind=kLoop, calls=%sliced
  %again = f32[1,1024]{1,0} bitcast(%inner)
  ROOT %update = f32[16,1024]{1,0} dynamic-update-slice(%param_0.2, %again, %param_2.2, %param_2.2)
}

ENTRY %main (a: f32[16,1024], i: s32[]) -> f32[16,1024] {
  %a = f32[16,1024]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %copy-start = (f32[16,1024]{1,0:T(8,128)S(1)}, f32[16,1024]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[16,1024]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[16,1024]{1,0:T(8,128)}), f32[4,1024]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:4], [0:1024]}
  %slice-done = f32[4,1024]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %joined = f32[16,1024]{1,0:T(8,128)S(1)} custom-call(%slice-done, %slice-done), custom_call_target="ConcatBitcast"
  %on_chip = f32[16,1024]{1,0:T(8,128)S(1)} negate(%copy-done), metadata={op_name="jit(step)/neg"}
  %row = f32[1024]{0:T(1024)S(1)} fusion(%a, %i), kind=kLoop, calls=%sliced, backend_config={"estimated_cycles":"420"}
  ROOT %out = f32[16,1024]{1,0:T(8,128)} fusion(%a, %a, /*index=2*/%i), kind=kLoop, calls=%updated
}
"""


def test_operations_of_a_program_for_tpus_have_their_traffic():
  """The traffic of a copy to on-chip memory includes the reads but not the writes.

  The traffic of a slice or an in-place update includes only the bytes of the slice. Operations that only wait for
  values or only group values have no traffic.
  """
  operations = {operation.name: operation for operation in costs.operations(HLO)}
  traffic = {name: (operation.read_bytes / KB, operation.written_bytes / KB) for name, operation in operations.items()}
  index = 4 / KB
  assert traffic == {
    "copy-start": (64, 0),
    "slice-start": (16, 0),
    "on_chip": (0, 0),
    "row": (4 + index, 0),
    "out": (4 + index, 4),
  }
  assert (operations["row"].cycles, operations["on_chip"].cycles) == (420, 0)
  assert operations["on_chip"].source == "jit(step)/neg"
  assert operations["out"].reads == ("f32[16,1024]{1,0:T(8,128)}",) * 2 + ("s32[]{:T(128)}",)

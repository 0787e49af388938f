"""Operations in several programs, all exact to float32 rounding: first the plain one, then what each platform computes faster.

Every operation takes `kernels`, which says what programs it may take:

- "tuned": the fastest on the platform that compiles it.
- "single_device": as "tuned", for programs that run on one device. On a CPU it adds a convolution that programs over several devices would hang in.
- "loop": as "tuned", with gradients of convolutions that a CPU computes quickly inside loops. They have no forward-mode derivatives (`jax.jvp`).
- "plain": the operation as JAX has it, on every platform: to compare with, and to plan the memory of other platforms on a CPU.
"""

KERNELS = ("tuned", "single_device", "loop", "plain")

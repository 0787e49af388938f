"""Continuous VP SDE on CIFAR-10 with the settings of Song et al. 2021, sampled by the probability-flow ODE.

The network is DDPM's, trained on the continuous-time loss: the paper's "DDPM cont. (VP)", table 2. Data as for
configs/cifar10_vp.py, prepared once by --mode=prepare.

python -m ddpm_jax.main --config=configs/cifar10_sde.py --workdir=/tmp/cifar10_sde

Hardware: one GPU or a TPU slice; on a CPU a step takes a minute.
Score: FID 3.69 in the paper by its probability-flow sampler; not yet repeated with this code.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.model.process = spec("processes.vp")
  config.training.steps = 1_300_000
  config.sampler = spec("sampling.ode", rtol=1e-5, atol=1e-5)
  config.sampling.clip = None
  return config

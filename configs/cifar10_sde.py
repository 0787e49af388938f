"""Train the continuous VP SDE on CIFAR-10, and sample with the probability-flow ODE (Song et al. 2021).

python -m ddpm_jax.main --config=configs/cifar10_sde.py --workdir=/tmp/cifar10_sde

Network: as in configs/cifar10_vp.py, but trained with the continuous-time loss. Table 2 of the paper calls this model
"DDPM cont. (VP)".
Data: as in configs/cifar10_vp.py, prepared once with --mode=prepare.
Hardware: one GPU or a TPU slice. On a CPU a step takes a minute.
Score: in the paper, FID 3.69 with the probability-flow sampler. Not yet reproduced with this code.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.model.process = spec("processes.vp")
  config.training.steps = 1_300_000
  config.sampler = spec("sampling.ode", rtol=1e-5, atol=1e-5)
  config.sampling.clip = None
  return config

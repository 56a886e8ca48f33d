"""Step sizes per task, as constructor keywords of the sampler "dps". Torch-free.

released: configs/*.yaml of DPS2022/diffusion-posterior-sampling@effbde7 (FFHQ, Gaussian noise 0.05). The paper's own
values per data set are larger; they are in docs/papers/dps.md.
"""

RELEASED = {
    "super-resolution": 0.3,
    "gaussian-deblurring": 0.3,
    "motion-deblurring": 0.3,
    "nonlinear-deblurring": 0.3,
    "inpainting": 0.5,
    "phase-retrieval": 1.0,
}
PRESETS = {task: {"zeta": zeta, "steps": 1000} for task, zeta in RELEASED.items()}

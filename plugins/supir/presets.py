"""Settings of SUPIR's sampler by purpose, and the published words. Torch-free.

Official files: Fanghua-Yu/SUPIR@bda91af README.md, test.py, options/SUPIR_v0.yaml and
options/SUPIR_v0_Juggernautv9_lightning.yaml; `paper` is arXiv 2401.13627, sec. 4.1; `faces` is what users report
(Fanghua-Yu/SUPIR#93): less text guidance ages faces less.
"""

from __future__ import annotations

from typing import Any

ADDED = (
    "Cinematic, High Contrast, highly detailed, taken using a Canon EOS R camera, hyper detailed photo - realistic "
    "maximum detail, 32k, Color Grading, ultra HD, extreme meticulous detailing, skin pore detailing, hyper sharpness, "
    "perfect without deformations."
)
NEGATIVE = (
    "painting, oil painting, illustration, drawing, art, sketch, oil painting, cartoon, CG Style, 3D render, unreal "
    "engine, blurring, dirty, messy, worst quality, low quality, frames, watermark, signature, jpeg artifacts, "
    "deformed, lowres, over-smooth"
)

SAMPLERS: dict[str, dict[str, Any]] = {
    "quality": {"guidance_scale": 6.0, "guidance_start": 3.0, "s_noise": 1.02},
    "fidelity": {"guidance_scale": 4.0, "guidance_start": 1.0, "s_noise": 1.01},
    "faces": {"guidance_scale": 2.0, "guidance_start": 1.0, "s_noise": 1.01},
    "paper": {"steps": 100, "guidance_scale": 7.5, "guidance_start": None, "restore": 4.0, "s_churn": 0.0,
              "s_noise": 1.003},
    "lightning-q": {"solver": "dpmpp-2m", "steps": 8, "guidance_scale": 2.0, "guidance_start": None, "s_noise": 1.003},
    "lightning-f": {"solver": "dpmpp-2m", "steps": 8, "guidance_scale": 1.5, "guidance_start": None, "s_noise": 1.003},
}  # fmt: skip

CONTROLS: dict[str, dict[str, Any]] = {
    "v0": {"control_depth": (1, 2, 10)},  # the released networks: the control is a whole copy of SDXL's encoder
    "trimmed": {"control_depth": (1, 1, 4)},  # the paper's: about half of the transformers' blocks
}

CODECS: dict[str, dict[str, Any]] = {
    "v0": {
        "ch": 128,
        "ch_mult": (1, 2, 4, 4),
        "num_res_blocks": 2,
        "attn_resolutions": (),
        "resolution": 256,
        "z_channels": 4,
        "embed_dim": 4,
        "in_channels": 3,
        "out_ch": 3,
        "scale_factor": 0.13025,
    }
}

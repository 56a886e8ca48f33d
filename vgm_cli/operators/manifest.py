"""The degradations the host brings. Torch-free."""

from __future__ import annotations

from vgm_cli.hookspecs import Component

OPERATORS = {
    "inpainting": ("inpainting:Inpainting", "pixels are missing: a box, random ones, or a mask file"),
    "super-resolution": ("separable:SuperResolution", "bicubic reduction by `scale`, antialiased as in MATLAB"),
    "gaussian-deblurring": ("separable:GaussianDeblurring", "Gaussian blur of width `std`"),
    "motion-deblurring": ("motion:MotionDeblurring", "blur along a random path, or by a kernel file"),
    "nonlinear-deblurring": ("nonlinear:NonlinearDeblurring", "frames averaged in linear light, or a learned blur"),
    "phase-retrieval": ("phase:PhaseRetrieval", "only the amplitude of the Fourier transform is known"),
    "colorization": ("separable:Colorization", "only a grey image is known"),
    "jpeg": ("jpeg:JPEG", "JPEG compression of quality `quality`"),
    "bsr": ("bsr:BSR", "blur, reduction, noise and JPEG in a drawn order (BSRGAN's light form)"),
    "real-esrgan": ("realistic:RealESRGAN", "blur, resizing, noise and JPEG, twice, each image in its own way"),
    "classical": ("realistic:Classical", "blur, bicubic reduction, noise and JPEG, each once"),
    "denoising": ("separable:Denoising", "nothing but noise"),
}


def components() -> list[Component]:
    return [
        Component(kind="operator", name=name, target=f"vgm_cli.operators.{target}", summary=summary)
        for name, (target, summary) in OPERATORS.items()
    ]
